"""Sharded checkpoints are evaluated, kept and removed as plain ones are, and damage is named on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_accel.cli.main import main
from tests.strategies.checkpoint_runs import runs
from tests.strategies.checkpoint_use_scenarios import DAMAGE, FSDP2, ZERO
from tests.strategies.launch import outcome

__all__ = ["runs"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sharded_checkpoints"), pytest.mark.timeout(900)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["1", "2", "3", "fsdp2"])
def test_validate_test_and_predict(runs: Path, kind: str, rank: int) -> None:
    """From "last", "best" and a path, with the trained module and a new one; the metric is that of the weights."""
    result = outcome(runs / "two", f"used-{kind}", rank)
    assert result["last"] == pytest.approx([result["last"][0]] * 4, abs=1e-6)
    assert result["best"] == pytest.approx([result["best"][0]] * 3, abs=1e-6)
    assert abs(result["best"][0] - result["last"][0]) > 0.01
    assert result["count"] == [8.0, 8.0]
    assert result["left"] == result["kept"] and len(result["left"]) == 3


@pytest.mark.parametrize(("name", "source"), [("1-3", "3"), ("3-2", "2"), ("fsdp2-fsdp2", "fsdp2")])
def test_evaluates_at_another_number_of_ranks_and_another_stage(runs: Path, name: str, source: str) -> None:
    here = outcome(runs / "one", f"scored-{name}")
    assert here["score"] == pytest.approx(outcome(runs / "two", f"used-{source}")["last"][0], abs=1e-6)
    stages = ("", "") if source == "fsdp2" else (f" at stage {source}", f" at stage {name[0]}")
    assert len(here["said"]) == 1
    assert f"was saved by 2 rank(s){stages[0]}, this run has 1{stages[1]}: each rank reads the part" in here["said"][0]


@pytest.mark.parametrize("kind", ["2", "fsdp2"])
def test_a_link_and_weights_alone(runs: Path, kind: str) -> None:
    result = outcome(runs / "two", f"kept-{kind}")
    assert result["link"] == ["last.ckpt", "step=8.ckpt"] and result["link to"] == "step=8.ckpt"
    assert result["steps of link"] == 12
    assert result["weights"] == ["step=8.ckpt"]
    assert result["scores"][0] == pytest.approx(result["scores"][1], abs=1e-6)
    assert "save_weights_only" in result["fit of weights"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["2", "fsdp2"])
def test_damage_is_named_on_every_rank(runs: Path, kind: str, rank: int) -> None:
    result = outcome(runs / "two", f"damaged-{kind}", rank)
    top = runs / "two" / f"damaged-{kind}"
    assert result["whole"] == ""
    reasons = {"truncated": "were written.", "changed": "its checksum differs.", "missing": "is missing."}
    reasons |= {"no manifest": "is missing, by which", "bad manifest": "is damaged ("}
    files = [*(FSDP2 if kind == "fsdp2" else ZERO), "manifest.json"]
    for name, (which, _) in DAMAGE.items():
        said, path = result[name], f"{top / name}.ckpt"
        assert said.startswith("CheckpointError: ") and f"{path} is damaged. " in said, name
        assert f"{path}/{files[which].replace('*', '')} " in said, name
        assert next(reason for key, reason in reasons.items() if name.endswith(key)) in said, name
        assert said.count("Copy it again from where it is whole, or use another checkpoint.") == 1, name
    assert result["fit"] == result["changed"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["2", "fsdp2"])
def test_what_is_no_such_checkpoint(runs: Path, kind: str, rank: int) -> None:
    result = outcome(runs / "two", f"damaged-{kind}", rank)
    assert "absent.ckpt does not exist" in result["absent"]
    assert "Give the directory that ModelCheckpoint wrote, not one above or inside it." in result["above"]
    assert "first.weight" in result["other module"] and "(12, 6)" in result["other module"]
    assert "rank 0" in result["different"] and "rank 1" in result["different"] and "(12, 6)" in result["different"]
    if kind == "fsdp2":
        assert "It is one of ZeRO: make a plain file of it" in result["other kind"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["2", "fsdp2"])
def test_one_rank_can_not_write(runs: Path, kind: str, rank: int) -> None:
    """Both stop and say which and why; the checkpoint before stays, and nothing is beside it."""
    result = outcome(runs / "two", f"full-{kind}", rank)
    assert result["said"].startswith("CheckpointError: ") and "step=4.ckpt could not be written" in result["said"]
    assert "rank 1: " in result["said"] and "No space left on device" in result["said"]
    assert result["left"] == ["step=2.ckpt"]


@pytest.mark.parametrize("kind", ["2", "fsdp2"])
@pytest.mark.parametrize("name", DAMAGE)
def test_consolidate_refuses_damage(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    path = runs / "two" / f"damaged-{kind}" / f"{name}.ckpt"
    assert main(["consolidate", str(path), str(tmp_path / "out.ckpt")]) == 1
    expected = outcome(runs / "two", f"damaged-{kind}")[name].partition(f"{path} is damaged. ")[2]
    assert f"{path} is damaged. {expected}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
