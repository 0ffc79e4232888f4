"""The runs that are stopped and resumed: each method, and harder data and modules for all of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from tests.conformance.toy import (
    BATCH_SIZE,
    DictSet,
    Digits,
    SizedStream,
    UnvalidatedDigits,
    train_loader,
    train_set,
    val_set,
)
from tests.methods import METHODS, STACKS, Method, Spec, build, use, with_keys


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    callbacks: list[Spec]
    arguments: Callable[[], dict[str, Any]] = dict
    """What :func:`tests.conformance.toy.run` gets beside the callbacks."""
    slow: bool = True
    keys: tuple[str, str] | None = None

    def make(self) -> list[Any]:
        return [build(with_keys(spec, self.keys)) for spec in self.callbacks]


EXACT = use("ExactResume")


def exactly(callbacks: list[Spec]) -> list[Spec]:
    """With ExactResume, which makes the data and the random state exact."""
    return callbacks if EXACT in callbacks else [*callbacks, EXACT]


def of_method(method: Method) -> Row:
    return Row(method.name, exactly(method.callbacks), slow=method not in METHODS[:1])


def workers() -> dict[str, Any]:
    return {"train": partial(train_loader, num_workers=2, persistent_workers=True)}


def stateful() -> dict[str, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return {"train": lambda: StatefulDataLoader(train_set(), batch_size=BATCH_SIZE, shuffle=True)}


def stateful_stream() -> dict[str, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return {"train": lambda: StatefulDataLoader(SizedStream(train_set()), batch_size=BATCH_SIZE)}


def dicts() -> dict[str, Any]:
    return {
        "train": lambda: DataLoader(DictSet(train_set()), batch_size=BATCH_SIZE, shuffle=True),
        "val": lambda: DataLoader(DictSet(val_set()), batch_size=8),
    }


def everything() -> list[Spec]:
    return exactly(STACKS[-1].callbacks)


METHOD_ROWS = [of_method(method) for method in [*METHODS, *STACKS]]
WORLD_ROWS = [
    Row("two workers", [EXACT], workers),
    Row("StatefulDataLoader", everything(), stateful),
    Row("StatefulDataLoader over a stream", everything(), stateful_stream),
    Row("dictionaries", everything(), dicts, keys=("x", "y")),
    Row("a shared weight", everything(), lambda: {"module": partial(Digits, shared=True)}),
    Row("a frozen layer", everything(), lambda: {"module": partial(Digits, frozen=True)}),
    Row("no validation", everything(), lambda: {"module": UnvalidatedDigits, "val": None}),
    Row("SGD and a plateau", everything(), lambda: {"module": partial(Digits, True, "sgd", "ReduceLROnPlateau")}),
    Row("a limit of steps", everything(), lambda: {"max_epochs": -1, "max_steps": 14}),
]
WRONG = "tests.conformance.wrong_methods"
WRONG_ROWS = [
    Row("nothing", []),  # shuffling and dropout are not resumed exactly without ExactResume
    Row("HiddenCounter", [use(f"{WRONG}.HiddenCounter"), EXACT]),
    Row("HiddenRandom", [use(f"{WRONG}.HiddenRandom"), EXACT]),
]
RIGHT_ROWS = [Row("Noise", [use(f"{WRONG}.Noise"), EXACT])]
