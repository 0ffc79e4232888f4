"""Warnings and argument checks with the one sentence shape that every error of this package has.

Every check raises ``ValueError`` (wrong value) or ``TypeError`` (wrong type) that names the argument, what was expected
and what came: ``Expected `amount` to be in [0, 1], but got 1.3.``
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any

__all__ = [
    "NoEffectWarning",
    "check_bytes",
    "check_choice",
    "check_fraction",
    "check_int",
    "check_number",
    "check_patterns",
    "matches_any",
    "parse_bytes",
    "require",
]

_UNITS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


class NoEffectWarning(UserWarning):
    """A method was asked for but found nothing to act on, so this run is a plain run in that respect."""


def check_int(name: str, value: Any, minimum: int | None = None) -> int:
    """Return ``value`` if it is an ``int`` (not a ``bool``) of at least ``minimum``.

    Raises:
        TypeError: If it is not an ``int``.
        ValueError: If it is below ``minimum``.
    """
    bound = "" if minimum is None else f" of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected `{name}` to be an int{bound}, but got {value!r}.")
    if minimum is not None and value < minimum:
        raise ValueError(f"Expected `{name}` to be an int{bound}, but got {value!r}.")
    return value


def check_number(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> float:
    """Return ``value`` as a float if it is a real number in the interval from ``low`` to ``high``.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it lies outside the interval, or is NaN.
    """
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected `{name}` to be a number in {interval}, but got {value!r}.")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        raise ValueError(f"Expected `{name}` to be in {interval}, but got {value!r}.")
    return float(value)


def check_fraction(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is in [0, 1]; raise as :func:`check_number` does."""
    return check_number(name, value, 0, 1)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}.")
    return value


def parse_bytes(text: str) -> int | None:
    """The bytes of a size such as "80GiB" or "24 GB"; None where it is not one above 0."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    return int(float(found[1]) * _UNITS[found[2]]) or None if found and found[2] in _UNITS else None


def check_bytes(name: str, value: Any) -> int:
    """Return the bytes that ``value`` says, as an ``int`` or as a size such as "8GiB".

    Raises:
        TypeError: If it is neither.
        ValueError: If it is below 1, or the unit is missing or unknown.
    """
    if not isinstance(value, str):
        return check_int(name, value, minimum=1)
    if (size := parse_bytes(value)) is None:
        raise ValueError(f"Expected `{name}` to be a number of bytes or a size like '8GiB', but got {value!r}.")
    return size


def check_patterns(name: str, patterns: Any) -> tuple[re.Pattern[str], ...]:
    """Compile a list of regular expressions.

    Raises:
        TypeError: If ``patterns`` is not a list of strings. One bare string is refused: it would be read letter by
            letter.
        ValueError: If one of them is not a valid regular expression.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise TypeError(f"Expected `{name}` to be a list of regular expressions, but got {patterns!r}.")
    compiled = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"Expected `{name}` to be a list of regular expressions, but one of them is {pattern!r}.")
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"Expected `{name}` to hold valid regular expressions, but got {pattern!r} ({error})."
            ) from None
    return tuple(compiled)


def matches_any(patterns: Iterable[re.Pattern[str]], text: str) -> bool:
    """Whether one of ``patterns`` is found anywhere in ``text`` (``re.search``)."""
    return any(pattern.search(text) for pattern in patterns)


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        ImportError: If it is not installed, naming what needs it and the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package `{module.split('.')[0]}`: pip install 'lightning-accel[{extra}]'."
        ) from error
