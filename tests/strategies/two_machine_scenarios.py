"""A rank of a run on two machines, whose cable is pulled while it trains; what it says then.

    RANK=k ... python -m tests.strategies.two_machine_scenarios FOLDER STRATEGY ...

One strategy is run after another in the same processes. Each rank writes its process and step before every batch, and
at the end ``STRATEGY.k.pt``: the error, and when it came.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from tests.cli.tiny import Tiny, TinyData
from tests.strategies.fault_scenarios import RANK, STRATEGIES
from tests.strategies.restart_scenarios import Progress

TIMEOUT = 10
"""Seconds that a collective waits: long enough for a busy machine."""


def pulled(folder: Path, name: str) -> None:
    """Train until something happens, on a machine with one process."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        strategy=STRATEGIES[name](timeout=TIMEOUT),
        max_epochs=-1,
        callbacks=[Progress(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    error = ""
    try:
        trainer.fit(Tiny(wait=0.05), TinyData())
    except Exception as caught:
        error = str(caught)
    torch.save({"error": error, "at": time.time()}, folder / f"{name}.{RANK}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        pulled(Path(sys.argv[1]) / name, name)
        go_on = Path(sys.argv[1]) / name / "repaired"
        while not go_on.exists():
            time.sleep(0.05)
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
