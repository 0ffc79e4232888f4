"""A trial on the side leaves no trace: the run after it is the run without it, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_accel.hooks.snapshot import Snapshot
from lightning_accel.hooks.trial import before_training, training_batches, trial
from tests.conformance import toy
from tests.conformance.rows import EXACT, everything
from tests.conformance.toy import Digits, ManualDigits, assert_same_training, train_loader
from tests.hooks.common import Stop, Tiny, callback_class, fit, loader, make_trainer, samples
from tests.methods import build, use

Searching: Any = callback_class("Searching", touches=frozenset({"parameter groups"}))


class Search(Searching):  # type: ignore[misc]
    """Trains a few steps at a high rate before the fit begins; ``losses`` keeps what they gave."""

    def __init__(self, steps: int = 12, error: bool = False) -> None:
        super().__init__()
        self.steps, self.error = steps, error
        self.losses: list[Any] = []

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before_training(self, trainer, partial(self.search, trainer, pl_module))

    def search(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
        with trial(trainer, pl_module, without=[self]) as side:
            side.start()
            batches = training_batches(trainer)
            for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
                group["lr"] = 0.5
            for _ in range(self.steps):
                self.losses.append(side.step(batches))
                random.random(), np.random.rand(), torch.rand(1)
            moved = [not torch.equal(a, b) for a, b in zip(weights, pl_module.parameters(), strict=True)]
            assert any(moved)
            if self.error:
                raise Stop


def weights_and_more(module: LightningModule) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def check(specs: list[Any], search: Search | None = None, **arguments: Any) -> None:
    """The same run without and with a trial."""
    without = toy.run([build(spec) for spec in specs], **arguments)
    search = search or Search()
    with_trial = toy.run([search, *(build(spec) for spec in specs)], **arguments)
    assert len(search.losses) == search.steps
    assert_same_training(with_trial, without, "after a trial")
    assert without.trainer.callback_metrics.keys() == with_trial.trainer.callback_metrics.keys()
    for name, value in without.trainer.callback_metrics.items():
        assert torch.equal(value, with_trial.trainer.callback_metrics[name]), name


ROWS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "plain": ([], {}),
    "everything": (everything(), {}),
    "an average, clipping, and a schedule": (
        [
            use("EMA", decay=0.5),
            use("GradientClipping", threshold=0.1),
            use("GradientAccumulation", factor={0: 2, "0.5fit": 4}),
        ],
        {},
    ),
    "workers that stay": ([EXACT], {"train": partial(train_loader, num_workers=1, persistent_workers=True)}),
    "the Trainer's accumulation": ([], {"accumulate_grad_batches": 4}),
    "a plateau": ([], {"module": partial(Digits, True, "sgd", "ReduceLROnPlateau")}),
    "manual optimization": ([], {"module": ManualDigits}),
    "a datamodule": ([], {"datamodule": toy.HookedData()}),
    "a limit of steps": ([EXACT], {"max_epochs": -1, "max_steps": 5}),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_run_after_it_is_the_run_without_it(name: str) -> None:
    specs, arguments = ROWS[name]
    check(specs, **{"max_epochs": 2, **arguments})


def test_a_scaler_goes_on_from_its_scale() -> None:
    def scaled() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2))

    search, states = Search(), []
    for callbacks in ([], [search]):
        result = toy.run(callbacks, plugins=[scaled()], max_epochs=1)
        states.append((result, result.final["MixedPrecision"]))
    assert_same_training(states[1][0], states[0][0], "with a scaler")
    assert states[0][1] == states[1][1] and states[0][1]["scale"] > 8.0


def test_a_step_takes_a_window_and_gives_its_mean_loss() -> None:
    class Count(Tiny):
        def on_train_start(self) -> None:
            self.started = getattr(self, "started", 0) + 1

    search = Search(steps=3)
    module = Count(lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
    before = weights_and_more(module)

    def no_rate(trainer: Trainer, pl_module: LightningModule) -> None:
        with trial(trainer, pl_module, without=[search]) as side:
            side.start()
            batches = training_batches(trainer)
            search.losses = [side.step(batches) for _ in range(3)]
            assert trainer.global_step == 1 and trainer.fit_loop.total_batch_idx == 1
            assert module.started == 1

    search.search = no_rate  # type: ignore[method-assign]
    fit(module, search, build(use("GradientAccumulation", factor=2)))
    assert module.started == 1  # and not twice
    x, y = samples(5).tensors
    each = [((x[n : n + 4] @ before[0].T - y[n : n + 4]) ** 2).mean() for n in range(0, 20, 4)]
    expected = [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2, (each[4] + each[0]) / 2]
    torch.testing.assert_close(torch.stack(search.losses), torch.stack(expected))


def test_only_this_package_takes_part_and_nothing_is_logged() -> None:
    seen: list[str] = []

    class Others(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append("batch")

        def on_before_optimizer_step(self, *_: Any) -> None:
            seen.append("step")

    search = Search(steps=4)
    fit(Tiny(), search, Others(), max_epochs=1)
    assert seen == ["step", "batch"] * 5


def test_after_an_exception_too() -> None:
    module = Tiny()
    before = weights_and_more(module)
    search = Search(error=True)
    with pytest.raises(Stop):
        fit(module, search)
    for a, b in zip(before, weights_and_more(module), strict=True):
        assert torch.equal(a, b)


class Shard:
    """No DataLoader, and without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_data_that_is_gone_through_once_is_refused() -> None:
    def batches() -> Iterator[Any]:
        yield from loader()

    class Once(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(samples(5))

    with pytest.raises(MisconfigurationException, match="which can be gone through only once"):
        fit(Tiny(), Search(), data=batches(), max_epochs=-1, max_steps=3)
    fit(Tiny(), Search(steps=7), data=torch.utils.data.DataLoader(Once(), batch_size=4))
    fit(Tiny(), Search(steps=7), data=Shard([[x, y] for x, y in loader()]))


def test_a_strategy_whose_weights_are_out_of_reach_is_refused() -> None:
    trainer = make_trainer()
    trainer.strategy.__class__ = type("DeepSpeedStrategy", (type(trainer.strategy),), {})
    with pytest.raises(MisconfigurationException, match=r"can't work with DeepSpeedStrategy.*strategy='ddp'"):
        trainer.fit(Tiny(), loader())
        with trial(trainer, trainer.lightning_module):
            pass


# ------------------------------------------------------------------------------------------------------- the snapshot


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = [1]


class Odd:
    """One of everything that a callback may hold."""

    def __init__(self) -> None:
        self.numbers, self.names, self.nested = [1, 2], {"a"}, {"x": {"y": [torch.zeros(2)]}}
        self.array, self.slots, self.generator = np.zeros(3), Slots(), torch.Generator().manual_seed(1)
        self.python, self.numpy, self.net = random.Random(1), np.random.default_rng(1), nn.BatchNorm1d(2)
        self.expanded, self.pair = torch.zeros(1).expand(3), (torch.zeros(1), [0])
        self.me = self


CHANGES: dict[str, Callable[[Odd], Any]] = {
    "numbers": lambda odd: odd.numbers.append(3),
    "names": lambda odd: odd.names.add("b"),
    "nested": lambda odd: odd.nested["x"]["y"][0].add_(1),
    "array": lambda odd: odd.array.__iadd__(1),
    "slots": lambda odd: odd.slots.a.append(2),
    "expanded": lambda odd: odd.expanded[0:1].add_(1),
    "pair": lambda odd: odd.pair[1].append(1),
    "new": lambda odd: setattr(odd, "new", 1),
    "replaced": lambda odd: setattr(odd, "numbers", []),
    "net": lambda odd: odd.net(torch.randn(4, 2)),
    "gradient": lambda odd: odd.net(torch.randn(4, 2)).sum().backward(),
    "frozen": lambda odd: odd.net.requires_grad_(False),
    "mode": lambda odd: odd.net.eval(),
}


def described(odd: Odd) -> str:
    net = {name: value.tolist() for name, value in odd.net.state_dict().items()}
    flags = [(parameter.requires_grad, parameter.grad) for parameter in odd.net.parameters()]
    left_out = ("me", "slots", "net", "generator", "python", "numpy")
    simple = {key: value for key, value in vars(odd).items() if key not in left_out}
    return repr((simple, odd.slots.a, net, flags, odd.net.training))


@pytest.mark.parametrize("name", CHANGES)
def test_a_snapshot_puts_back(name: str) -> None:
    odd = Odd()
    numbers, before = odd.numbers, described(odd)
    snapshot = Snapshot([odd])
    CHANGES[name](odd)
    assert described(odd) != before
    snapshot.restore()
    assert described(odd) == before
    assert odd.numbers is numbers


@pytest.mark.parametrize(
    "draw",
    [
        lambda odd: torch.rand(1, generator=odd.generator).item(),
        lambda odd: odd.python.random(),
        lambda odd: odd.numpy.random(),
    ],
)
def test_a_snapshot_puts_generators_back(draw: Callable[[Odd], float]) -> None:
    odd = Odd()
    snapshot = Snapshot([odd])
    first = draw(odd)
    snapshot.restore()
    assert draw(odd) == first


def test_a_snapshot_takes_an_optimizer_that_has_no_state_yet_and_one_that_has() -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters())

    def step() -> None:
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    empty = Snapshot([layer, optimizer])
    step()
    full, weight = Snapshot([layer, optimizer]), layer.weight.detach().clone()
    state = optimizer.state[layer.weight]["exp_avg"].clone()
    step()
    full.restore()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], state)
    assert int(optimizer.state[layer.weight]["step"]) == 1
    empty.restore()
    assert not optimizer.state


def test_a_snapshot_stops_where_it_is_told_to() -> None:
    odd, left = Odd(), [1]
    odd.left = left  # type: ignore[attr-defined]
    surface = Odd()
    snapshot = Snapshot([odd], surfaces=[surface], left=[left])
    left.append(2)
    surface.numbers.append(3)
    surface.new = 1  # type: ignore[attr-defined]
    snapshot.restore()
    assert left == [1, 2]
    assert surface.numbers == [1, 2, 3] and not hasattr(surface, "new")


# ------------------------------------------------------------------------------------- a trial that begins before it


def test_windows_can_be_shortened() -> None:
    losses: list[Any] = []
    search = Search(steps=3)

    def look(trainer: Trainer, pl_module: LightningModule) -> None:
        with trial(trainer, pl_module, without=[search]) as side:
            side.start()
            side.shorten_windows(2)
            batches = training_batches(trainer)
            losses.extend(side.step(batches) for _ in range(3))
            assert len(pl_module.seen) == 6  # type: ignore[arg-type]

    search.search = look  # type: ignore[method-assign]
    module = Tiny()
    fit(module, search, build(use("GradientAccumulation", factor=5)))
    assert len(module.seen) == 5 and len(losses) == 3


def test_a_loader_of_its_own_and_generators_of_a_datamodule() -> None:
    class Drawing(toy.DigitsData):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(1)

    data = Drawing()
    given = loader(shuffle=True, generator=torch.Generator().manual_seed(2))
    before = [data.generator.get_state(), given.generator.get_state()]
    search = Search()

    def look(trainer: Trainer, pl_module: LightningModule) -> None:
        with trial(trainer, pl_module, without=[search]) as side:
            before[0] = data.generator.get_state()
            torch.rand(3, generator=data.generator)
            own = side.own(given)
            assert own is not given and len(list(own)) == 5
        assert torch.equal(data.generator.get_state(), before[0])
        assert torch.equal(given.generator.get_state(), before[1])

    search.search = look  # type: ignore[method-assign]
    toy.run([search], datamodule=data, max_epochs=1)
