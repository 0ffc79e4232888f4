"""What the tests of ZeroRedundancyStrategy run on two ranks without deepspeed: fits beside DDP, resumes, errors.

python -m tests.strategies.zero_redundancy_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_accel.durability.exact_resume import ExactResume
from lightning_accel.errors import NoEffectWarning
from lightning_accel.report.sizes import optimizer_state_bytes
from lightning_accel.strategies.registry import zero1
from tests.strategies.fully_shard_fits import RANK, WORLD, Gan, Net, SaveAt, data, fit, weights
from tests.strategies.launch import serve
from tests.strategies.zero_redundancy_fits import LOW_BITS, NAME, SAME, GroupNorm, Lion, Other, OwnList, Twice


def state_of(trainer: Trainer) -> list[Any]:
    """The whole state of every optimizer, on rank 0."""
    return [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]


def resumed(
    folder: Path,
    name: str,
    first: Any = NAME,
    second: Any = NAME,
    methods: Callable[[], list[Callback]] = lambda: [ExactResume()],
    at: int = 5,
    **arguments: Any,
) -> dict[str, Any]:
    """A fit that saves on its way, and one that goes on from there with other weights and random numbers."""
    path = folder / f"{name}.ckpt"
    trainer, _, plain = fit(first, callbacks=lambda: [*methods(), SaveAt(path, at)], **arguments)
    states = state_of(trainer)
    trainer, _, result = fit(second, callbacks=methods, ckpt_path=path, seed=77, **arguments)
    return {"plain": plain, "resumed": result, "states": [states, state_of(trainer)]}


def low_bit_resumed(folder: Path, name: str, callbacks: Callable[[], list[Callback]], **arguments: Any) -> Any:
    return resumed(folder, name, methods=lambda: [ExactResume(), *callbacks()], **arguments)


scheduled = partial(Net, "adamw", "LambdaLR")
RESUMED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "between epochs": partial(resumed, name="between_epochs", module=scheduled, at=0),
    "in an epoch": partial(resumed, name="in_an_epoch", module=scheduled),
    "from a single device": partial(resumed, name="from_single", first="auto", module=scheduled),
    "to a single device": partial(resumed, name="to_single", second="auto", module=scheduled),
    "from ddp": partial(resumed, name="from_ddp", first="ddp", module=scheduled),
    "to ddp": partial(resumed, name="to_ddp", second="ddp", module=scheduled),
    "lion in a window": partial(
        resumed, name="lion", module=partial(Other, partial(Lion, step_size=1e-3)), accumulate_grad_batches=2
    ),
    "gan": lambda folder: resumed(folder, "gan", *(zero1(find_unused_parameters=True) for _ in "12"), module=Gan),
    **{name: partial(low_bit_resumed, name=name, **arguments) for name, arguments in LOW_BITS.items()},
    "low bit between epochs": partial(
        low_bit_resumed, name="low_bit_between_epochs", **LOW_BITS["low bit generic"], module=scheduled, at=0
    ),
}


def elsewhere(folder: Path) -> dict[str, Any]:
    """Go on, on another number of ranks, from a checkpoint; the whole batch is the same."""
    saved = {1: "one", 2: "two"}[3 - WORLD]
    where = folder.parent / saved
    low_bit = LOW_BITS["low bit generic"]
    return {
        "between epochs": fit(NAME, module=scheduled, ckpt_path=where / "between_epochs.ckpt", seed=78)[2],
        "low bit between epochs": fit(
            NAME, module=scheduled, ckpt_path=where / "low_bit_between_epochs.ckpt", seed=78, **low_bit
        )[2],
    }


# ------------------------------------------------------------------------------------------------------------- others


class Later(Net):
    """A frozen stem that is in no group, and a frozen block that is in one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.requires_grad_(False)
        self.blocks[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        rest = [parameter for name, parameter in self.named_parameters() if not name.startswith("stem")]
        return torch.optim.AdamW(rest, lr=3e-3)

    def unfreeze(self, optimizer: Any) -> None:
        self.blocks[0].requires_grad_(True)
        self.stem.requires_grad_(True)
        optimizer.add_param_group({"params": list(self.stem.parameters()), "lr": 1e-3})


class Unfreeze(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            pl_module.unfreeze(trainer.optimizers[0])


def later(folder: Path) -> dict[str, Any]:
    """Layers that are unfrozen on the way, beside a loop in plain torch over the batches of both ranks."""
    trainer, _, result = fit(NAME, module=Later, callbacks=lambda: [Unfreeze()], max_epochs=1)
    torch.manual_seed(1)
    module = Later()
    optimizer = module.configure_optimizers()
    x, y = data().dataset.tensors  # type: ignore[attr-defined]
    for number, batch in enumerate(zip(x.split(8), y.split(8), strict=True)):
        if number == 3:
            module.unfreeze(optimizer)
        optimizer.zero_grad()
        module.compute_loss(batch).backward()
        optimizer.step()
    restartable = fit("accel_ddp", module=Later, callbacks=lambda: [Unfreeze()], max_epochs=1)[2]
    return {
        "plain": weights(module),
        "sharded": result["weights"],
        "ddp": restartable["weights"],
        "bytes": optimizer_state_bytes(trainer.optimizers),
    }


def held(folder: Path) -> dict[str, Any]:
    """The bytes of optimizer state that a rank has: after a fit, after a save, and in one that goes on from there."""
    path = folder / "held.ckpt"
    plain = optimizer_state_bytes(fit("ddp", max_epochs=1)[0].optimizers)
    trainer, _, _ = fit(NAME, max_epochs=1)
    found = [optimizer_state_bytes(trainer.optimizers)]
    trainer.save_checkpoint(path)
    assert vars(trainer.optimizers[0])["_whole"] is None
    found.append(optimizer_state_bytes(trainer.optimizers))
    trainer, _, _ = fit(NAME, ckpt_path=path)
    found.append(optimizer_state_bytes(trainer.optimizers))
    everything = [vars(optimizer)["optim"].state for optimizer in trainer.optimizers]
    assert everything == [optimizer.state for optimizer in trainer.optimizers]
    low_bit = [
        optimizer_state_bytes(fit(strategy, max_epochs=1, **LOW_BITS["low bit generic"])[0].optimizers)
        for strategy in ("ddp", NAME)
    ]
    adagrads = optimizer_state_bytes(fit(NAME, module=adagrad)[0].optimizers)
    return {"plain": plain, "found": found, "adagrad": adagrads, "low bit": low_bit}


adagrad = partial(Net, "adagrad")


def message(function: Callable[[], Any]) -> str:
    """Of the error that it must raise, with its type."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


class ByRank(Net):
    """Another module on another rank."""

    def __init__(self) -> None:
        super().__init__()
        if RANK:
            self.head = nn.Linear(16, 9)


class OptimizerByRank(Net):
    """Other groups on another rank."""

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return torch.optim.SGD([{"params": parameters[: 3 + RANK]}, {"params": parameters[3 + RANK :]}], lr=0.1)


def errors(folder: Path) -> dict[str, str]:
    """What is refused, on every rank."""

    def refused(kind: Callable[..., Any], **arguments: Any) -> str:
        return message(lambda: fit(NAME, module=partial(Other, lambda groups: kind(groups, **arguments)), max_epochs=1))

    def one_group(groups: Any) -> Any:
        return torch.optim.LBFGS(groups[0]["params"])

    trainer, _, _ = fit(NAME, module=partial(Other, partial(WithMethod, step_size=1e-3)), max_steps=1)
    optimizer = trainer.optimizers[0]
    return {
        "LBFGS": refused(one_group),
        "twice": refused(Twice, step_size=1e-3),
        "group norm": refused(GroupNorm, step_size=1e-3),
        "other module": message(lambda: fit(NAME, module=ByRank)),
        "other optimizer": message(lambda: fit(NAME, module=OptimizerByRank)),
        "state of a part": message(optimizer.state_dict),
        "method": message(lambda: optimizer.evaluate()),  # type: ignore[attr-defined]
        "stage 2": message(lambda: fit("accel_zero2")),
        "only deepspeed": message(lambda: zero1(offload_optimizer="cpu", stage3={})),
        "data": str(optimizer.answer),  # type: ignore[attr-defined]
    }


class WithMethod(Lion):
    answer = 42

    def evaluate(self) -> None:
        raise AssertionError("must not run on a part")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def says(folder: Path) -> dict[str, Any]:
    """What is said, warned and logged."""
    logger, lines = logging.getLogger("lightning.pytorch"), Lines()
    level = logger.level
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.INFO)
    logger.addHandler(lines)
    zero1(trained_later=["head"])
    logger.removeHandler(lines)
    logger.setLevel(level)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = fit(NAME, module=partial(Other, partial(OwnList, step_size=1e-3)), max_epochs=1)[0]
    names = []
    for strategy in ("ddp", NAME):
        monitor = LearningRateMonitor()
        fit(strategy, scheduled, partial(list, [monitor]), max_epochs=1, logger=CSVLogger(folder))
        names.append(sorted(monitor.lrs))
    return {
        "lines": [line for line in lines.lines if "deepspeed" in line],
        "warned": [str(item.message) for item in seen if issubclass(item.category, NoEffectWarning)],
        "monitored": names,
        "strategy": [type(trainer.strategy).__name__, type(trainer.strategy.checkpoint_io).__name__],
    }


OTHERS: dict[str, Callable[[Path], Any]] = {
    "later": later,
    "bytes": held,
    "errors": errors,
    "says": says,
    "elsewhere": elsewhere,
}


def _same(name: str, folder: Path) -> Any:
    return SAME[name]()


if __name__ == "__main__":
    assert "deepspeed" not in sys.modules
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    serve(
        {
            **{name: partial(_same, name) for name in SAME},
            **{f"resumed {name}": run for name, run in RESUMED.items()},
            **OTHERS,
        }
    )
