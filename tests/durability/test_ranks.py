"""Two gloo ranks: each goes on with its own random state, data and partial gradients."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.durability.runs import differences
from tests.forking import python

TRAIN = """
import os
import sys
import warnings
from pathlib import Path
import torch
from lightning.pytorch import Callback, Trainer
from lightning_accel import ExactResume
from tests.conftest import WEIGHTS_ONLY
from tests.durability import runs

class Rank(Callback):
    def on_train_start(self, trainer, module):
        if not resume:
            torch.manual_seed(100 + trainer.global_rank)  # each rank draws its own dropout

    def on_train_batch_end(self, trainer, module, *_):
        if not resume and trainer.fit_loop.total_batch_idx in (2, 4):  # mid-window, mid-epoch
            trainer.save_checkpoint(folder / f"{trainer.fit_loop.total_batch_idx}.ckpt")

    def on_train_end(self, trainer, module):
        state = {**runs.outcome(trainer, module), "seen": module.seen[-7:]}
        torch.save(state, folder / f"{resume[0] if resume else 'whole'}-{trainer.global_rank}.pt")

folder, resume = Path(sys.argv[1]), sys.argv[2:]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    runs.seed(0 if not resume else 77)
    os.environ["PL_GLOBAL_SEED"] = "77" if resume else "0"  # a new DistributedSampler takes its seed from there
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=4, accumulate_grad_batches=2,
        limit_val_batches=0, callbacks=[ExactResume(), Rank()],
    )
    path = folder / f"{resume[0]}.ckpt" if resume else None
    module = runs.Net()
    module.layers[1] = torch.nn.LayerNorm(8)  # a checkpoint has the batch norm statistics of rank 0 only
    trainer.fit(module, runs.loader(), runs.loader(), ckpt_path=path, **(WEIGHTS_ONLY if resume else {}))
"""


def train(folder: Path, *arguments: str) -> None:
    command = [python(), "-c", TRAIN, str(folder), *arguments]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_rank_goes_on_with_its_own_state(tmp_path: Path) -> None:
    train(tmp_path)
    whole = [torch.load(tmp_path / f"whole-{rank}.pt") for rank in range(2)]
    assert differences(whole[0]["weights"], whole[1]["weights"]) == []
    assert whole[0]["random"] != whole[1]["random"] and whole[0]["seen"] != whole[1]["seen"]
    for batch in ("2", "4"):
        train(tmp_path, batch)
        for rank in range(2):
            found = torch.load(tmp_path / f"{batch}-{rank}.pt")
            assert differences(whole[rank], found) == [], (batch, rank)
