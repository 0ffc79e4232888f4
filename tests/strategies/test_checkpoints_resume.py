"""Sharded checkpoints go on at any number of ranks and any stage, and become one plain file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_accel.cli.main import main
from lightning_accel.hooks.atomic import find_damage, is_complete
from tests.strategies.checkpoint_runs import FEWER, FOUR, MORE, SAME, VARIANTS, runs
from tests.strategies.checkpoint_scenarios import Net
from tests.strategies.launch import outcome

__all__ = ["runs"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sharded_checkpoints"), pytest.mark.timeout(900)]


def pair(runs: Path, ranks: str, name: str) -> tuple[Any, Any]:
    """What a resumed run gave, and the uninterrupted one that it goes on from."""
    _, _, optimizer, _, source, count = name.split("-")
    source = source.removeprefix("plain")
    return outcome(runs / ranks, name), outcome(
        runs / ("one" if count == "1" else "two"), f"whole-{source}-{optimizer}"
    )


@pytest.mark.parametrize("name", SAME)
def test_the_same_number_of_ranks_is_exact_at_every_stage_and_from_ddp(runs: Path, name: str) -> None:
    resumed, whole = pair(runs, "two", name)
    # FSDP2 reduces in another order than DDP
    tolerance = 1e-6 if "fsdp2-sgd-from-ddp" in name else 0
    torch.testing.assert_close(resumed["losses"], whole["losses"][4:], rtol=0, atol=tolerance)
    assert resumed["rates"] == whole["rates"][8:]
    assert resumed["batches"] == whole["batches"] == 8 and resumed["step"] == whole["step"]
    for key, value in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][key], value, rtol=0, atol=tolerance)


ELSEWHERE = [*(("one", name) for name in FEWER), *(("two_again", name) for name in MORE), *(("four", n) for n in FOUR)]


@pytest.mark.parametrize(("ranks", "name"), ELSEWHERE)
def test_another_number_of_ranks_gives_the_same_losses(runs: Path, ranks: str, name: str) -> None:
    resumed, whole = pair(runs, ranks, name)
    torch.testing.assert_close(resumed["losses"], whole["losses"][4:], rtol=0, atol=1e-6)
    assert resumed["rates"] == whole["rates"][8:] and resumed["step"] == whole["step"]
    for key, value in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["1-adamw", "3-adamw", "2-sgd", "fsdp2-sgd", *(f"{kind}-adamw" for kind in VARIANTS)])
def test_consolidated_files_have_the_saved_weights(runs: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    path = runs / "saved" / f"{name}-2-epoch=1.ckpt"  # of the end of the run
    weights = outcome(runs / "two", f"whole-{name}")["weights"]
    for out in ("a.ckpt", "a.safetensors"):
        assert main(["consolidate", str(path), str(tmp_path / out)]) == 0
        assert is_complete(tmp_path / out)
    module = Net.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert module.hparams["optimizer"] == name.partition("-")[2]
    for state in (module.state_dict(), load_file(tmp_path / "a.safetensors")):
        assert state.keys() == weights.keys()
        # in bf16-true the file has ZeRO's fp32 masters, of which the weights are the rounded ones
        assert all(torch.equal(state[key].to(value.dtype), value) for key, value in weights.items())
    plain = torch.load(tmp_path / "a.ckpt", weights_only=True)
    tied = [plain["state_dict"][f"{layer}.weight"].data_ptr() for layer in ("one", "two")]
    assert tied[0] == tied[1]
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(plain["optimizer_states"][0])  # the groups fit


@pytest.mark.parametrize(("kind", "ranks", "tolerance"), [("2", "two_again", 0), ("fsdp2", "four", 1e-6)])
def test_a_rank_killed_in_a_save(runs: Path, kind: str, ranks: str, tolerance: float) -> None:
    """The other one stops; the checkpoint before is whole, is the one that is found, and ends where no kill does."""
    died = runs / ("two" if kind == "2" else "two_again")
    assert "Rank 1 (process" in (died / f"killed-{kind}.0.error").read_text()
    assert not (died / f"killed-{kind}.1.error").exists()
    revived, whole = outcome(runs / ranks, f"revived-{kind}"), outcome(runs / "two", f"whole-{kind}-adamw")
    assert len(revived["losses"]) == 4  # it went on from step 4
    for key, value in whole["weights"].items():
        torch.testing.assert_close(revived["weights"][key], value, rtol=0, atol=tolerance)
    assert revived["left"] == ["step=4.ckpt", "step=8.ckpt"]
    for path in (runs / "saved" / f"killed-{kind}").iterdir():
        assert find_damage(path) == []
