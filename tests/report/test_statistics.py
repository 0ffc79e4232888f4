from __future__ import annotations

import math

import pytest

from lightning_accel.report.statistics import Estimate, compute_verdict, difference, mean, ratio, t_quantile


@pytest.mark.parametrize(
    ("dof", "expected"),  # from any printed table
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantile(dof: int, expected: float) -> None:
    assert t_quantile(dof) == pytest.approx(expected, abs=6e-4)


def test_t_quantile_at_another_confidence() -> None:
    assert t_quantile(2, 0.9) == pytest.approx(2.920, abs=6e-4)


def test_mean_by_hand() -> None:
    # 1, 2, 3: mean 2, standard deviation 1, standard error 1 / sqrt(3)
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert found.count == 3


def test_mean_of_one_has_no_interval() -> None:
    assert mean([4.0]) == Estimate(4.0, None, None, 1)


def test_equal_values_have_an_empty_interval() -> None:
    assert mean([0.1, 0.1, 0.1]) == Estimate(0.1, 0.1, 0.1, 3)


def test_ratio_is_paired() -> None:
    # Each pair halves exactly, however different the pairs are.
    found = ratio([1.0, 10.0, 100.0], [0.5, 5.0, 50.0])
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(0.5)
    assert found.high - found.low < 1e-12


def test_ratio_is_symmetric() -> None:
    a, b = [1.0, 2.0, 4.0], [3.0, 5.0, 9.0]
    forth, back = ratio(a, b), ratio(b, a)
    assert forth is not None and back is not None and back.high is not None
    assert forth.value == pytest.approx(1 / back.value)
    assert forth.low == pytest.approx(1 / back.high)


def test_ratio_by_hand() -> None:
    # log ratios 0 and log 4: their mean is log 2, their standard error is log 4 / 2
    found = ratio([1.0, 1.0], [1.0, 4.0])
    assert found is not None
    assert found.value == pytest.approx(2.0)
    assert found.high == pytest.approx(2 * math.exp(12.7062 * math.log(4) / 2), rel=1e-4)


@pytest.mark.parametrize("other", [[0.0], [-1.0], [math.nan], [math.inf]])
def test_no_ratio(other: list[float]) -> None:
    assert ratio([1.0], other) is None


def test_no_pair() -> None:
    assert ratio([], []) is None
    assert difference([], []) is None


def test_difference_of_negative_numbers() -> None:
    found = difference([-2.0, -3.0], [-1.0, -2.0])
    assert found == Estimate(1.0, 1.0, 1.0, 2)


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (0.5, 0.9, "lower", "better"),
        (0.5, 0.9, "higher", "worse"),
        (1.1, 1.3, "lower", "worse"),
        (1.1, 1.3, "higher", "better"),
        (0.9, 1.1, "lower", "no effect"),
        (1.0, 1.2, "higher", "no effect"),
        (None, None, "lower", "not enough seeds"),
        (0.5, 0.9, None, ""),
    ],
)
def test_verdict(low: float | None, high: float | None, better: str | None, expected: str) -> None:
    assert compute_verdict(Estimate(1.0, low, high, 3), 1.0, better) == expected  # type: ignore[arg-type]


def test_verdict_margin() -> None:
    sure = Estimate(1.001, 1.001, 1.001, 3)
    assert compute_verdict(sure, 1.0, "lower") == "worse"
    assert compute_verdict(sure, 1.0, "lower", 0.005) == "no effect"
    assert compute_verdict(Estimate(0.99, 0.99, 0.99, 3), 1.0, "lower", 0.005) == "better"


def test_no_change_no_verdict() -> None:
    assert compute_verdict(None, 1.0, "lower") == ""
