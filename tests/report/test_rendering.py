from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from html.parser import HTMLParser

import pytest
from rich.console import Console

from lightning_accel.report.page import render_html
from lightning_accel.report.plots import Bar, Line, change_plot, line_plot
from lightning_accel.report.receipt import Receipt, make_receipt
from lightning_accel.report.record import Run
from lightning_accel.report.statistics import Estimate
from lightning_accel.report.text import format_estimate, format_number, headline, render_markdown, render_terminal
from tests.report.synthetic import make_run


@pytest.fixture
def receipt() -> Receipt:
    runs: list[Run] = []
    for seed in range(3):
        runs.append(make_run("plain", seed, seconds_fit=3 + seed / 10, data="digits, 10 classes"))
        runs.append(make_run("accelerated", seed, seconds_fit=1.5 + seed / 10, optimizer_state_bytes=2000))
    runs.append(Run("plain", 3, "failed", error="ValueError: <b>boom</b>"))
    return make_receipt(
        runs,
        command="lightning-accel compare --config a.yaml",
        sides={"plain": "a.yaml", "accelerated": "a.yaml + b.yaml"},
        configs={"a.yaml": "model: <script>alert(1)</script>"},
    )


def test_terminal(receipt: Receipt) -> None:
    console = Console(width=140, record=True, file=None)
    with console.capture() as capture:
        console.print(render_terminal(receipt))
    text = capture.get()
    assert "Time to finish the fit" in text
    assert re.search(r"Optimizer state +│ +7.81 KiB │ +1.95 KiB │ +0.250x │ better", text)
    assert re.search(r"Parameters +│ +1,000 │ +1,000 │ +1.000x │ no effect", text)
    assert "Failed and left out: plain-seed3." in text
    assert "Data: digits, 10 classes" in text


def test_terminal_does_not_read_markup(receipt: Receipt) -> None:
    runs = [make_run("plain", 0, metrics={"[red]x": 1.0}, monitored=["[red]x"])]
    with Console(width=140).capture() as capture:
        pass
    console = Console(width=140)
    with console.capture() as capture:
        console.print(render_terminal(make_receipt(runs, notes=["[bold]note[/]"])))
    assert "Final [red]x" in capture.get()
    assert "[bold]note[/]" in capture.get()


def test_markdown(receipt: Receipt) -> None:
    text = render_markdown(receipt)
    assert "| Optimizer state | 7.81 KiB | 1.95 KiB | 0.250x | **better** |" in text
    assert "| plain | 3 | failed | - | - | - |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for line in tables:
        assert line.count("|") in (6, 7)  # 5 columns, 6 in the table of runs


def test_markdown_escapes_pipes() -> None:
    text = render_markdown(make_receipt([make_run("plain", 0, metrics={"a|b": 1.0}, monitored=["a|b"])]))
    assert "Final a\\|b" in text


class Tags(HTMLParser):
    """Checks that tags close, and collects what could load something."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            f"{tag} {name}"
            for name, value in attrs
            if name in ("src", "href", "data", "srcset") and not str(value).startswith("data:")
        ]
        if tag in ("script", "link", "iframe", "object"):
            self.loads.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained(receipt: Receipt) -> None:
    page = render_html(receipt)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loads == []
    assert "url(" not in page and "@import" not in page
    assert "&lt;script&gt;alert(1)" in page and "&lt;b&gt;boom" in page
    plots = [b64decode(part).decode() for part in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(plots) == 3
    for plot in plots[:2]:
        for side in ("plain", "accelerated"):
            assert len(re.findall(rf'<g id="{side}-seed\d"', plot)) == 3
    for word in ("better", "no effect", "0.250x", "digits, 10 classes"):
        assert word in page


def test_page_without_anything() -> None:
    page = render_html(make_receipt([make_run("plain", 0, metrics={}, monitored=[], history={})]))
    assert "<img" not in page and "logged no metric" in page


def test_all_say_the_same(receipt: Receipt) -> None:
    data = json.loads(receipt.to_json())
    page, markdown = render_html(receipt), render_markdown(receipt)
    for row in data["rows"]:
        assert row["label"] in page and row["label"] in markdown
        assert f">{row['verdict']}" in page


def test_headline(receipt: Receipt) -> None:
    assert "Optimizer state (0.250x)" in headline(receipt)["better"]
    assert "Parameters" in headline(receipt)["no effect"]


def path_of(svg: str, name: str) -> list[tuple[float, float]]:
    """The points of the curve called ``name``."""
    group = next(node for node in ElementTree.fromstring(svg).iter() if node.attrib.get("id") == name)
    path = next(node for node in group if node.tag.endswith("path")).attrib["d"]
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_line_plot_is_xml_and_places_points() -> None:
    svg = line_plot([Line("plain", "a & b", [(0.0, 0.0), (10.0, 1.0)])], "s", "<y>", target=0.5)
    (x0, y0), (x1, y1) = path_of(svg, "a & b")
    assert x0 < x1 and y0 > y1  # SVG's y axis points down
    assert path_of(svg, "target")[0][1] == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_single_point_and_no_point() -> None:
    ElementTree.fromstring(line_plot([Line("plain", "a", [(0.0, 0.0)])], "s", "y"))
    assert line_plot([], "s", "y") == ""
    assert change_plot([]) == ""


def test_change_plot_cuts_endless_intervals() -> None:
    svg = change_plot([Bar("a", 1.0, 1e-9, 1e9, "text", "no effect"), Bar("b", 0.5, 0.4, 0.6, "text", "better")])
    (low, _), (high, _) = path_of(svg, "interval a")
    (left, _), (right, _) = path_of(svg, "interval b")
    assert 0 <= low < left < right < high <= 6.9 * 72
    assert path_of(svg, "interval b")[0][1] > path_of(svg, "interval a")[0][1]  # in the order given, from the top


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (12.345, "seconds", "12.3 s"),
        (0.0123, "seconds", "12.3 ms"),
        (0.0, "seconds", "0.00 ms"),
        (1234.5, "seconds", "1,234 s"),
        (0, "bytes", "0 B"),
        (1023, "bytes", "1,023 B"),
        (1536, "bytes", "1.50 KiB"),
        (5 * 2**30, "bytes", "5.00 GiB"),
        (1234567, "count", "1,234,567"),
        (0.95123, "metric", "0.9512"),
        (-3.5, "metric", "-3.5000"),
    ],
)
def test_format_number(value: float, unit: str, expected: str) -> None:
    assert format_number(value, unit) == expected  # type: ignore[arg-type]


def test_format_estimate() -> None:
    assert format_estimate(Estimate(10.0, 9.5, 10.5, 3), "seconds") == "10.0 ± 0.50 s"
    assert format_estimate(Estimate(10.0, None, None, 1), "seconds") == "10.0 s"
    assert format_estimate(Estimate(10.0, 9.999, 10.001, 3), "seconds") == "10.0 s"  # not "± 0.00"
    assert format_estimate(None, "seconds") == "-"
