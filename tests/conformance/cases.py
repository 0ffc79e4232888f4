"""The rows of the table as test parameters, and rows for the wrong methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.methods import METHODS, STACKS, Method, use

__all__ = ["cases", "wrong"]

ALL = [*METHODS, *STACKS]
SAMPLE = [METHODS[0], STACKS[-1]]


def cases(methods: Sequence[Method] = ALL, quick: Sequence[Method] = METHODS) -> list[Any]:
    """Test parameters for rows of the table; those that are not in ``quick`` are left to the full run."""
    return [
        pytest.param(method, id=method.name, marks=[] if method in quick else [pytest.mark.slow]) for method in methods
    ]


def wrong(name: str, **columns: Any) -> Method:
    """The row of a class of ``wrong_methods``."""
    spec = use(f"tests.conformance.wrong_methods.{name}")
    return Method(**{"name": name, "callbacks": [spec], "neutral": [spec], **columns})
