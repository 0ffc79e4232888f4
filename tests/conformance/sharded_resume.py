"""Two ranks: runs that are saved inside an epoch, and resumed, where a strategy keeps gradients or options elsewhere.

Their scenarios are run by :mod:`tests.conformance.strategies`, in the one launch of ranks that all these tests share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import ExactResume
from lightning_accel.strategies.zero import ZeROStrategy
from tests.conformance.toy import SETTINGS

__all__ = ["NOT_EXACT", "RESUMED", "SCENARIOS"]

BATCHES = 8  # a rank and epoch
STOPS = {"mid-window": 4, "mid-epoch": 10}  # with windows of 3, 3 and 2 batches: the batch after which it is saved
LATE_STOPS = {"all frozen": 2, "one unfrozen": 6}
UNFROZEN = {4: "second", 9: "first"}  # from which batch on


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    size = 2 * 2 * BATCHES
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))


class Net(LightningModule):
    """Dropout, sizes that two ranks can't halve, and a schedule that wants to know how long the fit is."""

    def __init__(self, schedule: str = "OneCycleLR", optimizer: str = "adamw", frozen: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Sequential(nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3))
        if frozen:
            self.first.requires_grad_(False)
            self.second.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.last(self.second(self.first(x))).float(), y)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", Net.training_step(self, batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
        if self.hparams["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [
            {"scheduler": make_schedule(self.hparams["schedule"], optimizer, steps), "interval": "step"}
        ]


def make_schedule(name: str, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    if name == "OneCycleLR":  # sets momentum in the groups too
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps + 1)
    # These go on from the rate that they find in the groups
    first, second = lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler([first, second], optimizer)
    assert name == "SequentialLR"
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[3])


class ManualNet(Net):
    """Makes its own windows of three batches, over the epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if self.trainer.fit_loop.total_batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class Record(Callback):
    """Writes down each batch, and saves after some."""

    def __init__(self, saves: dict[int, Path]) -> None:
        self.saves = saves
        self.losses: dict[str, float] = {}
        self.rates: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        number = trainer.fit_loop.total_batch_idx
        self.losses[str(number)] = float(outputs["loss"] if isinstance(outputs, dict) else outputs)
        self.rates[str(number)] = float(trainer.optimizers[0].param_groups[0]["lr"])
        if number in self.saves:
            trainer.save_checkpoint(self.saves[number])


class Unfreeze(Callback):
    """Unfreezes layers in mid-run, as the caller would by hand."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for batch, name in UNFROZEN.items():
            if trainer.fit_loop.total_batch_idx >= batch:
                pl_module.get_submodule(name).requires_grad_(True)


def make_trainer(strategy: Any, callbacks: Sequence[Callback], **options: Any) -> Trainer:
    settings = {**SETTINGS, "devices": 2, "max_epochs": 2, "val_check_interval": None, **options}
    return Trainer(strategy=strategy, callbacks=list(callbacks), enable_checkpointing=False, **settings)


def loader() -> DataLoader[Any]:
    return DataLoader(points(), batch_size=2, shuffle=True)


def resumed(
    strategy: Callable[[], Any],
    module: Callable[[], LightningModule] = Net,
    callbacks: Callable[[], list[Callback]] = lambda: [ExactResume()],
    stops: dict[str, int] = STOPS,
    **options: Any,
) -> Callable[[str, Path], Any]:
    """The run that is not interrupted, and what is resumed from each stop."""

    def fit(saves: dict[int, Path], resume: Path | None = None) -> dict[str, Any]:
        seed_everything(5, verbose=False)
        if resume is not None:
            torch.manual_seed(99)
        net, record = module(), Record(saves)
        make_trainer(strategy(), [*callbacks(), record], **options).fit(net, loader(), ckpt_path=resume)
        weights = {name: value.detach().clone() for name, value in net.named_parameters()}
        return {"losses": record.losses, "rates": record.rates, "weights": weights}

    def scenario(name: str, folder: Path) -> Any:
        paths = {stop: folder / f"{name} {stop}.ckpt" for stop in stops}
        whole = fit({stop: paths[name] for name, stop in stops.items()})
        return {"whole": whole, **{name: fit({}, path) for name, path in paths.items()}}

    return scenario


def two_trainers(folder: Path) -> Any:
    """Fit; then another Trainer, of another stage, fits the same module on and tests it; then a third tests it."""
    found = []
    for stages in ((2, 3, 2), (3, 1, 3)):
        seed_everything(5, verbose=False)
        net: Any = Net()
        make_trainer(ZeROStrategy(stage=stages[0]), []).fit(net, loader())
        second, third = (make_trainer(ZeROStrategy(stage=stage), []) for stage in stages[1:])
        second.fit(net, loader())
        data = DataLoader(points(), batch_size=8)
        tested = [trainer.test(net, data, verbose=False)[0]["loss"] for trainer in (second, third)]
        weights = {name: value.detach().clone() for name, value in net.named_parameters()}
        found.append({"weights": weights, "tested": tested})
    return found


ACCUMULATE = {"accumulate_grad_batches": 3}
LATE = ["^first", "^second"]


def zero(stage: int, **options: Any) -> Callable[[], ZeROStrategy]:
    if stage == 3:
        options["stage3"] = {"persistence_threshold": 0}  # small parameters are not split by default
    return partial(ZeROStrategy, stage=stage, **options)


RESUMED: dict[str, Callable[[str, Path], Any]] = {
    "offload 2": resumed(zero(2, offload_optimizer="cpu"), **ACCUMULATE),
    "offload 3": resumed(zero(3, offload_optimizer="cpu"), **ACCUMULATE),
    "bfloat16 1": resumed(zero(1), precision="bf16-true", **ACCUMULATE),
    "bfloat16 2": resumed(zero(2), precision="bf16-true", **ACCUMULATE),
    "manual 3": resumed(zero(3), ManualNet),
    **{
        f"{schedule} {stage}": resumed(
            zero(stage, trained_later=LATE),
            partial(Net, schedule, optimizer, frozen=True),
            lambda: [ExactResume(), Unfreeze()],
            LATE_STOPS,
        )
        for schedule, optimizer, stage in (
            ("SequentialLR", "adamw", 3),
            ("ChainedScheduler", "adamw", 2),
            ("OneCycleLR", "sgd", 2),
            ("OneCycleLR", "sgd", 3),
        )
    },
}
NOT_EXACT = {"nothing": resumed(zero(2), callbacks=list, **ACCUMULATE)}
SCENARIOS: dict[str, Callable[[Path], Any]] = {
    **{name: partial(scenario, name) for name, scenario in {**RESUMED, **NOT_EXACT}.items()},
    "two trainers": two_trainers,
}
