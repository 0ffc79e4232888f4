"""A module whose memory runs out on demand, and what the tests of MicroBatching ask of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_accel.accumulation.micro_batching import MicroBatching

WIDTH = 4


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """So many inputs and targets; the last input is the sample's number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    x[:, -1] = torch.arange(count) / 100
    return x, torch.randn(count, 1, generator=generator)


@dataclass
class Shortage:
    """Memory for so many samples at once, in some batches."""

    samples: int
    batches: tuple[int, ...] | None = None
    """The numbers of the batches in the epoch; None: in all."""
    backward: bool = False
    """Whether it runs out in the backward."""
    last: bool = False
    """Whether it runs out in the last micro-batch alone."""
    error: Callable[[], BaseException] = field(default=lambda: torch.OutOfMemoryError("CUDA out of memory"))
    raised: int = 0
    """How often it ran out."""


class Net(LightningModule):
    """A regression with dropout; its memory runs out where it is told to."""

    def __init__(self, shortage: Shortage | None = None, dropout: float = 0.2, configure: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.body = nn.Linear(WIDTH, 6)
            self.head = nn.Linear(6, 1)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))
        self.shortage, self.configure = shortage, configure
        self.seen: dict[str, list[int]] = {"samples": []}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.body(x))))  # type: ignore[no-any-return]

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int, scale: float = 1.0) -> Any:
        self.calls += 1
        self.seen["samples"] += [round(100 * float(x)) for x in batch[0][:, -1]]
        output = self(batch[0] * scale)
        self.run_short(output, batch, batch_idx)
        loss = (output - batch[1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "output": output}

    def run_short(self, output: Tensor, batch: Any, batch_idx: int) -> None:
        shortage = self.shortage
        if shortage is None or len(batch[0]) <= shortage.samples:
            return
        if shortage.batches is not None and batch_idx not in shortage.batches:
            return
        if shortage.last and not torch.equal(batch[0][-1], self.last_of_batch):
            return

        def fail(_: Any) -> None:
            shortage.raised += 1
            raise shortage.error()

        if shortage.backward:
            output.register_hook(fail)  # type: ignore[no-untyped-call]
        else:
            fail(None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.last_of_batch = batch[0][-1]

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watch(Callback):
    """What the fit showed after each batch."""

    def __init__(self, sizes: list[int | None] | None = None) -> None:
        self.given = sizes
        self.sizes: list[int | None] = []
        self.losses: list[float] = []
        self.logged: list[float] = []
        self.hooks: dict[str, int] = {}
        self.shapes: list[list[int]] = []
        self._size: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the size of this batch from the start, where sizes are given."""
        if self.given is not None:
            micro(trainer)._attempts.sizes.size = self.given[len(self.sizes)]  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.sizes.append(self._size)
        self.losses.append(float(outputs["loss"]))
        self.shapes.append(list(outputs["output"].shape))
        self.logged.append(float(trainer.callback_metrics["loss_step"]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch = float(trainer.callback_metrics["loss_epoch"])

    def count(self, name: str) -> None:
        self.hooks[name] = self.hooks.get(name, 0) + 1

    def on_before_zero_grad(self, *_: Any) -> None:
        self.count("before_zero_grad")

    def on_before_backward(self, *_: Any) -> None:
        self.count("before_backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.count("after_backward")
        self._size = micro(trainer).size if micro(trainer) else None  # the last time is that of the step that is kept


def micro(trainer: Trainer) -> Any:
    return next((c for c in trainer.callbacks if isinstance(c, MicroBatching)), None)  # type: ignore[attr-defined]


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()
