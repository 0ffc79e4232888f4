"""The receipt as text: numbers in words, a table for the terminal, and Markdown."""

from __future__ import annotations

import math

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_accel.report.receipt import Receipt, Row, Unit
from lightning_accel.report.record import SIDES, Run
from lightning_accel.report.statistics import Estimate, Verdict

__all__ = [
    "LEGEND",
    "format_change",
    "format_estimate",
    "format_number",
    "headline",
    "render_markdown",
    "render_terminal",
]

LEGEND = (
    "Mean ± half of the 95% t-interval over seeds; the change is taken seed by seed, with its 95% interval. "
    "“better” and “worse” are said only where that interval excludes no change (for time and size, by more than half a "
    "percent); “no effect” means that none was seen, not that there is none."
)
STYLES: dict[Verdict, str] = {"better": "bold green", "worse": "bold red", "no effect": "dim", "not reached": "yellow"}
_SCALES: dict[Unit, tuple[tuple[float, str], ...]] = {
    "seconds": ((1, " s"), (1e-3, " ms")),
    "bytes": ((2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B")),
    "count": ((1, ""),),
    "metric": ((1, ""),),
}


def format_number(value: float, unit: Unit) -> str:
    """Return ``value`` as people write it, such as "12.3 s", "1.25 MiB", "44,426" or "0.9512"."""
    size, suffix = _scale(value, unit)
    return f"{_digits(value / size, unit, size)}{suffix}"


def format_estimate(estimate: Estimate | None, unit: Unit) -> str:
    """Return a mean and half of its interval, such as "12.3 ± 0.4 s"; a dash where there is none."""
    if estimate is None:
        return "-"
    half = 0.0 if estimate.high is None else estimate.high - estimate.value
    size, suffix = _scale(estimate.value, unit)
    center, spread = (_digits(number / size, unit, size) for number in (estimate.value, half))
    return f"{center}{suffix}" if not spread.strip("0.") else f"{center} ± {spread}{suffix}"


def format_change(row: Row) -> str:
    """Return the change of a row, such as "0.523x [0.49, 0.56]"; a dash where it can't be told."""
    change = row.change
    if change is None:
        return "-"
    if row.kind == "difference":
        sign = "+" if change.value >= 0 else "-"
        text, ends = sign + format_number(abs(change.value), row.unit), [change.low, change.high]
        shown = [("-" if end < 0 else "+") + format_number(abs(end), row.unit) for end in ends if end is not None]
    else:
        text = f"{_factor(change.value)}x"
        shown = [_factor(end) for end in (change.low, change.high) if end is not None]
    return text if not shown or change.low == change.high else f"{text} [{', '.join(shown)}]"


def headline(receipt: Receipt) -> dict[Verdict, list[str]]:
    """Return what was seen, word by word: for each verdict the quantities, with their change."""
    found: dict[Verdict, list[str]] = {}
    for row in receipt.rows:
        if row.verdict:
            short = format_change(row).split(" [")[0]
            label = f"{row.label} ({short})" if row.verdict in ("better", "worse") else row.label
            found.setdefault(row.verdict, []).append(label)
    return found


def render_terminal(receipt: Receipt) -> Group:
    """Return the receipt for a rich console."""
    table = Table(title="Receipt", title_style="bold", title_justify="left", header_style="bold")
    table.add_column("Quantity")
    for side in SIDES:
        table.add_column(f"{side.capitalize()} ({len(receipt.finished(side))} runs)", justify="right")
    table.add_column("Accelerated / plain", justify="right")
    table.add_column("Seen")
    for row in receipt.rows:
        style = STYLES.get(row.verdict, "")
        word = Text(row.verdict + ("*" if row.note else ""), style=style)
        table.add_row(Text(row.label), *(Text(cell) for cell in _cells(row)), word)
    lines = [Text(f"* {row.label}: {row.note}.", style="yellow") for row in receipt.rows if row.note]
    lines += [Text.from_markup(f"[yellow]Note:[/] {escape(note)}") for note in receipt.notes]
    if receipt.data:
        lines.insert(0, Text(f"Data: {receipt.data}"))
    return Group(table, *lines, Text(LEGEND, style="dim"))


def render_markdown(receipt: Receipt) -> str:
    """Return the receipt as Markdown."""
    plain, accelerated = (len(receipt.finished(side)) for side in SIDES)
    lines = [
        "# Receipt",
        "",
        *(f"- **{side}**: {what}" for side, what in receipt.sides.items() if what),
        *([f"- **data**: {receipt.data}"] if receipt.data else []),
        f"- **repeat**: `{receipt.command}`",
        f"- **made**: {receipt.created}",
        "",
        f"| quantity | plain ({plain} runs) | accelerated ({accelerated} runs) | accelerated / plain | seen |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in receipt.rows:
        word = f"**{row.verdict}**" if row.verdict in ("better", "worse") else row.verdict
        lines.append(f"| {' | '.join(map(_cell, (row.label, *_cells(row), word + ('*' if row.note else ''))))} |")
    lines += ["", *(f"\\* {row.label}: {row.note}." for row in receipt.rows if row.note)]
    lines += [f"- {note}" for note in receipt.notes]
    lines += ["", LEGEND, "", "## Runs", ""]
    header = run_header(receipt)
    lines += [f"| {' | '.join(map(_cell, header))} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(map(_cell, run_cells(receipt, run)))} |" for run in receipt.runs]
    lines += ["", "## Environment", "", *(f"- {key}: {value}" for key, value in receipt.environment.items())]
    return "\n".join(lines) + "\n"


def run_header(receipt: Receipt) -> list[str]:
    """Return the column names of the table of runs."""
    target = [] if receipt.target is None else [f"to {receipt.metric} {receipt.target:.4g}"]
    return ["side", "seed", "status", "fit", *([receipt.metric] if receipt.metric else []), *target]


def run_cells(receipt: Receipt, run: Run) -> list[str]:
    """Return one run's line in the table of runs; a run that never reached the target says "never"."""
    cells = [run.side, str(run.seed), run.status]
    if run.status != "finished":
        return cells + ["-"] * (len(run_header(receipt)) - len(cells))
    cells.append(format_number(run.seconds_fit, "seconds"))
    if receipt.metric:
        cells.append(format_number(run.metrics.get(receipt.metric, math.nan), "metric"))
    if receipt.target is not None:
        reached = run.seconds_to(receipt.metric, receipt.target, receipt.better)
        cells.append("never" if reached is None else format_number(reached, "seconds"))
    return cells


def _cells(row: Row) -> tuple[str, str, str]:
    return format_estimate(row.plain, row.unit), format_estimate(row.accelerated, row.unit), format_change(row)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _scale(value: float, unit: Unit) -> tuple[float, str]:
    scales = _SCALES[unit]
    return next((scale for scale in scales if abs(value) >= scale[0]), scales[-1])


def _digits(value: float, unit: Unit, size: float) -> str:
    if unit == "count" or (unit == "bytes" and size == 1):
        return f"{value:,.0f}"
    if unit == "metric":
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _factor(value: float) -> str:
    return f"{value:.3g}" if value < 0.1 or value >= 1000 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
