"""Rows for the wrong methods, to be given to the checks."""

from __future__ import annotations

from typing import Any

from tests.methods import Method, use

__all__ = ["wrong"]


def wrong(name: str, **columns: Any) -> Method:
    """The row of a class of ``wrong_methods``."""
    spec = use(f"tests.conformance.wrong_methods.{name}")
    return Method(**{"name": name, "callbacks": [spec], "neutral": [spec], **columns})
