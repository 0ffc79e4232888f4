from __future__ import annotations

import json
import math

import pytest

from lightning_accel.report.receipt import Receipt, Row, choose_metric, make_receipt
from lightning_accel.report.record import SIDES, Point, Run, guess_direction
from tests.report.synthetic import make_run


def row(receipt: Receipt, key: str) -> Row:
    return next(row for row in receipt.rows if row.key == key)


def pairs(count: int = 3, **accelerated: object) -> list[Run]:
    runs = []
    for seed in range(count):
        runs += [make_run("plain", seed), make_run("accelerated", seed, **accelerated)]
    return runs


def test_run_comes_back_from_json() -> None:
    run = make_run("plain", 3, sources={"model.py": "abc"}, data="digits")
    assert Run.from_dict(json.loads(json.dumps(run.to_dict(), allow_nan=False))) == run


def test_numbers_that_are_not_finite_survive_standard_json() -> None:
    run = make_run("plain", 0, metrics={"val_loss": math.nan}, history={"val_loss": [Point(1.0, 1, 0, math.inf)]})
    back = Run.from_dict(json.loads(json.dumps(run.to_dict(), allow_nan=False)))
    assert math.isnan(back.metrics["val_loss"])
    assert math.isnan(back.history["val_loss"][0].value)


@pytest.mark.parametrize("data", [{}, [], {"side": "plain"}, {"side": "plain", "seed": 0, "status": "x", "history": 3}])
def test_not_a_run(data: object) -> None:
    with pytest.raises(ValueError, match="Expected the record of a run"):
        Run.from_dict(data)  # type: ignore[arg-type]


def test_receipt_comes_back_from_json() -> None:
    receipt = make_receipt(
        pairs(2, seconds_fit=1.5), command="x", sides={"plain": "a", "accelerated": "b"}, notes=["n"]
    )
    text = receipt.to_json()
    assert Receipt.from_json(text) == receipt
    assert json.loads(text)["version"] == 1


def test_receipt_of_another_version_is_refused() -> None:
    data = {**json.loads(make_receipt(pairs(1)).to_json()), "version": 99}
    with pytest.raises(ValueError, match="version 1, but got version 99"):
        Receipt.from_json(json.dumps(data))
    with pytest.raises(ValueError, match="something else"):
        Receipt.from_json("[]")


def test_times_and_sizes() -> None:
    receipt = make_receipt(pairs(3, seconds_fit=1.5, optimizer_state_bytes=2_000, nonzeros=200))
    time = row(receipt, "seconds_fit")
    assert time.change is not None and time.change.value == pytest.approx(0.5)
    assert time.verdict == "better"
    assert row(receipt, "optimizer_state_bytes").change.value == pytest.approx(0.25)  # type: ignore[union-attr]
    assert row(receipt, "nonzeros").verdict == "better"
    assert row(receipt, "parameters").verdict == "no effect"


def test_losses_are_told() -> None:
    receipt = make_receipt(pairs(3, seconds_fit=4.5, accuracies=[0.5, 0.6, 0.7]))
    assert row(receipt, "seconds_fit").verdict == "worse"
    assert row(receipt, "metric:val_acc").verdict == "worse"
    assert row(receipt, "metric:val_loss").verdict == "worse"


def test_one_seed_is_not_enough() -> None:
    receipt = make_receipt(pairs(1, seconds_fit=0.1))
    assert {row.verdict for row in receipt.rows} == {"not enough seeds"}


def test_noise_has_no_effect() -> None:
    runs = [make_run("plain", 0), make_run("accelerated", 0, seconds_fit=2.0)]
    runs += [make_run("plain", 1), make_run("accelerated", 1, seconds_fit=4.5)]
    assert row(make_receipt(runs), "seconds_fit").verdict == "no effect"


def test_default_target_is_what_the_weaker_side_reaches_on_average() -> None:
    runs = [make_run("plain", seed, accuracies=[0.5, best]) for seed, best in enumerate((0.8, 0.9))]
    runs += [make_run("accelerated", seed, accuracies=[0.5, 0.95]) for seed in range(2)]
    assert make_receipt(runs).target == pytest.approx(0.85)
    losses = make_receipt(runs, metric="val_loss")
    assert losses.better == "lower"
    assert losses.target == pytest.approx(0.15)


def test_time_to_target_by_hand() -> None:
    # Three validations, at 1, 2 and 3 s plain and at 0.5, 1 and 1.5 s accelerated; 0.8 is reached at the second.
    time = row(make_receipt(pairs(3, seconds_fit=1.5), metric="val_acc", target=0.8), "seconds_to_target")
    assert time.plain is not None and time.plain.value == pytest.approx(2.0)
    assert time.accelerated is not None and time.accelerated.value == pytest.approx(1.0)
    assert time.verdict == "better"
    assert time.note == ""


def test_plain_never_gets_there() -> None:
    # Counting the plain runs at their whole 3 s understates the gain, so "better" is sound.
    receipt = make_receipt(pairs(3, seconds_fit=1.5, accuracies=[0.5, 0.95]), metric="val_acc", target=0.93)
    time = row(receipt, "seconds_to_target")
    assert time.verdict == "better"
    assert "3 of 3 plain runs never got there" in time.note


@pytest.mark.parametrize(("seconds", "verdict"), [(1.5, "not reached"), (6.0, "worse")])
def test_accelerated_never_gets_there(seconds: float, verdict: str) -> None:
    # A run that gave up early looks fast: "better" would be wrong. One that took longer all the same is worse.
    receipt = make_receipt(pairs(3, seconds_fit=seconds, accuracies=[0.5, 0.6]), metric="val_acc", target=0.9)
    assert row(receipt, "seconds_to_target").verdict == verdict


def test_nobody_gets_there() -> None:
    receipt = make_receipt(pairs(3, seconds_fit=1.0), metric="val_acc", target=0.99)
    assert row(receipt, "seconds_to_target").verdict == "not reached"


def test_negative_metric_gets_a_difference() -> None:
    runs = []
    for seed in range(2):
        runs.append(make_run("plain", seed, metrics={"elbo": -10.0}, monitored=["elbo"]))
        runs.append(make_run("accelerated", seed, metrics={"elbo": -8.0}, monitored=["elbo"]))
    elbo = row(make_receipt(runs), "metric:elbo")
    assert (elbo.kind, elbo.verdict) == ("difference", "better")
    assert elbo.change is not None and elbo.change.value == 2.0


def test_nothing_on_both_sides() -> None:
    receipt = make_receipt(
        [make_run(side, seed, optimizer_state_bytes=0) for side in ("plain", "accelerated") for seed in (0, 1)]
    )  # type: ignore[arg-type]
    assert row(receipt, "optimizer_state_bytes").verdict == "no effect"


def test_failed_and_unpaired_runs() -> None:
    runs = [*pairs(2), make_run("plain", 2, seconds_fit=9.0), Run("accelerated", 2, "failed", error="boom")]
    receipt = make_receipt(runs)
    time = row(receipt, "seconds_fit")
    assert time.plain is not None and time.plain.count == 3
    assert time.change is not None and time.change.count == 2
    assert any("Failed and left out: accelerated-seed2." in note for note in receipt.notes)
    assert any("not in the ratios: seed 2" in note for note in receipt.notes)


def test_no_metric_and_training_metric_are_noted() -> None:
    silent = make_receipt(
        [make_run("plain", 0, metrics={}, monitored=[]), make_run("accelerated", 0, metrics={}, monitored=[])]
    )
    assert silent.metric == "" and silent.target is None
    assert any("logged no metric" in note for note in silent.notes)
    trained = make_receipt([make_run(side, 0, monitored=[]) for side in SIDES], metric="train_loss")
    assert any("add a validation loop" in note for note in trained.notes)


def test_changed_code_and_machines_are_noted() -> None:
    runs = [
        make_run("plain", 0, sources={"m.py": "a"}),
        make_run("accelerated", 0, sources={"m.py": "b"}, environment={}),
    ]
    notes = " ".join(make_receipt(runs).notes)
    assert "The code changed while the runs were made" in notes and "m.py" in notes
    assert "different environments" in notes


def test_choose_metric() -> None:
    assert choose_metric([make_run("plain", 0)]) == "val_acc"  # before val_loss, which was logged first
    assert choose_metric([make_run("plain", 0, monitored=[])]) == "val_acc"
    assert choose_metric([make_run("plain", 0), make_run("plain", 1, metrics={"val_loss": 1.0})]) == "val_loss"
    assert choose_metric([]) == ""


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("val_acc", "higher"),
        ("val/F1", "higher"),
        ("valid_map", "higher"),
        ("val_loss", "lower"),
        ("val/valloss", "lower"),
        ("test-WER", "lower"),
        ("val_perplexity", "lower"),
        ("mean_error", "lower"),
    ],
)
def test_guess_direction(metric: str, expected: str) -> None:
    assert guess_direction(metric) == expected
