"""What every method is tried on: real digits, a small module that knows nothing of it, and one way to fit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from tests.accelerator import ACCELERATOR
from tests.conformance.compare import assert_equal, differences

EPOCHS, BATCHES, BATCH_SIZE = 3, 9, 8  # an odd number of batches: the last window of two is short


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """88 real 8x8 digits from scikit-learn: (88, 1, 8, 8) in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    count = BATCHES * BATCH_SIZE + 16
    x = torch.tensor(data.images[:count], dtype=torch.float32)[:, None] / 16
    return x, torch.tensor(data.target[:count], dtype=torch.int64)


def train_set() -> TensorDataset:
    x, y = digits()
    return TensorDataset(x[: BATCHES * BATCH_SIZE], y[: BATCHES * BATCH_SIZE])


def val_set() -> TensorDataset:
    x, y = digits()
    return TensorDataset(x[BATCHES * BATCH_SIZE :], y[BATCHES * BATCH_SIZE :])


class DictSet(Dataset[dict[str, Tensor]]):
    """The same samples as dictionaries."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.samples[index]
        return {"x": x, "y": y}


class Stream(IterableDataset[tuple[Tensor, ...]]):
    """The same samples, one after another."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter([self.samples[index] for index in range(len(self.samples))])


class SizedStream(Stream):
    """A stream that knows how long it is."""

    def __len__(self) -> int:
        return len(self.samples)


def train_loader(shuffle: bool = True, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(train_set(), **{"batch_size": BATCH_SIZE, "shuffle": shuffle, **arguments})


def val_loader() -> DataLoader[Any]:
    return DataLoader(val_set(), batch_size=8)


class Digits(LightningModule):
    """Convolution, batch norm, dropout, a large and a small linear layer; its steps are those of any classifier.

    Args:
        regular: Whether it has batch norm and dropout.
        optimizer: ``"adamw"`` or ``"sgd"``.
        scheduler: A name for :func:`make_scheduler`, or ``None``.
        shared: Whether two layers share one weight.
        frozen: Whether the convolution is frozen and left out of the optimizer.
        torchmetric: Whether its accuracy is one of torchmetrics, or a line of torch.
    """

    def __init__(
        self,
        regular: bool = True,
        optimizer: str = "adamw",
        scheduler: str | None = "OneCycleLR",
        shared: bool = False,
        frozen: bool = False,
        torchmetric: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if regular else nn.Identity()
        self.hidden = nn.Linear(128, 32)  # 4096 weights: as many as LowBitOptimizer's default asks for
        self.between = nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        if shared:
            self.again.weight = self.between.weight
        if frozen:
            self.conv.requires_grad_(False)
        self.drop = nn.Dropout(0.2 if regular else 0.0)
        self.head = nn.Linear(32, 10)
        self.accuracy = MulticlassAccuracy(10) if torchmetric else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)  # (B, 8, 4, 4) -> (B, 128)
        x = F.relu(self.hidden(x))
        x = F.relu(self.between(x))
        x = F.relu(self.again(x))
        return self.head(self.drop(x))

    def step(self, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        if self.accuracy is None:
            self.log("accuracy", (logits.argmax(1) == y).float().mean())
        else:
            self.accuracy(logits, y)
            self.log("accuracy", self.accuracy)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self) -> Any:
        return self.configured([parameter for parameter in self.parameters() if parameter.requires_grad])

    def configured(self, parameters: Any) -> Any:
        optimizer: torch.optim.Optimizer
        if self.hparams["optimizer"] == "adamw":
            optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
        else:
            optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        name = self.hparams["scheduler"]
        if name is None:
            return optimizer
        scheduler = make_scheduler(name, optimizer, int(self.trainer.estimated_stepping_batches))
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if name == "ReduceLROnPlateau":
            config = {"scheduler": scheduler, "interval": "epoch", "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def make_scheduler(name: str, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning-rate schedulers that people use; each changes the rate visibly within a few steps."""
    lr = optimizer.param_groups[0]["lr"]
    if name == "LambdaLR":
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if name == "off":
        return lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    if name == "OneCycleLR":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=3 * lr, total_steps=steps + 1)
    if name == "ReduceLROnPlateau":  # nothing is ever an improvement: it reduces at every call but the first
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")
    assert name == "SequentialLR"
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    decay = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - 4))
    return lr_scheduler.SequentialLR(optimizer, [warm_up, decay], milestones=[4])


class UnvalidatedDigits(Digits):
    """Has no validation."""

    validation_step = LightningModule.validation_step


class ManualDigits(Digits):
    """Steps two optimizers by itself."""

    def __init__(self) -> None:
        super().__init__(regular=False, scheduler=None)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(batch)
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        early = [*self.conv.parameters(), *self.hidden.parameters()]
        late = [*self.between.parameters(), *self.again.parameters(), *self.head.parameters()]
        return torch.optim.AdamW(early, lr=3e-3), torch.optim.SGD(late, lr=0.05, momentum=0.9)


def halved(batch: Any) -> Any:
    x, y = batch
    return x * 0.5, y


class HookedDigits(Digits):
    """Has its own batch hook."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return halved(batch)


class DigitsData(LightningDataModule):
    """The same data from a datamodule."""

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return val_loader()


class HookedData(DigitsData):
    """The datamodule owns the batch hook."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return halved(batch)


class InBfloat16(Callback):
    """Trains as under ``Trainer(precision="bf16-true")``: what a method has for parameters in bfloat16 needs them."""

    _before: Any = None

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._before = trainer.strategy.precision_plugin
        trainer.strategy.precision_plugin = HalfPrecision("bf16-true")

    def teardown(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        trainer.strategy.precision_plugin = self._before or trainer.strategy.precision_plugin

    on_exception = teardown


class Recorder(Checkpoint):
    """Saves checkpoints while a run goes on, the last one at its end, and writes down what each batch did.

    A ``Checkpoint``, so that it comes after every method's callback, as ``ModelCheckpoint`` does.

    Args:
        saves: From a path to the hook and the number of training batches done at which it is written.
        final: Where to write the checkpoint at the end of the fit.
    """

    def __init__(self, saves: Mapping[Path, tuple[str, int]] | None = None, final: Path | None = None) -> None:
        super().__init__()
        self.saves = dict(saves or {})
        self.final = final
        self.trace: dict[int, float] = {}
        self.rates: list[tuple[int, float]] = []
        self.moved: list[int] = []
        self._weights: list[Tensor] = []

    def _at(self, trainer: Trainer, hook: str) -> None:
        done = trainer.fit_loop.total_batch_idx + 1
        for path, when in self.saves.items():
            if when == (hook, done) and not trainer.sanity_checking:
                trainer.save_checkpoint(path)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append((trainer.current_epoch, float(optimizer.param_groups[0]["lr"])))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batch_number = trainer.fit_loop.total_batch_idx + 1
        self.trace[batch_number] = float(outputs["loss"])
        if self._look_at(pl_module):
            self.moved.append(batch_number)
        self._at(trainer, "train batch end")

    def _look_at(self, pl_module: LightningModule) -> bool:
        """Whether a weight is another than at the last look."""
        before, self._weights = self._weights, [parameter.detach().clone() for parameter in pl_module.parameters()]
        return any(not torch.equal(a, b) for a, b in zip(before, self._weights, strict=False))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_at(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at(trainer, "validation end")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at(trainer, "train epoch end")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.final is not None:
            trainer.save_checkpoint(self.final)


@dataclass
class Run:
    """What a finished fit left."""

    trainer: Trainer
    final: dict[str, Any]
    """The checkpoint at its end."""
    trace: dict[int, float]
    """The loss of each batch, counted from 1 over all epochs."""
    rates: list[tuple[int, float]]
    """The epoch and the learning rate of each optimizer step."""
    moved: list[int]
    """The batches after which weights were others than before."""

    @property
    def weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self.final["state_dict"]
        return weights


SETTINGS: dict[str, Any] = {
    "accelerator": ACCELERATOR,
    "devices": 1,
    "max_epochs": EPOCHS,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 1,
    "val_check_interval": 3,  # three validations an epoch, the last at its end
}


def make_trainer(callbacks: Sequence[Callback] = (), **arguments: Any) -> Trainer:
    return Trainer(callbacks=list(callbacks), **{**SETTINGS, **arguments})


def run(
    callbacks: Sequence[Callback] = (),
    module: Callable[[], LightningModule] = Digits,
    *,
    seed: int = 7,
    train: Callable[[], Any] | None = train_loader,
    val: Callable[[], Any] | None = val_loader,
    datamodule: LightningDataModule | None = None,
    saves: Mapping[Path, tuple[str, int]] | None = None,
    final: Path | None = None,
    wrap: Callable[[LightningModule], Any] = lambda module: module,
    ckpt_path: Path | None = None,
    **trainer_arguments: Any,
) -> Run:
    """Seed, build and fit; the same arguments give the same run."""
    final = final or Path("final.ckpt")
    seed_everything(seed, verbose=False)
    recorder = Recorder(saves, final)
    trainer = make_trainer([*callbacks, recorder], **trainer_arguments)
    data: dict[str, Any] = {"datamodule": datamodule}
    if datamodule is None:
        data = {"train_dataloaders": train() if train else None, "val_dataloaders": val() if val else None}
    if ckpt_path is not None:
        data["ckpt_path"] = ckpt_path
        if "weights_only" in inspect.signature(Trainer.fit).parameters:
            data["weights_only"] = True
    trainer.fit(wrap(module()), **data)
    state = torch.load(final, weights_only=True)
    return Run(trainer, state, recorder.trace, recorder.rates, recorder.moved)


TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


def assert_same_training(a: Run, b: Run, what: str) -> None:
    """Fail unless two runs trained the same, bit for bit."""
    assert_equal(a.trace, b.trace, f"{what}: the losses of the batches")
    assert_equal({key: a.final[key] for key in TRAINED}, {key: b.final[key] for key in TRAINED}, what)


def trained_otherwise(a: Run, b: Run) -> bool:
    """Whether weights or losses differ."""
    return bool(differences(a.weights, b.weights) or differences(a.trace, b.trace))


@functools.cache
def plain_run(module: Callable[[], LightningModule] = Digits) -> Run:
    """The run without any method."""
    return run(module=module)
