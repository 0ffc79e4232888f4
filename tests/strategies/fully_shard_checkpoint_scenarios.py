"""What the tests of FullyShardStrategy's checkpoints run: fits that save, and fits that go on from there.

python -m tests.strategies.fully_shard_checkpoint_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.durability.exact_resume import ExactResume
from lightning_accel.report.sizes import tensor_bytes
from lightning_accel.strategies.sharded_state import shard_state_dict
from tests.strategies.fully_shard_fits import (
    BATCHES,
    RANK,
    WORLD,
    Gan,
    Net,
    SaveAt,
    data,
    fit,
    make_trainer,
    shards,
    weights,
)
from tests.strategies.launch import serve


def optimizer_state(trainer: Trainer) -> list[Any]:
    """Of every optimizer, whole and plain, by parameter number."""
    return [
        {
            index: {
                name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in entries.items()
            }
            for index, entries in optimizer.state_dict()["state"].items()
        }
        for optimizer in trainer.optimizers
    ]


def resumed(
    folder: Path,
    name: str,
    strategy: Callable[[], Any] = shards,
    again: Callable[[], Any] | None = None,
    methods: Callable[[], list[Callback]] = lambda: [ExactResume()],
    at: int = 4,
    **arguments: Any,
) -> dict[str, Any]:
    """A fit that saves on its way, and one that goes on from there with other weights and random numbers."""
    path = folder / name
    trainer, _, plain = fit(strategy(), callbacks=lambda: [*methods(), SaveAt(path, at)], **arguments)
    states = optimizer_state(trainer)
    trainer, _, result = fit((again or strategy)(), callbacks=methods, ckpt_path=path, seed=77, **arguments)
    return {"plain": plain, "resumed": result, "states": [states, optimizer_state(trainer)], "at": at}


one_file = partial(shards, save_distributed_checkpoint=False)


def elsewhere(folder: Path, name: str) -> dict[str, Any]:
    """Go on, on another number of ranks, from what :func:`resumed` saved; the whole batch is the same."""
    return fit(shards(), ckpt_path=folder / name, seed=78, module=partial(Net, "adamw", "LambdaLR"))[2]


def evaluated(folder: Path) -> dict[str, Any]:
    """Evaluate a module from its checkpoint, with one that was made anew and with the same Trainer."""
    path = folder / "evaluated"
    trainer, module, result = fit(shards(), callbacks=lambda: [SaveAt(path, 2 * BATCHES)])
    same = [trainer.validate(module, data(16), verbose=False)[0]["val_loss"]]
    same.append(trainer.test(module, data(16), ckpt_path=path, verbose=False)[0]["val_loss"])
    torch.manual_seed(55)
    other = Net()
    trainer = make_trainer(shards())
    same.append(trainer.validate(other, data(16), ckpt_path=path, verbose=False)[0]["val_loss"])
    trainer = make_trainer(shards(blocks=["Block", "stem"]))
    same.append(trainer.test(Net(), data(16), ckpt_path=path, verbose=False)[0]["val_loss"])
    predicted = [
        torch.cat(make_trainer(strategy).predict(fresh, data(16), ckpt_path=where))  # type: ignore[arg-type]
        for strategy, fresh, where in ((shards(), Net(), path), (shards(), module, None))
    ]
    return {"same": same, "predicted": predicted, "weights": weights(other), "trained": result["weights"]}


def checkpoints(folder: Path) -> dict[str, Any]:
    """What a ModelCheckpoint leaves on the disk."""
    saving = ModelCheckpoint(folder / "top", save_top_k=2, monitor="val_loss", mode="min", every_n_train_steps=2)
    fit(shards(), callbacks=lambda: [saving], val_check_interval=2)
    left = sorted(path.name for path in (folder / "top").iterdir())
    best = Net()
    make_trainer(shards()).validate(best, data(16), ckpt_path=saving.best_model_path, verbose=False)
    return {"left": left, "kept": sorted(Path(path).name for path in saving.best_k_models), "best": best.evaluated}


def second_fit(folder: Path) -> dict[str, Any]:
    """The same module again, in a second Trainer; and a fit after one that an exception ended in the middle."""
    _, module, _ = fit(shards(), max_epochs=1)
    trainer = make_trainer(shards())
    trainer.fit(module, data(), data(16))
    _, ddp, _ = fit("ddp", max_epochs=1)
    make_trainer("ddp").fit(ddp, data(), data(16))
    return {"sharded": [module.losses, weights(module)], "ddp": [ddp.losses, weights(ddp)]}


class Stops(Callback):
    """Raises in the middle of a forward, or of a backward, in the second batch of a window."""

    def __init__(self, backward: bool) -> None:
        self.backward = backward

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            layer = pl_module.blocks[1].norm
            self.handle = (layer.register_full_backward_hook if self.backward else layer.register_forward_hook)(
                self.stop
            )

    def stop(self, *_: Any) -> None:
        self.handle.remove()
        raise ValueError("stopped")


def after_an_exception(folder: Path) -> dict[str, Any]:
    """Fits of a module in which another one stopped, from the weights that it began with."""
    losses = []
    for backward in (False, True):
        torch.manual_seed(1)
        module = Net("sgd")
        before = weights(module)
        with contextlib.suppress(ValueError):
            make_trainer(shards(), [Stops(backward)], accumulate_grad_batches=2).fit(module, data(), data(16))
        module.load_state_dict(shard_state_dict(before, module))
        module.losses.clear()
        make_trainer(shards(), accumulate_grad_batches=2).fit(module, data(), data(16))
        losses.append(module.losses)
    plain = fit("ddp", module=partial(Net, "sgd"), accumulate_grad_batches=2)[2]
    return {"ddp": plain["losses"], "sharded": losses}


def uneven(folder: Path) -> dict[str, Any]:
    """Predict what does not divide by the ranks: 13 samples, so that rank 0 has a batch more."""
    torch.manual_seed(1)
    module, x = Net(), torch.randn(13, 8)
    trainer = make_trainer(shards(), use_distributed_sampler=True)
    batches = trainer.predict(module, DataLoader(TensorDataset(x), 2))
    assert batches is not None
    torch.manual_seed(1)
    expected = Net()(x[RANK::WORLD]).detach()
    return {"batches": len(batches), "difference": (torch.cat(batches) - expected).abs().max()}  # type: ignore[arg-type]


CHECKPOINTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "in an epoch": partial(resumed, name="in_an_epoch", module=partial(Net, "adamw", "LambdaLR")),
    "between epochs": partial(
        resumed, name="between_epochs", module=partial(Net, "adamw", "LambdaLR"), methods=list, at=0
    ),
    "in a window": partial(resumed, name="in_a_window", module=partial(Net, "sgd"), at=3, accumulate_grad_batches=2),
    "in a window of ours": partial(
        resumed,
        name="in_a_window_of_ours",
        at=9,
        methods=lambda: [ExactResume(), GradientAccumulation({0: 2, 1: 3})],
    ),
    "scalar in a window": partial(
        resumed, name="scalar", module=partial(Net, extra="temperature"), at=3, accumulate_grad_batches=2
    ),
    "bf16 in a window": partial(
        resumed,
        name="bf16",
        strategy=partial(shards, param_dtype="bfloat16", reduce_dtype="float32"),
        at=3,
        accumulate_grad_batches=2,
        precision="bf16-mixed",
    ),
    "gan in a window": partial(resumed, name="gan", module=Gan, at=3),
    "batch norm in an epoch": partial(resumed, name="batch_norm", module=partial(Net, extra="batchnorm")),
    "one file": partial(resumed, name="one.ckpt", strategy=one_file),
    "from ddp": partial(resumed, name="ddp.ckpt", strategy=lambda: "ddp", again=shards),
    "to ddp": partial(resumed, name="to_ddp.ckpt", strategy=one_file, again=lambda: "ddp"),
    "evaluated": evaluated,
    "checkpoints": checkpoints,
    "second fit": second_fit,
    "uneven": uneven,
    "after an exception": after_an_exception,
}


class Held(Callback):
    """Bytes that this rank holds when the optimizer steps, and after it."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.bytes["gradients"] = _local_bytes(parameter.grad for parameter in pl_module.parameters())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.bytes["parameters"] = _local_bytes(pl_module.parameters())
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self.bytes["optimizer"] = _local_bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))


def _local_bytes(tensors: Any) -> int:
    return tensor_bytes(tensor.to_local() for tensor in tensors)  # gradients reduced together share their memory


def held(folder: Path) -> dict[str, Any]:
    """What a rank holds, and how many parameters there are."""
    found = {}
    for precision in ("32-true", "bf16-true"):
        watch = Held()
        fit(shards(), callbacks=lambda watch=watch: [watch], max_steps=2, precision=precision)  # type: ignore[misc]
        found[precision] = watch.bytes
    return {**found, "parameters": sum(parameter.numel() for parameter in Net().parameters())}


OTHERS: dict[str, Callable[[Path], Any]] = {
    "held": held,
    "from two": partial(elsewhere, name="../two/between_epochs"),
    "from one": partial(elsewhere, name="../one/between_epochs"),
}


if __name__ == "__main__":
    serve({**CHECKPOINTS, **OTHERS})
