"""ZeROStrategy against DDP: the same losses, weights, rates and steps; what it refuses; what it leaves behind."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_accel.strategies.zero_checks import STALE_SECONDS, find_build_locks
from tests.conformance.processes import made_once
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("zero"), pytest.mark.timeout(400)]

EXACT = [
    "sgd",
    "adamw",
    "lion",
    "clip_value",
    "lambda",
    "one_cycle",
    "plateau",
    "sequential",
    "two_schedulers",
    "tied",
    "bf16-mixed",
    "bf16-true",
    "offload",
    "augmentation",
    "pruning",
    "pruning_lion",
]
CLOSE = [  # sums in another order, or clipping by a norm summed in another order
    "accumulation",
    "changing_factor",
    "unknown_length",
    "clip_norm",
    "clips_itself",
    "manual",
    "discards",
    "frozen",
    "branches",
    "branches_offload",
    "fused",
    "kernel",
]
OTHERS = ["evaluation", "trained_later", "infinite", "second_trainer", "refused"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [*EXACT, *CLOSE, *OTHERS]
    return made_once(tmp_path_factory, "zero", lambda folder: launch("tests.strategies.zero_scenarios", folder, names))


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_the_same_numbers_as_ddp(runs: Path, name: str) -> None:
    tolerance = 0.0 if name in EXACT else 1e-5
    for rank in (0, 1):
        found = outcome(runs, name, rank)
        first, *stages = found
        reference = found[first]
        assert len(stages) >= 1 and len(reference["losses"]) == 16
        assert len(set(reference["losses"])) == 16  # it does learn
        for stage in stages:
            run = found[stage]
            assert run["step"] == reference["step"]
            for key in ("losses", "rates", "validation", "logged"):
                if key != "rates" or name != "frozen":  # there the groups of the optimizer are others
                    assert run[key] == pytest.approx(reference[key], abs=tolerance, rel=0), (stage, key)
            for key, value in reference["weights"].items():
                torch.testing.assert_close(run["weights"][key], value, atol=tolerance, rtol=0, msg=f"{stage} {key}")
                assert torch.equal(run["after"][key], run["weights"][key]), "the module is whole after the fit"


def test_bfloat16_is_what_it_says(runs: Path) -> None:
    full, mixed, true = (outcome(runs, name)["1"]["losses"][1:] for name in ("sgd", "bf16-mixed", "bf16-true"))
    assert full != mixed != true != full
    assert full == pytest.approx(mixed, abs=0.3) and full == pytest.approx(true, abs=0.3)


def test_pruning_reaches_its_amount_at_stages_1_and_2(runs: Path) -> None:
    for stage in ("1", "2"):
        weights = outcome(runs, "pruning", 1)[stage]["weights"]
        pruned = [value for name, value in weights.items() if value.dim() == 2]
        assert sum(int((value == 0).sum()) for value in pruned) == round(0.5 * sum(map(torch.numel, pruned)))


def test_evaluation_at_every_stage_and_a_module_left_whole(runs: Path) -> None:
    for rank in (0, 1):
        found = outcome(runs, "evaluation", rank)
        for stage in ("1", "2", "3"):
            for key in ("values", "predictions"):
                torch.testing.assert_close(found[stage][key], found["ddp"][key], atol=1e-6, rtol=0)
            # the module's own hook, none of DeepSpeed's; it was called; torch's own linear is back
            assert found[stage]["left"] == [1, 1, 1]


def test_parameters_that_are_unfrozen_later_are_trained_as_in_plain_torch(runs: Path) -> None:
    found = outcome(runs, "trained_later")
    for stage in ("1", "2", "3"):
        assert found[stage]["losses"] == pytest.approx(found["plain"]["losses"], abs=1e-5)
        for key, value in found["plain"]["weights"].items():
            torch.testing.assert_close(found[stage]["weights"][key], value, atol=1e-5, rtol=0)


def test_a_second_trainer_after_the_process_group_is_gone(runs: Path) -> None:
    first, *others = outcome(runs, "second_trainer")
    assert all(other == first for other in others)


def test_a_step_that_deepspeed_leaves_out_is_said(runs: Path) -> None:
    assert outcome(runs, "infinite", 0) == {"said": 1, "finite": True}


REFUSED = {
    "no_compiler": "It needs a C++ compiler",
    "lock": "remove it with `rm ",
    "shape": "parameter 5 is 'net.3.bias (3,) torch.float32 trained' on rank 0 and 'nothing more' on rank 1",
    "more": "parameter 6 is 'nothing more' on rank 0 and 'more.weight (2, 2) torch.float32 trained' on rank 1",
    "several": "`configure_optimizers` returned 2. Make them parameter groups of one, or use strategy='accel_fsdp2'",
    "none": "`configure_optimizers` returned none",
    "lbfgs": "LBFGS evaluates the loss several times in a step",
    "skips": "training_step",
    "float16": "does not support on the CPU. Use precision='bf16-mixed'",
    "unfrozen": "'first.weight' was unfrozen after training had started",
    "frozen_later": "'net.0.weight' was frozen after training had started",
    "pruning": "GradualPruning can't work with ZeROStrategy at stage 3",
    "low_bit": "LowBitOptimizer can't work with ZeROStrategy",
    "pattern": "`trained_later` 'thrid' matches no frozen parameter",
    "quantized": "has for CUDA alone, but this run is on the CPU",
    "zenflow": "ZenFlow has windows of its own",
    "precision_plugin": "can't work with MixedPrecision",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_on_every_rank(runs: Path, what: str) -> None:
    for rank in (0, 1):
        assert REFUSED[what] in outcome(runs, "refused", rank)[what]


def test_a_fit_after_all_these_errors_works(runs: Path) -> None:
    assert outcome(runs, "refused")["after"] == ""


def test_a_lock_of_a_build_that_goes_on_is_not_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert find_build_locks() == []
    lock = tmp_path / "py311_cpu" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert find_build_locks() == [(lock, False)]
    assert find_build_locks(time.time() + STALE_SECONDS + 60) == [(lock, True)]
    os.utime(lock, (0, 0))
    (lock.parent / "object.o").touch()  # something was written since
    assert find_build_locks() == [(lock, False)]


def test_deepspeed_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_accel.strategies.zero import ZeROStrategy

    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"ZeROStrategy needs .*pip install 'lightning-accel\[deepspeed\]'"):
        ZeROStrategy()


def test_the_accelerator_is_the_cpu_or_cuda() -> None:
    from lightning.pytorch.accelerators import MPSAccelerator

    from lightning_accel.strategies.zero import ZeROStrategy

    strategy: Any = ZeROStrategy()
    strategy.accelerator = MPSAccelerator()
    with pytest.raises(MisconfigurationException, match="the accelerator is MPSAccelerator"):
        strategy.setup_environment()
