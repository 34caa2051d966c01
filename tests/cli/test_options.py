"""Parsers of option values: what they accept, and that nonsense gets an answer instead of a guess."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmtool.cli import options
from cmtool.errors import UsageError

seeds = st.integers(0, 2**63 - 1)


@given(st.lists(st.tuples(seeds, st.integers(0, 30)), min_size=1, max_size=8))
def test_seeds_are_the_union_of_their_ranges_in_order(spans):
    spans = [(low, min(low + width, 2**63 - 1)) for low, width in spans]
    text = ",".join(f"{low}-{high}" if high > low else str(low) for low, high in spans)
    expected = []
    for low, high in spans:
        expected += [seed for seed in range(low, high + 1) if seed not in expected]
    assert options.parse_seeds(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", [0]),
        ("0-3,100", [0, 1, 2, 3, 100]),
        ("7, 3", [7, 3]),
        ("2-2", [2]),
        ("1 - 2", [1, 2]),
        ("3,1-4", [3, 1, 2, 4]),
    ],
)
def test_seeds(text, expected):
    assert options.parse_seeds(text) == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("5-3", "3-5"),
        ("abc", "abc"),
        ("-1", "-1"),
        ("1--2", "1--2"),
        ("1.5", "1.5"),
        ("", "empty"),
        (" ", "empty"),
        ("1,,2", "empty"),
        ("1,", "empty"),
        (str(2**63), "too large"),
        ("0-999999999999", "1000000"),
        ("0-1000000", "1000001"),
        ("1_000", "1_000"),
        ("٣", "whole number"),
        ("9" * 50, "whole number"),
    ],
)
def test_impossible_seeds(text, word):
    with pytest.raises(UsageError) as caught:
        options.parse_seeds(text)
    assert word in caught.value.message + caught.value.hint
    assert caught.value.hint
    assert caught.value.exit_code == 2


@given(st.text(max_size=20))
def test_seeds_never_fail_in_another_way(text):
    try:
        parsed = options.parse_seeds(text)
    except UsageError:
        return
    assert parsed
    assert all(0 <= seed < 2**63 for seed in parsed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-9", list(range(10))), ("3", [3]), ("3,3,1", [3, 3, 1]), ("8-9,0", [8, 9, 0])],
)
def test_labels_by_number(text, expected):
    assert options.parse_labels(text, 10) == expected


def test_labels_by_name_and_names_win_over_numbers():
    names = ("2", "cat", "guinea-pig")
    assert options.parse_labels("guinea-pig,cat,1,2", 3, names) == [2, 1, 1, 0]


@pytest.mark.parametrize(
    ("text", "classes", "names", "word"),
    [
        ("10", 10, (), "0-9"),
        ("0-10", 10, (), "no class 10"),
        ("cta", 2, ("cat", "dog"), "did you mean cat"),
        ("dog", 10, (), "0-9"),
        ("0", 0, (), "knows no classes"),
        ("1,", 10, (), "empty"),
        ("4-2", 10, (), "2-4"),
        ("-1", 10, (), "-1"),
    ],
)
def test_impossible_labels(text, classes, names, word):
    with pytest.raises(UsageError) as caught:
        options.parse_labels(text, classes, names)
    assert word in caught.value.message + caught.value.hint


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9, unique=True))
def test_times_come_back_as_written(times):
    times = sorted(times, reverse=True)
    assert options.parse_times(",".join(map(repr, times))) == times


@pytest.mark.parametrize("text", ["", "80,", "0.8,80", "80,80", "80,0", "-1", "nan", "inf", "80;0.8", "x", "80,1e-400"])
def test_impossible_times(text):
    with pytest.raises(UsageError) as caught:
        options.parse_times(text)
    assert "--times" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("400", 400),
        ("12k", 12_000),
        ("12K", 12_000),
        ("1.5M", 1_500_000),
        ("51.2M", 51_200_000),
        ("2Ki", 2048),
        ("0.5Mi", 524_288),
        ("1e6", 10**6),
        ("10_000", 10_000),
        ("1.3k", 1300),
        ("2 k", 2000),
        ("3G", 3 * 10**9),
    ],
)
def test_count(text, expected):
    assert options.parse_count(text) == expected


@pytest.mark.parametrize(
    "text", ["", "k", "-3", "1.5", "0", "12q", "0.0001k", "1e99", "1,5k", "nan", "inf", "1kk", "٣"]
)
def test_impossible_counts(text):
    with pytest.raises(UsageError) as caught:
        options.parse_count(text, "--duration")
    assert "--duration" in caught.value.message


@given(st.integers(1, 10**15))
def test_count_of_a_plain_number_is_exact(number):
    assert options.parse_count(str(number)) == number
