"""The console that all commands print to."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

__all__ = ["make_console"]


def make_console(file: TextIO | None = None) -> Console:
    """Return a console; one that is not a terminal (a file, a pipe) is wide enough for the tables."""
    console = Console(file=file, highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=max(console.width, 140))
