"""The receipt as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import math
from base64 import b64encode
from html import escape

from lightning_accel.report.plots import Bar, Line, change_plot, line_plot
from lightning_accel.report.receipt import Receipt, Row
from lightning_accel.report.record import SIDES
from lightning_accel.report.text import (
    LEGEND,
    format_change,
    format_estimate,
    headline,
    run_cells,
    run_header,
)

__all__ = ["render_html"]

_STYLE = """
:root { --ink: #1c2430; --soft: #667085; --line: #e3e7ed; --paper: #ffffff; --card: #f7f9fb;
  --plain: #3a6ea5; --accelerated: #d9730d; --good: #12804a; --bad: #c0352b; --unsure: #9a6b00;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a2b3; --line: #2b3442; --paper: #131820;
  --card: #1a212c; --plain: #7fb2e5; --accelerated: #f5a04c; --good: #55c98a; --bad: #f0837a; --unsure: #e0b04a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; }
p, li { max-width: 78ch; } .soft, footer { color: var(--soft); } small { font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 14px 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.swatch.plain { background: var(--plain); } .swatch.accelerated { background: var(--accelerated); }
.seen { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 20px 0; }
.seen div { background: var(--card); border: 1px solid var(--line); border-top: 4px solid var(--soft);
  border-radius: 6px; padding: 10px 14px; }
.seen .better { border-top-color: var(--good); } .seen .worse { border-top-color: var(--bad); }
.seen .not-reached, .seen .not-enough-seeds { border-top-color: var(--unsure); }
.seen h3 { margin: 0 0 4px; font-size: 15px; } .seen ul { margin: 0; padding-left: 18px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
.runs th:last-child, .runs td:last-child { text-align: right; }
td.better { color: var(--good); font-weight: 600; } td.worse { color: var(--bad); font-weight: 600; }
td.no-effect { color: var(--soft); } td.not-reached, td.not-enough-seeds { color: var(--unsure); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 20px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 12px; }
figcaption { font-weight: 600; margin-bottom: 6px; } figcaption span { font-weight: 400; margin-left: 12px; }
figure img { width: 100%; height: auto; display: block; background: #ffffff; border-radius: 4px; }
figure.all { grid-column: 1 / -1; } figure.all img { max-width: 760px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 12px; overflow-x: auto; }
code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; } details { margin: 8px 0; }
summary { cursor: pointer; } footer { margin-top: 40px; font-size: 13px; }
"""


def render_html(receipt: Receipt) -> str:
    """Return the receipt as one self-contained HTML page."""
    seeds = max(len(receipt.finished(side)) for side in SIDES)
    facts = [(side, what) for side, what in receipt.sides.items() if what]
    if receipt.data:
        facts.append(("data", receipt.data))
    if receipt.metric:
        facts.append(("metric", f"{receipt.metric}, {receipt.better} is better"))
    if receipt.target is not None:
        facts.append(("target", f"{receipt.metric} {receipt.target:.4g} ({receipt.target_note})"))
    named = "".join(f"<dt>{_swatch(name)}{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in facts)
    command = f"<dt>repeat</dt><dd><code>{escape(receipt.command)}</code></dd>"
    notes = [f"{row.label}: {row.note}." for row in receipt.rows if row.note] + receipt.notes
    environment = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in receipt.environment.items())
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Receipt: plain against accelerated</title><style>{_STYLE}</style></head><body>",
            "<h1>Receipt</h1>",
            f'<p class="soft">The same module, plain and accelerated, {seeds} seed{"s" * (seeds != 1)} a side.</p>',
            f"<dl>{named}{command}</dl>",
            _seen(receipt),
            "<h2>Every quantity</h2>",
            _table(receipt),
            f'<p class="soft"><small>{escape(LEGEND)}</small></p>',
            f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else "",
            _plots(receipt),
            "<h2>Runs</h2>",
            _runs(receipt),
            "<h2>Measured on</h2>",
            f"<dl>{environment}</dl>",
            *("<h2>Configurations</h2>" for _ in [0] if receipt.configs),
            *(
                f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
                for name, text in receipt.configs.items()
            ),
            f"<footer>Made {escape(receipt.created)} by lightning-accel.</footer></body></html>",
        ]
    )


def _swatch(name: str) -> str:
    return f'<span class="swatch {name}"></span>' if name in SIDES else ""


def _class(row: Row) -> str:
    return row.verdict.replace(" ", "-")


def _seen(receipt: Receipt) -> str:
    """Cards: what became better, what worse, what stayed, in that order."""
    order = ("better", "worse", "no effect", "not reached", "not enough seeds")
    found = sorted(headline(receipt).items(), key=lambda item: order.index(item[0]))
    cards = [
        f'<div class="{word.replace(" ", "-")}"><h3>{word.capitalize()}</h3>'
        f"<ul>{''.join(f'<li>{escape(label)}</li>' for label in labels)}</ul></div>"
        for word, labels in found
    ]
    return f'<div class="seen">{"".join(cards)}</div>'


def _table(receipt: Receipt) -> str:
    heads = ["Quantity", *(f"{_swatch(side)}{side.capitalize()}" for side in SIDES), "Accelerated / plain", "Seen"]
    rows = "".join(
        f"<tr><td>{escape(row.label)}</td><td>{escape(format_estimate(row.plain, row.unit))}</td>"
        f"<td>{escape(format_estimate(row.accelerated, row.unit))}</td><td>{escape(format_change(row))}</td>"
        f'<td class="{_class(row)}">{row.verdict}{"*" * bool(row.note)}</td></tr>'
        for row in receipt.rows
    )
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _runs(receipt: Receipt) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in run_header(receipt))
    body = ""
    for run in receipt.runs:
        body += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in run_cells(receipt, run))}</tr>"
    tails = "".join(
        f"<details><summary>Why {escape(run.name)} failed</summary><pre>{escape(run.error)}</pre></details>"
        for run in receipt.runs
        if run.error
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide runs">{table}</div>{tails}'


def _image(svg: str, alt: str) -> str:
    """An SVG as part of the page; as an image, so that the names inside one plot can't meet those of another."""
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}">'


def _plots(receipt: Receipt) -> str:
    """Metric against time and against steps, every seed of both sides; and all ratios at a glance."""
    key = "".join(f"<span>{_swatch(side)}{side}</span>" for side in SIDES)
    figures = []
    for label, field in (("seconds since the fit began", "seconds"), ("optimizer steps", "step")):
        lines = [
            Line(run.side, run.name, [(getattr(point, field), point.value) for point in points])
            for side in SIDES
            for run in receipt.finished(side)
            if (points := [p for p in run.history.get(receipt.metric, []) if math.isfinite(p.value)])
        ]
        drawn = line_plot(lines, label, receipt.metric, receipt.target)
        if drawn:
            title = f"{escape(receipt.metric)} against {'time' if field == 'seconds' else 'steps'}"
            figures.append(f"<figure><figcaption>{title}{key}</figcaption>{_image(drawn, title)}</figure>")
    bars = [
        Bar(row.label, row.change.value, row.change.low, row.change.high, format_change(row), row.verdict)
        for row in receipt.rows
        if row.kind == "ratio" and row.change and row.change.low is not None and row.change.high is not None
    ]
    if bars:
        title = "Every ratio with its 95% interval"
        figures.append(
            f'<figure class="all"><figcaption>{title}</figcaption>{_image(change_plot(bars), title)}</figure>'
        )
    return f'<h2>Plots</h2><div class="plots">{"".join(figures)}</div>' if figures else ""
