"""flax's msgpack: every form of the format, arrays that stay in the file, and damage that is always named."""

from __future__ import annotations

import math
import struct
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.errors import CheckpointError
from cmtool.io import msgpack
from tests.flaxfile import chunked, extension, pack, write


def one(data: bytes):
    """The value that these bytes mean, as the one entry of a map."""
    return msgpack.parse(b"\x81\xa1k" + data, "the file")["k"]


def refused(data: bytes, problem: str, whole: bool = False) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        msgpack.parse(data if whole else b"\x81\xa1k" + data, "the file")
    assert "the file is damaged at byte " in str(caught.value)


# Values, from the tables of the msgpack specification.


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\xc0", None),
        (b"\xc2", False),
        (b"\xc3", True),
        (b"\x00", 0),
        (b"\x7f", 127),
        (b"\xff", -1),
        (b"\xe0", -32),
        (b"\xcc\xff", 255),
        (b"\xcd\x01\x00", 256),
        (b"\xce\x00\x01\x00\x00", 65536),
        (b"\xcf\x80\x00\x00\x00\x00\x00\x00\x00", 2**63),
        (b"\xd0\x80", -128),
        (b"\xd1\xff\x7f", -129),
        (b"\xd2\xff\xff\x7f\xff", -32769),
        (b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00", -(2**63)),
        (b"\xca\x3f\xc0\x00\x00", 1.5),
        (b"\xcb\xbf\xf8\x00\x00\x00\x00\x00\x00", -1.5),
        (b"\xa0", ""),
        (b"\xa2\xc3\xa4", "ä"),
        (b"\xbf" + b"x" * 31, "x" * 31),
        (b"\xd9\x02hi", "hi"),
        (b"\xda\x00\x02hi", "hi"),
        (b"\xdb\x00\x00\x00\x02hi", "hi"),
        (b"\xc4\x02\x00\xff", b"\x00\xff"),
        (b"\xc5\x00\x02\x00\xff", b"\x00\xff"),
        (b"\xc6\x00\x00\x00\x02\x00\xff", b"\x00\xff"),
        (b"\x90", []),
        (b"\x92\x01\xc0", [1, None]),
        (b"\xdc\x00\x02\x01\x02", [1, 2]),
        (b"\xdd\x00\x00\x00\x01\x91\x03", [[3]]),
        (b"\x80", {}),
        (b"\x82\xa1a\x01\xa1b\x81\xa1c\x02", {"a": 1, "b": {"c": 2}}),
        (b"\xde\x00\x01\xa1a\x01", {"a": 1}),
        (b"\xdf\x00\x00\x00\x01\xa1a\x01", {"a": 1}),
    ],
)
def test_every_form_of_a_value(data, value):
    found = one(data)
    assert found == value
    assert isinstance(found, memoryview) or type(found) is type(value)


ARRAY = b"\x93\x91\x02\xa5int16\xc4\x04\x01\x00\xfe\xff"  # [2], "int16", 1 and -2


@pytest.mark.parametrize("code", [0xC7, 0xC8, 0xC9])
def test_every_length_of_an_extension(code):
    length = len(ARRAY).to_bytes(1 << (code - 0xC7), "big")
    array = one(bytes([code]) + length + b"\x01" + ARRAY)
    assert (array.dtype, array.shape) == ("int16", (2,))
    assert array.numpy().tolist() == [1, -2]


def test_extensions_of_fixed_length():
    assert one(b"\xd6\x02" + b"\x92\x00\xcc\x01") == 1j
    assert one(b"\xd7\x02" + b"\x92\xca\x3f\xc0\x00\x00\xd0\xfe") == 1.5 - 2j
    array = one(b"\xd8\x01" + b"\x93\x94\x01\x01\x01\x01\xa5int16\xc4\x02\x07\x00")
    assert array.numpy().tolist() == [[[[7]]]]
    refused(b"\xd4\x02\x07", "something else")
    refused(b"\xd5\x02\x07\x07", "longer than its content")


def test_complex_numbers_and_scalars():
    assert one(pack(1.5 - 2j)) == 1.5 - 2j
    found = one(pack(np.float32(2.5)))
    assert found == 2.5
    assert found.dtype == np.float32
    assert one(pack(np.int64(-(2**40)))) == -(2**40)


# Arrays.


@pytest.mark.parametrize("dtype", [name for name in msgpack.DTYPES if name != "bfloat16"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_arrays_of_every_type(dtype, shape):
    values = (np.arange(math.prod(shape)) * 37 % 101).reshape(shape).astype(dtype)
    found = one(pack(values))
    assert (found.dtype, found.shape) == (dtype, shape)
    assert found.numpy().dtype == values.dtype
    assert np.array_equal(found.numpy(), values)


def test_bfloat16_is_exact_in_float32():
    bits = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    found = one(pack(values)).numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, values.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("size", [1, 7, 24, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrays_in_chunks(size, dtype):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    found = one(pack(chunked(values, size)))
    assert (found.dtype, found.shape) == (str(dtype).removeprefix("torch."), (2, 3, 4))
    assert np.array_equal(found.numpy(), values.float().numpy())


def test_the_order_of_chunks_is_that_of_their_numbers():
    tree = chunked(np.arange(24.0), 2)
    tree["chunks"] = dict(sorted(tree["chunks"].items()))  # as jax sorts keys: 0, 1, 10, 11, 2, ...
    assert list(tree["chunks"])[:3] == ["0", "1", "10"]
    assert np.array_equal(one(pack(tree)).numpy(), np.arange(24.0))


def test_arrays_stay_in_the_file(tmp_path):
    """A file of a GiB takes no memory of its own, and one small array of it neither."""
    large = torch.empty(2**26, device="meta", dtype=torch.float64)
    path = write(tmp_path / "state", {"large": chunked(large, 2**25), "small": np.arange(3.0), "last": large[:5]})
    tracemalloc.start()
    tree = msgpack.read(path)
    small = tree["small"].numpy()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert path.stat().st_size > 2**29
    assert tree["large"].shape == (2**26,)
    assert small.tolist() == [0, 1, 2]
    assert not small.flags.writeable
    del tree
    assert small.tolist() == [0, 1, 2]  # keeps what it lies in


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=300).filter(lambda text: len(text.encode()) < 2**16),
    st.binary(max_size=300),
    st.complex_numbers(allow_nan=False),
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=9), inner, max_size=20),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=40), trees, max_size=4))
def test_trees_come_back_as_they_were(tree):
    tree.pop(msgpack.CHUNKED, None)
    assert msgpack.parse(pack(tree), "the file") == tree


# Damage.

STATE = pack(
    {
        "step": np.int32(7),
        "rate": 0.9999,
        "params": {
            "Conv_0": {"kernel": np.ones((3, 3, 2, 4), np.float32), "bias": torch.ones(4, dtype=torch.bfloat16)}
        },
        "big": chunked(np.arange(10.0), 4),
        "z": [1j, None, "text", b"bytes", -3],
    }
)


def test_a_file_cut_short_anywhere():
    for length in range(len(STATE)):
        with pytest.raises(CheckpointError, match="damaged at byte"):
            msgpack.parse(STATE[:length], "the file")


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(STATE) - 1), st.binary(min_size=1, max_size=6))
def test_a_file_with_any_bytes_changed(at, change):
    """Still a tree, or an error of ours; a changed number may go unseen, as there is no checksum."""
    data = STATE[:at] + change + STATE[at + len(change) :]
    with suppress(CheckpointError):
        assert isinstance(msgpack.parse(data, "the file"), dict)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_at_all(data):
    for start in (b"", b"\x81\xa1k", b"\x81\xa1k\xc7\xff\x01\x93"):
        with suppress(CheckpointError):
            assert isinstance(msgpack.parse(start + data, "the file"), dict)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\xc1", "0xc1"),
        (b"\xdd\xff\xff\xff\xff\x00", "a list of 4294967295 values in 1 bytes"),
        (b"\xdf\xff\xff\xff\xff\xa1a", "a map of 4294967295 entries"),
        (b"\xc6\xff\xff\xff\xffxx", "4294967295 bytes should follow, and 2 do"),
        (b"\xdb\xff\xff\xff\xffxx", "a text is 4294967295 bytes long"),
        (b"\xc9\xff\xff\xff\xff\x01x", "4294967295 bytes should follow"),
        (b"\xa2\xff\xff", "not UTF-8"),
        (b"\x81\x01\x02", "a key of a map is no text but int"),
        (b"\x81\x91\xa1a\x02", "a key of a map is no text but list"),
        (b"\x82\xa1a\x01\xa1a\x02", "two entries 'a'"),
        (b"\x91" * 40 + b"\x00", "more than 32 levels"),
        (b"\x81\xa1a" * 100_000 + b"\x00", "more than 32 levels"),
        (b"\x00\x00", "1 bytes follow after the end"),
        (extension(5, b"abc"), "extension type 5"),
        (extension(255, bytes(12)), "extension type -1"),
        (extension(1, pack(7)), "extension type 1 holds something else"),
        (extension(1, ARRAY + b"\x00"), "longer than its content"),
        (extension(1, pack([2, "int16", b"1234"])), "not made of a shape"),
        (extension(1, pack([[2], "int16", "1234"])), "not made of a shape"),
        (extension(1, pack([[2], b"int16", b"1234"])), "not made of a shape"),
        (extension(1, pack([[2], "object", b"1234"])), "unknown type 'object'"),
        (extension(1, pack([[2], "V4", b"1234"])), "unknown type 'V4'"),
        (extension(1, pack([[3], "int16", b"1234"])), r"an array int16 \[3\] of 4 bytes"),
        (extension(1, pack([[-2], "int16", b"1234"])), "shape"),
        (extension(1, pack([[-1, -2], "int16", b"1234"])), "shape"),
        (extension(1, pack([[2.0], "int16", b"1234"])), "shape"),
        (extension(1, pack([[True, 2], "int16", b"1234"])), "shape"),
        (extension(1, pack([["2"], "int16", b"1234"])), "shape"),
        (extension(1, pack([[1] * 33 + [2], "int16", b"1234"])), "shape"),
        (extension(1, pack([[0, 2**31, 2**31, 2**31], "int16", b""])), "of 0 bytes"),
        (extension(1, pack([[2**63], "int16", b""])), "shape"),
        (extension(1, b"\x93\x91\x02\xa5int16\xc4\xff\x01\x00"), "255 bytes should follow, and 2 do"),
        (extension(3, pack([[2], "int16", b"1234"])), "a scalar has the shape"),
        (extension(2, pack(["1", "2"])), "not made of numbers"),
        (extension(2, pack([1, 2, 3])), "something else"),
    ],
)
def test_damage_is_named(data, problem):
    refused(data, problem)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["chunks"].pop("1"),
        lambda tree: tree["chunks"].clear(),
        lambda tree: tree["shape"].update({"0": 11}),
        lambda tree: tree["shape"].update({"0": -10}),
        lambda tree: tree["shape"].update({"1": "x"}),
        lambda tree: tree["shape"].update({"2": 1}),
        lambda tree: tree.pop("shape"),
        lambda tree: tree.update(chunks=[1]),
        lambda tree: tree.update(more=1),
        lambda tree: tree["chunks"].update({"0": 5}),
        lambda tree: tree["chunks"].update({"0": np.zeros((2, 2))}),
        lambda tree: tree["chunks"].update({"0": np.zeros(8, np.float32)}),
    ],
)
def test_damaged_chunks_are_named(change):
    tree = chunked(np.arange(10.0), 4)
    change(tree)
    refused(pack(tree), "chunk|shape|bytes")


def test_a_file_of_very_many_values_is_refused_early():
    """A small file could else become a list of a hundred times its size."""
    refused(b"\xdd" + struct.pack(">I", 2**22) + bytes(2**22), "more than 1000000 values")


@pytest.mark.parametrize("data", [b"\x91\x01", b"\x05", b"\xa1k"])
def test_a_tree_begins_with_a_map(data):
    refused(data, "does not begin with a map", whole=True)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        msgpack.read(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="there is no file"):
        msgpack.read(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        msgpack.read(tmp_path / "empty")
