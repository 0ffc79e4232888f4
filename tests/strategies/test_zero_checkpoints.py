"""Checkpoints of ZeROStrategy go on at any number of ranks and any stage, and become one plain file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_accel.cli.main import main
from lightning_accel.hooks.atomic import CheckpointError, is_complete
from lightning_accel.strategies.zero_shards import ZeroShards
from tests.conformance.processes import made_once
from tests.strategies.checkpoint_scenarios import Net
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("zero_checkpoints"), pytest.mark.timeout(400)]

SAVED = ["whole-1-adamw", "whole-2-adamw", "whole-3-adamw", "whole-2-sgd", "whole-ddp-adamw"]
SAME = [
    "resumed-1-adamw-from-1-2",
    "resumed-2-sgd-from-2-2",
    "resumed-3-adamw-from-3-2",
    "resumed-3-adamw-from-2-2",
    "resumed-2-adamw-from-3-2",
    "resumed-3-sgd-from-2-2",
    "resumed-1-adamw-from-ddp-2",
    "resumed-3-adamw-from-ddp-2",
]
FEWER = ["resumed-1-adamw-from-2-2", "resumed-2-sgd-from-2-2", "resumed-3-adamw-from-1-2", "resumed-2-adamw-from-3-2"]
MORE = ["resumed-2-adamw-from-3-1", "resumed-3-adamw-from-3-1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "zero_checkpoints", make_runs)


def make_runs(folder: Path) -> None:
    launch("tests.strategies.checkpoint_scenarios", folder / "two", [*SAVED, *SAME])
    launch("tests.strategies.checkpoint_scenarios", folder / "one", ["whole-3-adamw", *FEWER], ranks=1)
    launch("tests.strategies.checkpoint_scenarios", folder / "two_again", MORE)


def pair(runs: Path, ranks: str, name: str) -> tuple[Any, Any]:
    """What a resumed run gave, and the uninterrupted one on two ranks."""
    _, _, kind, _, source, count = name.split("-")
    reference = "one" if count == "1" else "two"
    return outcome(runs / ranks, name), outcome(runs / reference, f"whole-{source}-{kind}")


@pytest.mark.parametrize("name", SAME)
def test_the_same_number_of_ranks_is_exact_at_every_stage_and_from_ddp(runs: Path, name: str) -> None:
    resumed, whole = pair(runs, "two", name)
    assert torch.equal(resumed["losses"], whole["losses"][4:])
    assert resumed["rates"] == whole["rates"][8:]
    assert resumed["batches"] == whole["batches"] == 8 and resumed["step"] == whole["step"]
    for key, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][key], value), key


@pytest.mark.parametrize(("ranks", "name"), [*(("one", n) for n in FEWER), *(("two_again", n) for n in MORE)])
def test_another_number_of_ranks_gives_the_same_losses(runs: Path, ranks: str, name: str) -> None:
    resumed, whole = pair(runs, ranks, name)
    torch.testing.assert_close(resumed["losses"], whole["losses"][4:], rtol=0, atol=1e-6)
    assert resumed["rates"] == whole["rates"][8:] and resumed["step"] == whole["step"]
    for key, value in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["1-adamw-2", "3-adamw-2", "2-sgd-2"])
def test_consolidated_files_have_the_saved_weights(runs: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    stage, kind, _ = name.split("-")
    path = runs / "saved" / f"{stage}-{kind}-2-epoch=1.ckpt"  # of the end of the run
    weights = outcome(runs / "two", f"whole-{stage}-{kind}")["weights"]
    for out in ("a.ckpt", "a.safetensors"):
        assert main(["consolidate", str(path), str(tmp_path / out)]) == 0
        assert is_complete(tmp_path / out)
    module = Net.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert module.hparams["optimizer"] == kind
    for state in (module.state_dict(), load_file(tmp_path / "a.safetensors")):
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], value) for key, value in weights.items())
    plain = torch.load(tmp_path / "a.ckpt", weights_only=True)
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(plain["optimizer_states"][0])  # the groups fit


def test_damage_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    path = tmp_path / "copy.ckpt"
    shutil.copytree(runs / "saved" / "2-adamw-2.ckpt", path)
    shard = path / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert main(["consolidate", str(path), str(tmp_path / "out.ckpt")]) == 1
    assert f"{shard} is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is missing"):
        ZeroShards(path)
