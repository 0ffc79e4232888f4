from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from lightning_accel import errors
from lightning_accel.errors import (
    NoEffectWarning,
    check_bytes,
    check_choice,
    check_fraction,
    check_int,
    check_number,
    check_patterns,
    matches_any,
    require,
)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: check_int("size", 2.0), TypeError, "Expected `size` to be an int, but got 2.0."),
        (lambda: check_int("size", True), TypeError, "Expected `size` to be an int, but got True."),
        (lambda: check_int("size", "3", 0), TypeError, "Expected `size` to be an int of at least 0, but got '3'."),
        (lambda: check_int("size", None), TypeError, "Expected `size` to be an int, but got None."),
        (
            lambda: check_int("size", -1, minimum=0),
            ValueError,
            "Expected `size` to be an int of at least 0, but got -1.",
        ),
        (lambda: check_fraction("amount", 1.3), ValueError, "Expected `amount` to be in [0, 1], but got 1.3."),
        (lambda: check_fraction("amount", -1e-9), ValueError, "Expected `amount` to be in [0, 1], but got -1e-09."),
        (lambda: check_fraction("amount", math.nan), ValueError, "Expected `amount` to be in [0, 1], but got nan."),
        (lambda: check_fraction("amount", "a"), TypeError, "Expected `amount` to be a number in [0, 1], but got 'a'."),
        (
            lambda: check_fraction("amount", True),
            TypeError,
            "Expected `amount` to be a number in [0, 1], but got True.",
        ),
        (lambda: check_number("x", 0, 0, 2, open_low=True), ValueError, "Expected `x` to be in (0, 2], but got 0."),
        (lambda: check_number("x", 2, 0, 2, open_high=True), ValueError, "Expected `x` to be in [0, 2), but got 2."),
        (
            lambda: check_number("x", math.inf, 0, math.inf, open_high=True),
            ValueError,
            "Expected `x` to be in [0, inf), but got inf.",
        ),
        (
            lambda: check_choice("scope", "all", ["global", "layer"]),
            ValueError,
            "Expected `scope` to be one of 'global', 'layer', but got 'all'.",
        ),
        (
            lambda: check_bytes("memory", "8 gallons"),
            ValueError,
            "Expected `memory` to be a number of bytes or a size like '8GiB', but got '8 gallons'.",
        ),
        (
            lambda: check_bytes("memory", "0GiB"),
            ValueError,
            "Expected `memory` to be a number of bytes or a size like '8GiB', but got '0GiB'.",
        ),
        (lambda: check_bytes("memory", 0.5), TypeError, "Expected `memory` to be an int of at least 1, but got 0.5."),
        (
            lambda: check_choice("bits", 16, (4, 8)),
            ValueError,
            "Expected `bits` to be one of 4, 8, but got 16.",
        ),
        (
            lambda: check_patterns("include", "weight"),
            TypeError,
            "Expected `include` to be a list of regular expressions, but got 'weight'.",
        ),
        (
            lambda: check_patterns("include", 3),
            TypeError,
            "Expected `include` to be a list of regular expressions, but got 3.",
        ),
        (
            lambda: check_patterns("include", ["a", 3]),
            TypeError,
            "Expected `include` to be a list of regular expressions, but one of them is 3.",
        ),
        (
            lambda: check_patterns("include", ["("]),
            ValueError,
            "Expected `include` to hold valid regular expressions, but got '(' "
            "(missing ), unterminated subpattern at position 0).",
        ),
        (
            lambda: require("no_such_package.inner", "kornia", "Augmentation on the device"),
            ImportError,
            "Augmentation on the device needs the package `no_such_package`: pip install 'lightning-accel[kornia]'.",
        ),
    ],
)
def test_each_error_is_one_sentence(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == sentence


def test_what_is_right_is_returned() -> None:
    assert check_int("size", 0, minimum=0) == 0
    assert check_int("size", -5) == -5
    assert [check_fraction("amount", value) for value in (0, 1, 0.5)] == [0.0, 1.0, 0.5]
    assert isinstance(check_fraction("amount", 1), float)
    assert check_number("x", math.inf, 0, math.inf) == math.inf
    assert check_number("x", 1e-300, 0, 2, open_low=True) == 1e-300
    assert check_choice("scope", "layer", ["global", "layer"]) == "layer"
    assert check_patterns("include", []) == ()
    assert require("math", "none", "Counting") is math


def test_patterns_are_found_anywhere_in_a_name() -> None:
    patterns = check_patterns("include", ["^head", r"norm\d"])
    assert all(isinstance(pattern, re.Pattern) for pattern in patterns)
    assert matches_any(patterns, "head.weight")
    assert matches_any(patterns, "layers.0.norm1.bias")
    assert not matches_any(patterns, "layers.head.weight")
    assert not matches_any((), "head.weight")
    assert not matches_any(check_patterns("include", ("x",)), "head")


def test_a_broken_optional_package_shows_why() -> None:
    with pytest.raises(ImportError) as caught:
        require("no_such_package", "kornia", "It")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_the_warning_is_a_user_warning_and_public() -> None:
    import lightning_accel

    assert issubclass(NoEffectWarning, UserWarning)
    assert lightning_accel.NoEffectWarning is NoEffectWarning
    assert sorted(errors.__all__, key=str.lower) == sorted(
        ["NoEffectWarning", "matches_any", "parse_bytes", "require"]
        + [name for name in vars(errors) if name.startswith("check_")],
        key=str.lower,
    )


def test_sizes_in_bytes() -> None:
    given = [check_bytes("memory", value) for value in (7, "7B", "1.5 KiB", "2MB", " 8GiB ", "1TB")]
    assert given == [7, 7, 1536, 2_000_000, 8 * 2**30, 10**12]
