"""What the tests of sharded checkpoints in use run: evaluation, what ModelCheckpoint keeps, damage, kills.

python -m tests.strategies.checkpoint_use_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_accel import AutoResume
from lightning_accel.strategies import fully_shard_checkpoints, zero_checkpoints
from tests.strategies import checkpoint_scenarios
from tests.strategies.checkpoint_scenarios import WORLD, Net, fit, loader, make_trainer
from tests.strategies.launch import serve

RANK = int(os.environ.get("RANK", "0"))


class Scored(Net):
    """With a metric that is the same for any number of ranks, and what it was after each step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: dict[str, float] = {}

    def on_validation_epoch_end(self) -> None:
        self.seen[f"step={self.trainer.global_step}.ckpt"] = float(self.trainer.callback_metrics["val"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)
        self.log("away", abs(self.trainer.global_step - 5.0))  # so the best is neither the first nor the last


def validate(trainer: Trainer, module: Any, path: Any) -> float:
    return float(trainer.validate(module, loader(), ckpt_path=path, verbose=False)[0]["val"])


def test(trainer: Trainer, module: Any, path: Any) -> float:
    return float(trainer.test(module, loader(), ckpt_path=path, verbose=False)[0]["test"])


def predict(trainer: Trainer, module: Any, path: Any) -> float:
    """The same metric, of the predictions of all ranks."""
    data: Any = loader()
    predicted: Any = trainer.predict(module, data, ckpt_path=path)
    own = torch.stack([nn.functional.cross_entropy(p, y) for p, (_, y) in zip(predicted, data, strict=True)]).mean()
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, float(own))
    return float(sum(every) / WORLD)


def listed(folder: Path) -> list[str]:
    dist.barrier()  # rank 0 may still remove something
    return sorted(path.name for path in folder.iterdir())


def message(function: Callable[[], Any]) -> str:
    """Of the error that it raises, with its type; of no error nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def used(kind: str) -> Callable[[Path], Any]:
    """A fit that keeps the best two and the last, then every way to evaluate them."""

    def scenario(folder: Path) -> Any:
        seed_everything(1, verbose=False)
        top = folder / f"top-{kind}"
        keep = ModelCheckpoint(
            top, filename="{step}", monitor="away", save_top_k=2, save_last=True, every_n_train_steps=1
        )
        trainer, module = make_trainer(kind, keep, val_check_interval=1), Scored()
        trainer.fit(module, loader(), loader())
        best = keep.best_model_path
        result: dict[str, Any] = {
            "left": listed(top),
            "kept": sorted([*(Path(path).name for path in keep.best_k_models), "last.ckpt"]),
            "last": [module.seen["step=8.ckpt"], test(trainer, module, None), test(trainer, module, "last")],
            "best": [module.seen[Path(best).name], validate(trainer, module, "best"), predict(trainer, module, "best")],
        }
        torch.manual_seed(7)
        fresh = Scored()
        result["last"].append(predict(make_trainer(kind), fresh, top / "last.ckpt"))
        result["count"] = fresh.count.tolist()
        return result

    return scenario


def scored(kind: str, source: str) -> Callable[[Path], Any]:
    """Evaluate the last one of two ranks of that kind, and what is said of it."""

    def scenario(folder: Path) -> Any:
        module = fully_shard_checkpoints if kind == "fsdp2" else zero_checkpoints
        with mock.patch.object(module, "rank_zero_info") as said:
            score = test(make_trainer(kind), Scored(), folder.parent / "two" / f"top-{source}" / "last.ckpt")
        return {"score": score, "said": [call.args[0] for call in said.call_args_list]}

    return scenario


def kept(kind: str) -> Callable[[Path], Any]:
    """A link to the last one, and checkpoints of weights alone."""

    def scenario(folder: Path) -> Any:
        seed_everything(1, verbose=False)
        result: dict[str, Any] = {}
        options: dict[str, Any] = {"link": {"save_last": "link"}, "weights": {"save_weights_only": True}}
        for name, option in options.items():
            top = folder / f"{name}-{kind}"
            keep = ModelCheckpoint(top, filename="{step}", every_n_train_steps=2, monitor="step", mode="max", **option)
            trainer, module = make_trainer(kind, keep), Scored()
            trainer.fit(module, loader())
            result[name] = listed(top)
        result["scores"] = [test(trainer, module, None), test(make_trainer(kind), Scored(), keep.best_model_path)]
        last = folder / f"link-{kind}" / "last.ckpt"
        result["link to"] = os.readlink(last)
        linked = make_trainer(kind, max_epochs=3)
        linked.fit(Scored(), loader(), ckpt_path=last)
        result["steps of link"] = linked.global_step
        path = keep.best_model_path
        result["fit of weights"] = message(lambda: make_trainer(kind).fit(Scored(), loader(), ckpt_path=path))
        return result

    return scenario


# ------------------------------------------------------------------------------------------------------------ damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# A shard of rank 1, what is not sharded, and what is read first
ZERO = ("checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt", "checkpoint/*mp_rank_00_model_states.pt", "latest")
FSDP2 = ("__1_0.distcp", "meta.pt", ".metadata")
DAMAGE: dict[str, tuple[int, Callable[[Path], None]]] = {
    "truncated": (0, truncate),
    "changed": (0, flip),
    "missing": (0, Path.unlink),
    "rest changed": (1, flip),
    "rest missing": (1, Path.unlink),
    "first missing": (2, Path.unlink),
    "no manifest": (3, Path.unlink),
    "bad manifest": (3, truncate),
}


def damaged(kind: str) -> Callable[[Path], Any]:
    """What is said of each damage; every rank must say something."""

    def scenario(folder: Path) -> Any:
        seed_everything(1, verbose=False)
        keep = ModelCheckpoint(folder / f"damaged-{kind}", filename="whole", every_n_train_steps=2)
        make_trainer(kind, keep, max_steps=2).fit(Scored(), loader())
        whole = Path(keep.best_model_path)
        files = (*(FSDP2 if kind == "fsdp2" else ZERO), "manifest.json")

        def said(path: Path, module: Any = None) -> str:
            return message(lambda: test(make_trainer(kind), module or Scored(), path))

        result = {}
        for name, (which, spoil) in DAMAGE.items():
            path = whole.parent / f"{name}.ckpt"
            if RANK == 0:
                shutil.copytree(whole, path)
                spoil(next(iter(sorted(path.glob(files[which])))))
            dist.barrier()
            result[name] = said(path)
        changed = whole.parent / "changed.ckpt"
        result["fit"] = message(lambda: make_trainer(kind).fit(Scored(), loader(), ckpt_path=changed))
        result["absent"] = said(whole.parent / "absent.ckpt")
        result["above"] = said(whole.parent)
        result["other module"] = said(whole, Scored(width=12))
        if kind == "fsdp2":
            result["other kind"] = said(folder / "damaged-2" / "whole.ckpt")
        result["whole"] = said(whole)
        result["different"] = message(lambda: make_trainer(kind).fit(Scored(width=11 + RANK), loader()))
        return result

    return scenario


class Full(Callback):
    """Leaves rank 1 without room on its disk, in the second save."""

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (1, 4):
            torch.save = self.fail

    def fail(self, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")


def full(kind: str) -> Callable[[Path], Any]:
    """A fit that ends because one rank can't write."""

    def scenario(folder: Path) -> Any:
        keep = ModelCheckpoint(folder / f"full-{kind}", filename="{step}", every_n_train_steps=2)
        save = torch.save
        try:
            said = message(lambda: make_trainer(kind, keep, Full()).fit(Scored(), loader()))
        finally:
            torch.save = save
        return {"said": said, "left": listed(folder / f"full-{kind}")}

    return scenario


# ------------------------------------------------------------------------------------------------------------- kills


class Kill(Callback):
    """Ends a rank by SIGKILL in the middle of its first file of a save."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            torch.save = self.write_half

    def write_half(self, value: Any, file: Any, *_: Any, **__: Any) -> None:
        with open(file, "wb") if isinstance(file, Path) else file as stream:
            stream.write(b"half")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def saving(kind: str, folder: Path, *callbacks: Callback) -> Any:
    """Two epochs, saved at the end of each."""
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    return fit(kind, "adamw", callbacks=[AutoResume(), keep, *callbacks])


def killed(kind: str) -> Callable[[Path], Any]:
    """A fit that loses rank 1 in its second save."""
    return lambda folder: saving(kind, folder.parent / "saved" / f"killed-{kind}", Kill(1, 8))


def revived(kind: str) -> Callable[[Path], Any]:
    """The same again, which goes on by itself."""

    def scenario(folder: Path) -> Any:
        top = folder.parent / "saved" / f"killed-{kind}"
        leftovers = list(top.glob(".*.partial"))
        return {**saving(kind, top), "leftovers": len(leftovers), "left": listed(top)}

    return scenario


FIND: dict[str, Callable[..., Callable[[Path], Any]]] = {
    "used": used,
    "scored": scored,
    "kept": kept,
    "damaged": damaged,
    "full": full,
    "killed": killed,
    "revived": revived,
}


def find(name: str) -> Callable[[Path], Any]:
    """``used-KIND``, ``scored-KIND-SOURCE`` ..., or a scenario of the other module."""
    what, *arguments = name.split("-")
    scenario: Callable[[Path], Any] = FIND[what](*arguments) if what in FIND else checkpoint_scenarios.find(name)
    return scenario


if __name__ == "__main__":
    serve({name: find(name) for name in sys.argv[2:]})
