"""`cmtool report`: a page that is whole, says what the runs say, and looks right in a browser."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from cmtool.cli.app import main
from cmtool.reporting.chart import Chart, Line, svg
from tests.browser import CHROMIUM, Browser

SMALL = ["--precision", "fp32", "--batch", "4", "--set", "network.channels=8", "--iterations", "6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures):
    root = tmp_path_factory.mktemp("report")
    for name, preset in (("first", "ect"), ("<second> & co", "edm")):
        ask = ["train", "--data", pictures, "--out", root / name, "--preset", preset, *SMALL, "--log-every", 2]
        assert main([*map(str, ask), "--sample-every", "2", "--judge-every", "3", "-q"]) == 0
    first, second = root / "first", root / "<second> & co"
    judge = ["evaluate", "--model", first, "--data", pictures, "-n", 8, "--steps", "1,2", "--precision", "fp32", "-q"]
    assert main([*map(str, judge), "--out", str(first / "quality.json")]) == 0
    ode = ["evaluate", "--model", first, "--teacher", second, "--metrics", "ode-error", "-n", 4, "-q"]
    assert main([*map(str, ode), "--out", str(first / "ode.json")]) == 0
    return first, second


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out), "-q"]) == 0
    return out


class Outline(html.parser.HTMLParser):
    """Tags that are opened and closed, and where anything points to."""

    VOID = ("meta", "link", "img", "br", "line", "circle", "polyline", "text")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.counts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def svg_of(lines, **how):
    return svg(Chart(lines, **how))


def test_the_page_is_whole_and_needs_nothing_else(page):
    text = page.read_text()
    outline = Outline(text)
    assert outline.open == []
    assert all(address.startswith("data:") for address in outline.addresses)
    assert outline.counts["img"] == 6
    assert "<script" not in text
    assert "&lt;second&gt; &amp; co" in text
    assert "<second>" not in text


def test_numbers_are_those_of_the_run(page, runs):
    text = page.read_text()
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert f"{lines[-1]['loss']:.5g}" in text
    proxies = [value for line in lines for name, value in line.items() if name.startswith("fd_random@")]
    assert len(proxies) == 2
    assert f"{min(proxies):.5g}" in text
    quality = json.loads((runs[0] / "quality.json").read_text())
    for row in quality["results"]:
        assert f"{row['metrics']['fd_random@8']:.5g}" in text
    ode = json.loads((runs[0] / "ode.json").read_text())["results"][0]
    assert f"{ode['metrics']['ode_error@4']:.5g}" in text
    assert quality["model"]["sha256"] in text  # the protocol of the numbers


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(page, tmp_path):
    with Browser() as browser:
        browser.open(page.as_uri())
        assert browser.ask("document.querySelectorAll('svg').length") >= 8
        assert browser.ask("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        browser.picture(tmp_path / "wide.png")
        browser.resize(360, 740, mobile=True)
        browser.open(page.as_uri())
        assert browser.ask("document.documentElement.scrollWidth") <= 360
        assert browser.ask("Math.min(...[...document.querySelectorAll('svg')].map(one => one.clientWidth))") > 280
        assert browser.ask("document.querySelector('details').open") is False
        browser.ask("document.querySelector('summary').click()")
        assert browser.ask("document.querySelector('details').open") is True
        assert browser.complaints == []


def test_a_run_of_which_little_is_there(cli, runs, tmp_path):
    """One that has just begun, or whose last line is cut off."""
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.json").write_bytes((runs[0] / "config.json").read_bytes())
    assert cli("report", new, "--out", tmp_path / "a.html").lines == [str(tmp_path / "a.html")]
    assert "nothing to draw" in (tmp_path / "a.html").read_text()
    (new / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    (new / "odd.json").write_text("[1]")
    told = json.loads(cli("report", new, "--out", tmp_path / "b.html", "--json").stdout)
    runs = [{"run": "new", "steps": 1, "evaluations": 0}]
    assert told == {"page": str(tmp_path / "b.html"), "runs": runs, "pictures": []}


def test_charts_as_pictures(cli, runs, tmp_path):
    done = cli("report", *runs, "--out", tmp_path / "a.html", "--png", tmp_path / "charts")
    assert done.code == 0, done.stderr
    page, *pictures = done.lines
    assert page == str(tmp_path / "a.html")
    names = [Path(file).name for file in pictures]
    assert names[0] == "loss.png"
    assert any(name.startswith("fd-random-8-against-network-calls") for name in names)
    assert any(name.startswith("mean-squared-error-of-the-jump") for name in names)
    assert sorted(names) == sorted(file.name for file in (tmp_path / "charts").iterdir())
    (marked,) = (file for file in pictures if "quality-while-training" in file)
    with Image.open(marked) as picture:
        assert picture.size == (900, 600)
        shown = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= shown  # the dots of each run
    (tmp_path / "file").write_text("")
    cli("report", runs[0], "--out", tmp_path / "b.html", "--png", tmp_path / "file").error(2, "--png")


def test_what_cannot_be_reported(cli, runs, tmp_path):
    cli("report").error(2, "RUN")
    cli("report", tmp_path, "--out", tmp_path / "a.html").error(1, "there is no", "config.json")
    cli("report", runs[0], "--out", tmp_path / "a.pdf").error(2, "a report is a page")
    cli("report", runs[0], runs[0], "--out", tmp_path / "a.html").error(2, "named twice")
    (tmp_path / "d.html").mkdir()
    cli("report", runs[0], "--out", tmp_path / "d.html").error(2, "is a folder")
    assert not (tmp_path / "a.html").exists()


def test_a_point_is_where_its_number_is():
    """Two points at the ends, one in the middle of a logarithmic axis."""
    drawn = svg_of([Line("a", [(1, 1), (10, 10), (100, 100)])], title="t", x="x", y="y", log_x=True, log_y=True)
    points = re.search(r'points="([^"]*)"', drawn)[1].split()
    (a, b), (c, d), (e, f) = (map(float, point.split(",")) for point in points)
    assert c == pytest.approx((a + e) / 2, abs=0.1)
    assert d == pytest.approx((b + f) / 2, abs=0.1)
    assert a < e
    assert b > f
    assert ">10</text>" in drawn


def test_numbers_that_cannot_be_drawn_are_left_out():
    drawn = svg_of([Line("a", [(0, 1), (1, float("nan")), (2, 5)])], title="t", x="x", y="y", log_y=True)
    assert len(re.search(r'points="([^"]*)"', drawn)[1].split()) == 2
    assert "nothing to draw" in svg_of([Line("a", [(0, -1)])], title="t", x="x", y="y", log_y=True)
    assert "<circle" in svg_of([Line("a", [(3, 4)])], title="t", x="x", y="y")  # a single point is seen
