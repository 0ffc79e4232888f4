"""Two ranks on the CPU: every method under every strategy that splits the training, in one launch.

A scenario is of a strategy and a row, ``"zero2: FusedOptimizer"``; those of
:mod:`tests.conformance.sharded_resume` are run in the same launch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch.distributed.tensor import DTensor

from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.zero import ZeROStrategy
from tests.conformance import sharded_resume
from tests.conformance.cases import wrong
from tests.conformance.compare import assert_close, assert_equal, differences
from tests.conformance.rows import exactly
from tests.conformance.toy import BATCH_SIZE, Digits, Recorder, make_trainer, train_loader, val_loader
from tests.methods import METHODS, STACKS, STRATEGY_NAMES, Method, Spec, build
from tests.strategies.launch import launch, outcome, serve

RANKS = 2
TOLERANCE = 1e-5  # of losses and weights, against DDP: sums are made in another order
BATCHES, SHORT = 5, 4  # a rank and epoch, of two epochs; and in a run that is only compared with itself
POINT = ("train batch end", 8)  # in mid-epoch, and in the middle of a window of two and of four

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "zero1": lambda: ZeROStrategy(stage=1),
    "zero2": lambda: ZeROStrategy(stage=2),
    # small parameters are not split by default
    "zero3": lambda: ZeROStrategy(stage=3, stage3={"persistence_threshold": 0}),
    "fsdp2": FullyShardStrategy,
}
assert set(STRATEGIES) == {"ddp", *STRATEGY_NAMES}


def together(strategy: str) -> Method:
    """All methods that work there, in one run."""
    refused = {spec["class_path"] for method in METHODS if strategy in method.refused for spec in method.callbacks}
    callbacks = [spec for spec in STACKS[-1].callbacks if spec["class_path"] not in refused]
    return Method(f"everything for {strategy}", callbacks)


WRONG = [wrong("HiddenCounter"), wrong("HiddenScale"), wrong("NeutralDraw")]
TOGETHER = {strategy: together(strategy) for strategy in STRATEGY_NAMES}
ROWS = {method.name: method for method in [*METHODS, *TOGETHER.values(), *WRONG]}
WORKS = [
    *(
        f"{strategy}: {method.name}"
        for strategy in STRATEGY_NAMES
        for method in METHODS
        if strategy not in method.refused
    ),
    *(f"{strategy}: {method.name}" for strategy, method in TOGETHER.items()),
]
AS_DDP = [name for name in WORKS if name.partition(": ")[0] not in ROWS[name.partition(": ")[2]].differs]
REFUSES = [f"{strategy}: {method.name}" for method in METHODS for strategy in method.refused]


class Unbiased(Digits):
    """Without the bias before batch norm: its gradient is nothing but rounding, which AdamW makes large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3, padding=1, bias=False)


def fit(
    strategy: str, specs: list[Spec], *, save: Path | None = None, resume: Path | None = None, **options: Any
) -> Any:
    """The losses, rates and whole weights of a fit."""
    seed_everything(7, verbose=False)
    if resume is not None:
        torch.manual_seed(99)  # other weights and another random state than in the run that was interrupted
    recorder = Recorder(None if save is None else {save: POINT})
    module = Unbiased()
    callbacks: list[Callback] = [*map(build, specs), recorder]
    settings = {"max_epochs": 2, "limit_train_batches": BATCHES, "val_check_interval": None, **options}
    trainer = make_trainer(
        callbacks, strategy=STRATEGIES[strategy](), devices=RANKS, num_sanity_val_steps=0, **settings
    )
    finds_itself = any("AutoResume" in spec["class_path"] for spec in specs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint")  # a part of it that can't be used
        train, path = train_loader(batch_size=BATCH_SIZE // RANKS), None if finds_itself else resume
        trainer.fit(module, train, val_loader(), ckpt_path=path)
    return {
        "losses": {str(batch): loss for batch, loss in recorder.trace.items()},
        "rates": [rate for _, rate in recorder.rates],
        "weights": {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in module.named_parameters()
        },
    }


def run(strategy: str, method: Method, folder: Path) -> Any:
    """The method's run; and where there is something to compare, it resumed, and with its neutral settings."""
    here = folder / f"{strategy} {method.name}"
    specs = [with_folder(spec, here) for spec in exactly(method.callbacks)]
    found = {"whole": fit(strategy, specs, save=here / "saved.ckpt")}
    if strategy == "ddp":
        return found
    found["resumed"] = fit(strategy, specs, resume=here / "saved.ckpt")
    if (method.neutral is not None and method.neutral != method.callbacks) or method in WRONG:
        found["neutral"] = fit(strategy, method.neutral or [], limit_train_batches=SHORT, max_epochs=1)
    return found


def with_folder(spec: Spec, folder: Path) -> Spec:
    """A method that looks for checkpoints finds the one that is saved."""
    if "dirpath" not in spec.get("init_args", {}):
        return spec
    return {**spec, "init_args": {**spec["init_args"], "dirpath": str(folder)}}


def plain(strategy: str, folder: Path) -> Any:
    return {"whole": fit(strategy, []), "short": fit(strategy, [], limit_train_batches=SHORT, max_epochs=1)}


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    **{f"{strategy}: plain": partial(plain, strategy) for strategy in STRATEGIES},
    **{f"{strategy}: {name}": partial(run, strategy, row) for strategy in STRATEGIES for name, row in ROWS.items()},
    **sharded_resume.SCENARIOS,
}


def run_all(folder: Path, names: list[str]) -> None:
    """What these names need, in one launch."""
    needed = list(names)
    for strategy, colon, row in (name.partition(": ") for name in names):
        needed += [f"ddp: {row}", f"{strategy}: plain", "ddp: plain"] if colon else []
    launch("tests.conformance.strategies", folder, sorted(set(needed)), seconds=850)


def outcomes(folder: Path, name: str) -> list[Any]:
    return [outcome(folder, name, rank) for rank in range(RANKS)]


def check_as_under_ddp(folder: Path, name: str) -> None:
    """The same losses, rates and weights as under DDP."""
    _, _, row = name.partition(": ")
    for found, expected in zip(outcomes(folder, name), outcomes(folder, f"ddp: {row}"), strict=True):
        a, b = found["whole"], expected["whole"]
        assert a["rates"] == b["rates"], "the learning rates"
        assert_close(tensors(a["losses"]), tensors(b["losses"]), TOLERANCE, "the losses")
        assert_close(a["weights"], b["weights"], TOLERANCE, "the weights")


def tensors(losses: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(loss) for name, loss in losses.items()}


def check_resumed(folder: Path, name: str) -> None:
    """The resume law."""
    for found in outcomes(folder, name):
        whole, resumed = found["whole"], found["resumed"]
        tail = {batch: loss for batch, loss in whole["losses"].items() if int(batch) > POINT[1]}
        assert_equal(resumed["losses"], tail, "the losses of the batches")
        assert_equal(resumed["weights"], whole["weights"], "the weights")


def check_neutral(folder: Path, name: str) -> None:
    """Neutral settings, or a method that only acts at a resume, give the strategy's run without the method."""
    strategy, _, row = name.partition(": ")
    for found, without in zip(outcomes(folder, name), outcomes(folder, f"{strategy}: plain"), strict=True):
        if "neutral" in found:
            assert_equal(found["neutral"], without["short"], "with neutral settings")
        if ROWS[row].silent:  # but for what it leaves in the weights in the end
            assert_equal(found["whole"]["losses"], without["whole"]["losses"], ROWS[row].silent)
        elif ROWS[row] not in WRONG:
            assert differences(found["whole"], without["whole"]), f"{name} does nothing"


def check_refused(folder: Path, name: str, reason: str) -> None:
    """Every rank says that it can't work, why, and what to do."""
    for rank in range(RANKS):
        error = folder / f"{name}.{rank}.error"
        assert error.exists(), f"{name} was not refused on rank {rank}"
        message = error.read_text().strip().splitlines()[-1]
        assert "MisconfigurationException" in message and re.search(reason, message), message


if __name__ == "__main__":
    serve(SCENARIOS)
