"""``lightning-accel methods``: every method, what it does, what it touches and where to read on."""

from __future__ import annotations

import json
from typing import Any

from lightning_accel.cli.usage import UsageError

__all__ = ["list_methods", "run_methods"]

_HELP = """usage: lightning-accel methods [--json]

List every method: what it does, what it touches, when it acts, what it is expected to change, and its page.
"""


def list_methods() -> list[dict[str, Any]]:
    """Return the contract of every public callback, by name, as JSON-able dicts."""
    import lightning_accel
    from lightning_accel.hooks import AccelCallback

    found = []
    for name in sorted(lightning_accel.__all__):
        cls = getattr(lightning_accel, name)
        if isinstance(cls, type) and issubclass(cls, AccelCallback):
            contract = cls.contract
            found.append(
                {
                    "name": name,
                    "class_path": f"lightning_accel.{name}",
                    "purpose": contract.purpose,
                    "touches": sorted(contract.touches),
                    "reads": sorted(contract.reads),
                    "acts": contract.acts,
                    "expects": contract.expects,
                    "docs": f"docs/{contract.docs}.md",
                    "manual_optimization": contract.manual_optimization or "works",
                    "refuses": dict(contract.refuses),
                }
            )
    return found


def run_methods(args: list[str]) -> int:
    """Print the methods as a table, or as JSON; return the exit status."""
    if "-h" in args or "--help" in args:
        print(_HELP, end="")
        return 0
    if unknown := [argument for argument in args if argument != "--json"]:
        raise UsageError(f"`lightning-accel methods` takes --json and nothing else, but got {' '.join(unknown)}.")
    methods = list_methods()
    if args:
        print(json.dumps(methods, indent=1))
        return 0

    from rich.table import Table

    from lightning_accel.cli.terminal import make_console

    table = Table(show_lines=True, header_style="bold")
    for title in ("Method, and where to read on", "What it does", "Touches", "Acts", "Expected to change"):
        table.add_column(title, no_wrap=title.startswith("Method"))
    for method in methods:
        table.add_row(
            f"[bold]{method['name']}[/]\n{method['docs']}",
            method["purpose"],
            ", ".join(method["touches"]),
            method["acts"],
            method["expects"],
        )
    make_console().print(table)
    return 0
