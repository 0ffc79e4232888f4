"""How the command line says that it was used wrongly."""

from __future__ import annotations

import difflib
from collections.abc import Collection

__all__ = ["UsageError", "suggest"]


class UsageError(ValueError):
    """A sentence for the user of the command line, who needs no traceback."""


def suggest(name: str, choices: Collection[str]) -> str:
    """Return what follows an unknown ``name``: the nearest of ``choices`` as a question, and all of them."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
    question = f" Did you mean {near[0]!r}?" if near else ""
    return f"{question} There are: {', '.join(choices) or 'none'}."
