"""Durations and value schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel.schedules import (
    SCHEDULES,
    Duration,
    FitLength,
    Moment,
    exponential,
    interval_progress,
    one_cycle,
    step,
    value_at,
)

progresses = st.floats(0, 1)
values = st.floats(-1e6, 1e6)
MONOTONE = sorted(set(SCHEDULES) - {"one_cycle", "exponential"})
LENGTH = FitLength(steps=100, batches=200, epochs=10)


def at(step: int, fit: float | None = None) -> Moment:
    """A fit of 100 steps, 200 batches and 10 epochs, after ``step`` steps."""
    return Moment(step=step, batch=2 * step, epoch=step / 10, fit=fit)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("500step", 500, "step"),
        ("500 steps", 500, "step"),
        (" 200batch ", 200, "batch"),
        ("200batches", 200, "batch"),
        ("1e3step", 1000, "step"),
        ("10epoch", 10, "epoch"),
        ("0.5 epochs", 0.5, "epoch"),
        ("0.3fit", 0.3, "fit"),
        (".3fit", 0.3, "fit"),
        ("0fit", 0, "fit"),
        ("1fit", 1, "fit"),
        (7, 7, "step"),
        ("7", 7, "step"),
        (Duration(2, "epoch"), 2, "epoch"),
    ],
)
def test_parse(text, value, unit):
    assert Duration.parse("start", text) == Duration(value, unit)


def test_a_bare_number_is_in_the_default_unit():
    assert (
        Duration.parse("start", 3, default_unit="epoch")
        == Duration.parse("start", "3", "epoch")
        == Duration(3, "epoch")
    )


@pytest.mark.parametrize(
    "value", ["1.3fit", "-0.1fit", "nanfit", "-1step", "1.5step", "0.5batch", "-1epoch", "1e999epoch"]
)
@pytest.mark.parametrize("name", ["start", "end"])
def test_a_value_that_does_not_suit_its_unit(name, value):
    with pytest.raises(ValueError, match=rf"^Expected `{name}` to be .*, but got '{value}'\.$"):
        Duration.parse(name, value)


@pytest.mark.parametrize("value", ["", "step", "5 weeks", "half", "5stepp", "0.3 fitness", "5step 3batch", "10%"])
def test_text_that_is_no_duration(value):
    with pytest.raises(
        ValueError, match=r"^Expected `every` to be a duration such as '500step'.* or an int, but got '"
    ):
        Duration.parse("every", value)


@pytest.mark.parametrize("value", [0.3, None, True, [5], {"step": 5}])
def test_a_type_that_is_no_duration(value):
    with pytest.raises(TypeError, match=r"^Expected `every` to be a duration such as '500step'.* or an int, but got "):
        Duration.parse("every", value)


def test_the_constructor_checks_too():
    with pytest.raises(
        ValueError, match=r"^Expected `unit` to be one of 'step', 'batch', 'epoch', 'fit', but got 'week'\.$"
    ):
        Duration(1, "week")
    with pytest.raises(ValueError, match=r"^Expected `value` to be in \[0, 1\] of the fit, but got 2\.$"):
        Duration(2, "fit")
    with pytest.raises(TypeError, match=r"^Expected `value` to be a number, but got '2'\.$"):
        Duration("2", "step")


@given(
    st.one_of(
        st.builds(Duration, st.integers(0, 10**12), st.sampled_from(["step", "batch"])),
        st.builds(Duration, st.floats(0, 1e9), st.just("epoch")),
        st.builds(Duration, st.floats(0, 1), st.just("fit")),
    )
)
def test_text_round_trips(duration):
    assert Duration.parse("start", str(duration)) == duration


def test_elapsed_and_reached_use_the_own_unit():
    moment = Moment(step=5, batch=12, epoch=1.5, fit=0.25)
    assert [Duration(1, unit).elapsed(moment) for unit in ("step", "batch", "epoch", "fit")] == [5, 12, 1.5, 0.25]
    for text, reached in [
        ("5step", True),
        ("6step", False),
        ("12batch", True),
        ("13batch", False),
        ("1.5epoch", True),
        ("1.6epoch", False),
        ("0.25fit", True),
        ("0.26fit", False),
    ]:
        assert Duration.parse("start", text).reached(moment) is reached, text


def test_reached_forgives_one_rounding():
    assert 0.1 + 0.2 > 0.3
    assert Duration(0.1 + 0.2, "epoch").reached(Moment(0, 0, 0.3, None))


def test_a_fit_without_an_end_is_a_clear_error():
    endless = Moment(step=5, batch=5, epoch=1.0, fit=None)
    with pytest.raises(ValueError, match=r"place '0\.3fit' in it, but this fit has none.*max_steps"):
        Duration(0.3, "fit").reached(endless)
    with pytest.raises(ValueError, match="place '5step' in it"):
        Duration(5, "step").fraction(FitLength(steps=None, batches=None, epochs=None))
    with pytest.raises(ValueError, match="place '5epoch' in it"):
        Duration(5, "epoch").fraction(FitLength(steps=None, batches=None, epochs=math.inf))


def test_fraction_of_the_fit():
    for text, fraction in [("50step", 0.5), ("50batch", 0.25), ("1epoch", 0.1), ("0.7fit", 0.7), ("200step", 2.0)]:
        assert Duration.parse("start", text).fraction(LENGTH) == fraction, text
    assert Duration(0, "step").fraction(FitLength(0, 0, 0)) == 0
    assert Duration(1, "step").fraction(FitLength(0, 0, 0)) == 1


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("20step", "60step"),
        ("40batch", "120batch"),
        ("2epoch", "6epoch"),
        ("0.2fit", "0.6fit"),
        ("20step", "0.6fit"),
        ("0.2fit", "6epoch"),
        ("2epoch", "120batch"),
    ],
)
def test_progress_is_the_same_in_every_unit(start, end):
    start, end = Duration.parse("start", start), Duration.parse("end", end)
    progress = [interval_progress(at(now, fit=now / 100), start, end, LENGTH) for now in (0, 20, 30, 40, 60, 90)]
    assert progress == pytest.approx([0, 0, 0.25, 0.5, 1, 1])
    assert progress[1] == 0 and progress[4] == 1, "the ends are exact"


def test_one_unit_needs_no_end_of_the_fit():
    unknown = FitLength(None, None, None)
    assert interval_progress(at(30), Duration(20, "step"), Duration(40, "step"), unknown) == 0.5
    with pytest.raises(ValueError, match="max_steps"):
        interval_progress(at(30), Duration(20, "step"), Duration(6, "epoch"), unknown)


def test_an_empty_interval_jumps():
    start = end = Duration(20, "step")
    assert [interval_progress(at(now), start, end, LENGTH) for now in (19, 20, 21)] == [0, 1, 1]


@given(
    st.integers(0, 120),
    st.integers(0, 120),
    st.sampled_from(["step", "batch", "epoch"]),
    st.sampled_from(["step", "fit"]),
)
def test_progress_is_monotone_and_bounded(first, second, start_unit, end_unit):
    start = Duration({"step": 20, "batch": 40, "epoch": 2}[start_unit], start_unit)
    end = Duration({"step": 90, "fit": 0.9}[end_unit], end_unit)
    low, high = (
        interval_progress(at(now, fit=min(now / 100, 1)), start, end, LENGTH) for now in sorted((first, second))
    )
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"constant", "exponential"}))
@given(start=values, end=values)
def test_endpoints_are_exact(name, start, end):
    assert value_at(name, 0, start, end) == start
    assert value_at(name, 1, start, end) == end


@given(progresses, values, values)
def test_constant_is_the_end_value(progress, start, end):
    assert value_at("constant", progress, start, end) == end


@pytest.mark.parametrize("name", MONOTONE)
@given(first=progresses, second=progresses, start=values, end=values)
def test_monotone_and_bounded(name, first, second, start, end):
    low, high = (value_at(name, progress, start, end) for progress in sorted((first, second)))
    assert min(start, end) <= low <= max(start, end)
    # libm's cos and pow may err by one unit in the last place.
    slack = 1e-15 * abs(end - start)
    assert low <= high + slack if start <= end else low + slack >= high


@given(progresses, progresses, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.sampled_from([1, -1]))
def test_exponential(first, second, start, end, sign):
    start, end = sign * start, sign * end
    low, high = (exponential(progress, start, end) for progress in sorted((first, second)))
    assert exponential(0, start, end) == start and exponential(1, start, end) == end
    assert min(start, end) <= low <= max(start, end)
    assert low <= high * (1 + sign * 1e-14) if start <= end else low >= high * (1 - sign * 1e-14)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("linear", {}, [0.2, 0.4, 0.6]),
        ("cosine", {}, [(1 - math.sqrt(0.5)) * 0.4, 0.4, (1 + math.sqrt(0.5)) * 0.4]),
        ("cubic", {}, [0.8 * (1 - 0.75**3), 0.7, 0.8 * (1 - 0.25**3)]),
        ("polynomial", {"power": 1}, [0.2, 0.4, 0.6]),
        ("polynomial", {}, [0.8 * (1 - 0.75**2), 0.6, 0.8 * (1 - 0.25**2)]),
        ("polynomial", {"power": 3}, [0.8 * (1 - 0.75**3), 0.7, 0.8 * (1 - 0.25**3)]),
        ("step", {"num_steps": 2}, [0, 0.4, 0.4]),
        ("step", {"milestones": [0.25, 0.3, 0.75]}, [0.8 / 3, 1.6 / 3, 0.8]),
        ("one_cycle", {"peak": 1.0, "warm": 0.5}, [0.5, 1.0, 0.9]),
        (
            "one_cycle",
            {"peak": 1.0, "warm": 0.0},
            [1 - 0.2 * (1 - math.sqrt(0.5)) / 2, 0.9, 0.8 + 0.2 * (1 - math.sqrt(0.5)) / 2],
        ),
    ],
)
def test_known_values(name, options, expected):
    got = [value_at(name, progress, 0.0, 0.8, **options) for progress in (0.25, 0.5, 0.75)]
    assert got == pytest.approx(expected)


def test_known_values_of_exponential():
    assert [value_at("exponential", progress, 1.0, 16.0) for progress in (0.25, 0.5, 0.75)] == pytest.approx([2, 4, 8])


@given(progresses, values, values, values, st.floats(0, 0.99))
def test_one_cycle_stays_between_its_three_values(progress, start, end, peak, warm):
    value = one_cycle(progress, start, end, peak=peak, warm=warm)
    assert min(start, end, peak) <= value <= max(start, end, peak)
    assert one_cycle(warm, start, end, peak=peak, warm=warm) == peak


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_outside_0_to_1(name, progress):
    with pytest.raises(ValueError, match=r"^Expected `progress` to be in \[0, 1\], but got "):
        value_at(name, progress, 1.0, 2.0)


def test_bad_schedule_arguments():
    with pytest.raises(ValueError, match=r"^Expected `schedule` to be one of 'constant', .*, but got 'cubical'\.$"):
        value_at("cubical", 0.5, 0, 1)
    with pytest.raises(ValueError, match=r"both above or both below 0, but got 0\.0 and 1\.0"):
        value_at("exponential", 0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"`power` to be in \(0, inf\), but got 0"):
        value_at("polynomial", 0.5, 0.0, 1.0, power=0)
    with pytest.raises(ValueError, match=r"`warm` to be in \[0, 1\), but got 1"):
        value_at("one_cycle", 0.5, 0.0, 1.0, warm=1)
    with pytest.raises(ValueError, match="`num_steps` to be an int of at least 1, but got 0"):
        value_at("step", 0.5, 0.0, 1.0, num_steps=0)
    with pytest.raises(TypeError, match="power"):
        value_at("linear", 0.5, 0.0, 1.0, power=2)


@pytest.mark.parametrize("milestones", [[], [0.0, 0.5], [0.5, 0.5], [0.5, 0.2], [0.5, 1.1]])
def test_bad_milestones(milestones):
    with pytest.raises(ValueError, match=r"^Expected `milestones` to be increasing numbers in \(0, 1\], but got \["):
        step(0.5, 0.0, 1.0, milestones=milestones)
