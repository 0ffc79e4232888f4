"""The example's own measurement of a small model, by the bytes of tensors: the same on every machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.language_model.model import GPT
from examples.low_memory.measure import GIVE_BACK, SIDES, alone, count_table, measure, predict, process_table

FOLDER = Path("examples/low_memory")
SIZES: dict[str, Any] = {"width": 128, "depth": 2, "length": 16}
SMALL = [
    *(f"--model.{name}={value}" for name, value in SIZES.items()),
    *("--data.length=16", "--data.num_bytes=20000", "--trainer.max_steps=3"),
]
# bytes of state a parameter whose moments are in few bits: codes, and a scale for each block of 256 or 128
LOW_BIT = {"8-bit": 2 * (1 + 4 / 256), "4-bit": 2 * (1 / 2 + 4 / 128), "fp8": 2 * (1 + 4 / 256), "bf16": 4.0}
IN_8_BITS = ("8-bit", "8-bit in backward", "all together")


@pytest.fixture(autouse=True)
def from_the_root(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


@pytest.fixture(scope="module")
def measured(repo: Path) -> dict[str, dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        found = {side: measure(side, SMALL, count=True) for side in SIDES}
    return {side: {**values, "peak": values["peak"] / values["parameters"]} for side, values in found.items()}


def test_each_file_is_a_side_and_adds_callbacks_alone() -> None:
    files = {path.as_posix() for path in FOLDER.glob("*.yaml")} - {f"{FOLDER}/plain.yaml"}
    assert files == {word for words in SIDES.values() for word in words if word.endswith(".yaml")}
    for file in files:
        added = yaml.safe_load(Path(file).read_text())
        assert list(added) == ["trainer"] and list(added["trainer"]) == ["callbacks+"]
        assert f"`{Path(file).name}`" in (FOLDER / "README.md").read_text()
    assert "lightning_accel" not in re.sub("#.*", "", (FOLDER / "plain.yaml").read_text())


def test_each_step_takes_its_part_away(measured: dict[str, dict[str, float]]) -> None:
    parameters = [parameter.numel() for parameter in GPT(**SIZES).parameters()]
    largest = max(parameters) / sum(parameters)
    peak = {side: values["peak"] for side, values in measured.items()}
    assert peak["plain"] == peak["fused"]  # the copies in the step are less than the activations
    for side, other in (("fused", "in backward"), ("8-bit", "8-bit in backward")):
        assert peak[side] - peak[other] == pytest.approx(1 - largest, abs=0.01)  # all gradients but one
    for side in LOW_BIT:
        saved = (measured["fused"]["state"] - measured[side]["state"]) / 4
        assert peak["fused"] - peak[side] == pytest.approx(saved, abs=0.01)
    activations = {name: peak[name] - 1 - measured[name]["state"] / 4 for name in ("fused", "micro-batched")}
    assert activations["micro-batched"] < activations["fused"] / 8 + largest + 0.2  # and the gradient that is made
    order = ["plain", "in backward", "8-bit", "8-bit in backward", "micro-batched", "all together"]
    assert [peak[side] for side in order] == sorted((peak[side] for side in order), reverse=True)


def test_state_is_that_of_its_bits(measured: dict[str, dict[str, float]]) -> None:
    net = GPT(**SIZES)
    kept = {net.tokens.weight, net.positions.weight, *(item for item in net.parameters() if item.numel() < 4096)}
    in_32 = sum(parameter.numel() for parameter in kept)
    total = sum(parameter.numel() for parameter in net.parameters())
    for side, bytes_each in LOW_BIT.items():
        expected = (8 * in_32 + bytes_each * (total - in_32)) / total
        assert measured[side]["state"] == pytest.approx(expected, rel=1e-3)
    for side in IN_8_BITS:
        assert measured[side]["state"] == measured["8-bit"]["state"]


def test_the_maths_is_the_same(measured: dict[str, dict[str, float]]) -> None:
    loss = {side: values["loss"] for side, values in measured.items()}
    for side in ("fused", "in backward", "micro-batched"):
        assert loss[side] == pytest.approx(loss["plain"], rel=1e-6)
    for side in IN_8_BITS:
        assert loss[side] == pytest.approx(loss["8-bit"], rel=1e-6)
    assert loss["in backward"] == loss["fused"] and loss["8-bit in backward"] == loss["8-bit"]
    assert 0 < abs(loss["8-bit"] - loss["fused"]) < 1e-4


@pytest.mark.parametrize("side", SIDES)
def test_the_plan_tells_it_before(side: str, measured: dict[str, dict[str, float]]) -> None:
    theory = predict(side, SMALL)
    assert theory["state"] == pytest.approx(measured[side]["state"] / 4, rel=1e-3)
    # it adds what passes in the backward pass to the last step's gradients, which are gone by then
    least = 0.995 if side in ("micro-batched", "all together") else 0.955
    assert least * theory["total"] < measured[side]["peak"] < 1.005 * theory["total"]


def test_the_table_has_what_was_measured(measured: dict[str, dict[str, float]]) -> None:
    head, _, row = count_table(["all together"], SMALL)
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert float(cells["measured"]) == pytest.approx(measured["all together"]["peak"], abs=0.006)
    assert float(cells["theory"]) == pytest.approx(
        sum(float(cells[name]) for name in ("state", "gradients", "activations")), abs=0.02
    )


def test_times_are_compared_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1, 2, 9, 3, 2, 3])  # of two sides, which change places each round

    def alone(side: str, extra: list[str], **environment: str) -> dict[str, float]:
        return {"parameters": 10, "peak": 20, "seconds": 0 if environment else next(seconds)}

    monkeypatch.setattr("examples.low_memory.measure.alone", alone)
    *_, plain, other = process_table(["plain", "8-bit"], [], rounds=3)
    assert plain == "| plain | 2.00 | 2.00 | 2.00 | 1.00 | 1.00 to 1.00 |"
    assert other == "| 8-bit | 2.00 | 2.00 | 3.00 | 2.00 | 1.50 to 3.00 |"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_of_its_own() -> None:
    found = alone("8-bit", SMALL, **GIVE_BACK)
    assert found["peak"] > found["parameters"] and found["seconds"] > 0
    assert not GIVE_BACK.keys() & os.environ.keys()
