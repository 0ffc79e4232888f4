"""The runs that the tests of sharded checkpoints look at: made once, in as few launches of ranks as there can be."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from lightning_accel.strategies.consolidate import consolidate_checkpoint
from tests.conformance.processes import made_once
from tests.strategies.launch import launch

__all__ = ["FEWER", "FOUR", "MORE", "SAME", "VARIANTS", "make_runs"]

MODULE = "tests.strategies.checkpoint_use_scenarios"
VARIANTS = ["2o", "3o", "2b", "3m", "fsdp2o", "fsdp2b"]  # offloaded, bf16-true, bf16-mixed
SAVED = [f"whole-{kind}-adamw" for kind in ("1", "2", "3", "fsdp2", "ddp", *VARIANTS)]
SAVED += [f"whole-{kind}-sgd" for kind in ("2", "fsdp2", "ddp")]
SAME = [
    "resumed-1-adamw-from-1-2",
    "resumed-2-sgd-from-2-2",
    "resumed-3-adamw-from-3-2",
    "resumed-3-adamw-from-2-2",
    "resumed-2-adamw-from-3-2",
    "resumed-3-sgd-from-2-2",
    "resumed-fsdp2-sgd-from-fsdp2-2",
    "resumed-1-adamw-from-ddp-2",
    "resumed-3-adamw-from-ddp-2",
    "resumed-fsdp2-sgd-from-ddp-2",
    *(f"resumed-{kind}-adamw-from-{kind}-2" for kind in VARIANTS),
]
"""Go on at the same number of ranks."""
FEWER = [
    "resumed-1-adamw-from-2-2",
    "resumed-2-sgd-from-2-2",
    "resumed-3-adamw-from-1-2",
    "resumed-2-adamw-from-3-2",
    "resumed-fsdp2-sgd-from-fsdp2-2",
    "resumed-fsdp2-adamw-from-fsdp2-2",
]
MORE = [
    "resumed-2-adamw-from-3-1",
    "resumed-3-adamw-from-3-1",
    "resumed-fsdp2-sgd-from-fsdp2-1",
    # from the plain file that was made of a directory
    "resumed-ddp-adamw-from-plain3-2",
    "resumed-ddp-sgd-from-plainfsdp2-2",
    "resumed-fsdp2-adamw-from-plain3-2",
    "resumed-3-sgd-from-plainfsdp2-2",
]
FOUR = [
    "resumed-1-adamw-from-3-2",
    "resumed-2-sgd-from-2-2",
    "resumed-3-adamw-from-2-2",
    "resumed-fsdp2-sgd-from-fsdp2-2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "sharded_checkpoints", make_runs)


def make_runs(folder: Path) -> None:
    use = [*(f"used-{kind}" for kind in ("1", "2", "3", "fsdp2")), "kept-2", "kept-fsdp2"]
    use += ["damaged-2", "damaged-fsdp2", "full-2", "full-fsdp2"]
    with contextlib.suppress(AssertionError):  # of the rank that is killed
        launch(MODULE, folder / "two", [*SAVED, *SAME, *use, "killed-2"])
    launch(
        MODULE,
        folder / "one",
        ["whole-3-adamw", "whole-fsdp2-sgd", *FEWER, "scored-1-3", "scored-3-2", "scored-fsdp2-fsdp2"],
        ranks=1,
    )
    for kind, optimizer in (("3", "adamw"), ("fsdp2", "sgd")):
        path = folder / "saved" / f"{kind}-{optimizer}-2.ckpt"
        consolidate_checkpoint(path, folder / "saved" / f"plain{kind}-{optimizer}-2.ckpt")
    with contextlib.suppress(AssertionError):
        launch(MODULE, folder / "two_again", [*MORE, "revived-2", "killed-fsdp2"])
    launch(MODULE, folder / "four", [*FOUR, "revived-fsdp2"], ranks=4)
