"""BatchSizeFinder: after it a run is, bit for bit, the run whose loader was made with the size that was found."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from functools import partial, update_wrapper
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler, TensorDataset
from torch.utils.data.dataloader import default_collate

from lightning_accel import BatchSizeFinder, ExactResume, GradientAccumulation, LearningRateFinder, MicroBatching
from lightning_accel.hooks.batch_size import with_batch_size
from lightning_accel.tuning.batch_size_finder import next_size
from lightning_accel.tuning.peak_memory import CudaMemory
from tests.conformance import toy
from tests.conformance.rows import EXACT, everything
from tests.conformance.toy import Digits, DigitsData, ManualDigits, SizedStream, assert_same_training, train_set
from tests.hooks.common import Stream, Tiny, fit, loader, samples, save_at
from tests.methods import build, use

PEOPLE = 72  # samples of the toy


def finder(**arguments: Any) -> BatchSizeFinder:
    return BatchSizeFinder(**{"memory_budget": "1GiB", "steps_per_trial": 2, **arguments})


# --------------------------------------------------------------------------------------------------- the pure function


def search(limit: int, *arguments: Any) -> list[int]:
    """What is tried where sizes up to ``limit`` fit."""
    tried: dict[int, bool] = {}
    while (size := next_size(tried, *arguments)) is not None:
        assert size not in tried
        tried[size] = size <= limit
    return list(tried)


def test_power_doubles_and_binsearch_halves() -> None:
    assert search(20, 2, 100) == [2, 4, 8, 16, 32]
    assert search(20, 2, 100, "binsearch") == [2, 4, 8, 16, 32, 24, 20, 22, 21]
    assert search(1000, 3, 100) == [3, 6, 12, 24, 48, 96]
    assert search(1000, 3, 100, "binsearch") == [3, 6, 12, 24, 48, 96, 100]
    assert search(1, 2, 100) == search(1, 2, 100, "binsearch") == [2]


@given(st.integers(1, 9), st.integers(0, 3000), st.integers(1, 2000))
def test_the_largest_that_fits_is_found(low: int, limit: int, high: int) -> None:
    high = max(low, high)
    found = max((size for size in search(limit, low, high, "binsearch") if size <= limit), default=0)
    largest = min(limit, high) if limit >= low else 0
    assert largest - max(0, largest // 32) <= found <= largest
    powers = [low * 2**n for n in range(12) if low * 2**n <= min(limit, high)]
    assert [size for size in search(limit, low, high) if size <= limit] == powers


# ------------------------------------------------------------------------------------------------------- real budgets


class Wide(LightningModule):
    """Activations that outweigh the weights: 9 tensors of 64 floats a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(item for _ in range(4) for item in (nn.Linear(64, 64), nn.Tanh())))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def wide_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4096, 64)), batch_size=8)


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_a_budget_is_kept_and_used(mode: str) -> None:
    search = finder(mode=mode, memory_budget="1MiB", margin=0.25)
    trainer = fit(Wide(), search, data=wide_loader(), limit_train_batches=2)
    limit = 0.75 * 2**20
    fixed = 4 * sum(p.nbytes for p in trainer.lightning_module.parameters())  # weights, gradients, two moments
    per_sample = (limit - fixed) / 256
    assert search.batch_size is not None and trainer.train_dataloader.batch_size == search.batch_size
    peaks = {result["batch_size"]: result["peak"] for result in search.results}
    fits = {result["batch_size"]: result["fits"] for result in search.results}
    assert all((peaks[size] <= limit) == fits[size] for size in peaks)
    assert peaks[2] > fixed  # the state is there when the peak is
    assert not fits[min(size for size in peaks if size > search.batch_size)]
    if mode == "binsearch":
        assert peaks[search.batch_size] > 0.96 * limit
        # eight activations, as many gradients at most, the batch itself
        assert 7 < per_sample / search.batch_size < 20
    else:
        assert search.batch_size.bit_count() == 1


def test_more_memory_finds_larger_sizes() -> None:
    found = []
    for budget in ("600KiB", "1MiB", "3MiB"):
        search = finder(memory_budget=budget)
        fit(Wide(), search, data=wide_loader(), limit_train_batches=1)
        assert search.batch_size is not None
        found.append(search.batch_size)
    assert found == sorted(set(found))


def test_longer_samples_find_smaller_sizes() -> None:
    """Ragged data: the longest of the batches that are tried decide."""

    def collate(items: list[Any]) -> Any:
        longest = max(int(item[0][0].abs() * 8) + 1 for item in items)
        return [torch.stack([item[0] for item in items]).repeat(1, longest).view(-1, 64)]

    found = []
    for function in (None, collate):
        search = finder(memory_budget="2MiB")
        data = DataLoader(wide_loader().dataset, batch_size=8, collate_fn=function)
        fit(Wide(), search, data=data, limit_train_batches=1)
        found.append(search.batch_size or 0)
    assert 4 <= found[0] / found[1] <= 32


# ---------------------------------------------------------------------------------------------- the run after it


class Limited(Digits):
    """Runs out of memory with batches of more than ``largest`` samples; its attribute and hyperparameter follow."""

    largest = 13

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.batch_size = 4
        self.sizes: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        count = len(batch["x"] if isinstance(batch, dict) else batch[0])
        self.sizes.append((count, self.batch_size))
        loss = super().training_step(batch, batch_idx)
        if count > self.largest:
            self.stolen = loss * 1  # a graph that is held on to
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


class LimitedManual(ManualDigits):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) > Limited.largest:
            self.optimizers()[0].param_groups[0]["lr"] = 7.0  # type: ignore[index]
            self.requires_grad_(False)
            raise torch.OutOfMemoryError
        return super().training_step(batch, batch_idx)


class Prebuilt(Limited):
    """Optimizer and scheduler are there before the fit, as with LightningCLI's ``--optimizer``."""

    def __init__(self) -> None:
        super().__init__()
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = LinearLR(optimizer, start_factor=0.1, total_iters=4)

        def configure(module: Any, optimizer: Any, scheduler: Any) -> Any:
            return [optimizer], [scheduler]

        made = update_wrapper(partial(configure, optimizer=optimizer, scheduler=scheduler), configure)
        self.configure_optimizers = MethodType(made, self)  # type: ignore[method-assign]


class Own(LightningModule):
    """Mixed in: the module has the loader, made with its attribute."""

    def train_dataloader(self) -> DataLoader[Any]:
        return toy.train_loader(batch_size=getattr(self, "batch_size", 4))


class OwnLimited(Own, Limited): ...


class SizedData(DigitsData):
    """The datamodule has the size, and a generator that it draws from while it makes the loader."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.generator = torch.Generator().manual_seed(4)
        self.seen: list[int] = []

    def train_dataloader(self) -> DataLoader[Any]:
        torch.rand(3, generator=self.generator)
        self.seen.append(self.hparams["batch_size"])
        return toy.train_loader(batch_size=self.hparams["batch_size"], generator=self.generator)


class Counting(Sampler[int]):
    """Has another order at each pass, by its own state."""

    def __init__(self) -> None:
        self.passes, self.random = 0, random.Random(3)

    def __len__(self) -> int:
        return PEOPLE

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(self.random.sample(range(PEOPLE), PEOPLE)[self.passes :] + [0] * self.passes)


def plain_loader(batch_size: int = 4) -> DataLoader[Any]:
    return toy.train_loader(batch_size=batch_size)


def with_sampler(batch_size: int = 4, **arguments: Any) -> DataLoader[Any]:
    return toy.train_loader(shuffle=False, sampler=Counting(), batch_size=batch_size, **arguments)


def with_batch_sampler(batch_size: int = 4) -> DataLoader[Any]:
    sampler = BatchSampler(RandomSampler(range(PEOPLE)), batch_size, drop_last=True)
    return DataLoader(train_set(), batch_sampler=sampler)


def stateful(batch_size: int = 4) -> DataLoader[Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(train_set(), batch_size=batch_size, shuffle=True)


def workers(batch_size: int = 4) -> DataLoader[Any]:
    return toy.train_loader(batch_size=batch_size, num_workers=1, persistent_workers=True)


def dropping(batch_size: int = 4) -> DataLoader[Any]:
    return toy.train_loader(batch_size=batch_size, drop_last=True, generator=torch.Generator().manual_seed(5))


def sized_stream(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(SizedStream(train_set()), batch_size=batch_size)


ROWS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "a schedule of so many steps": ([], {}),
    "everything": (everything(), {}),
    "a plateau": ([], {"module": partial(Limited, optimizer="sgd", scheduler="ReduceLROnPlateau")}),
    "manual optimization": ([], {"module": LimitedManual}),
    "an optimizer that was there before": ([], {"module": Prebuilt}),
    "workers that stay": ([EXACT], {"train": workers}),
    "a sampler with state": ([], {"train": with_sampler}),
    "a batch sampler": ([EXACT], {"train": with_batch_sampler}),
    "short batches dropped": ([], {"train": dropping}),
    "StatefulDataLoader": ([EXACT], {"train": stateful}),
    "a stream": ([], {"train": sized_stream}),
    "loaded again every epoch": ([], {"reload_dataloaders_every_n_epochs": 1}),
    "windows of the Trainer": ([], {"accumulate_grad_batches": 2}),
    "SAM": ([use("SAM")], {}),
    "OptimizerInBackward": ([use("OptimizerInBackward")], {}),
    "ScheduleFree": ([use("ScheduleFree", schedulers="keep", batch_norm_batches=2)], {}),
    "windows by samples": ([use("GradientAccumulation", target_batch_size=24)], {}),
}


def check(search: BatchSizeFinder, specs: list[Any], found: int = 8, **arguments: Any) -> None:
    """The run after a search against the run configured with what it found."""
    arguments = {"module": Limited, "train": plain_loader, "max_epochs": 2, "val_check_interval": None, **arguments}
    train = arguments.pop("train")
    searched = toy.run([search, *map(build, specs)], train=train, **arguments)
    assert search.batch_size == found
    plain = toy.run([*map(build, specs)], train=lambda: train(batch_size=found), **arguments)
    assert_same_training(searched, plain, "after the search")
    assert searched.trainer.num_training_batches == plain.trainer.num_training_batches
    assert len(searched.trainer.train_dataloader) == len(plain.trainer.train_dataloader)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if n > 2 else []) for n, name in enumerate(ROWS)]
)
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_it_is_the_run_whose_loader_was_made_so(name: str) -> None:
    specs, arguments = ROWS[name]
    check(finder(), specs, **arguments)


def test_a_size_between_the_powers_too() -> None:
    check(finder(mode="binsearch"), [], found=13)


def test_a_loader_of_the_module_and_of_a_datamodule() -> None:
    runs = []
    for make in (finder, None):
        data = SizedData(4 if make else 8)
        callbacks = [make()] if make else []
        settings: dict[str, Any] = {"max_epochs": 3, "val_check_interval": None, "reload_dataloaders_every_n_epochs": 2}
        runs.append(toy.run(callbacks, Limited, datamodule=data, **settings))
        if make:
            assert data.hparams["batch_size"] == 4  # only while the fit goes on
            assert data.seen[-2:] == [8] * 2 and set(data.seen) == {4, 8}
    assert_same_training(*runs, "a datamodule")

    def with_size(size: int) -> OwnLimited:
        module = OwnLimited()
        module.batch_size = size
        return module

    settings = {"train": None, "max_epochs": 1, "val_check_interval": None}
    searched = toy.run([finder()], lambda: with_size(4), **settings)
    plain = toy.run([], lambda: with_size(8), **settings)
    assert_same_training(searched, plain, "the module's own")
    module: Any = searched.trainer.lightning_module
    assert module.batch_size == 4 and module.sizes == [(8, 8)] * 9
    assert not hasattr(module, "stolen")


def test_several_loaders_get_the_same_size() -> None:
    class Pairs(Limited):
        validation_step = LightningModule.validation_step

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    def pairs(batch_size: int = 4, mode: Any = "min_size") -> CombinedLoader:
        short = TensorDataset(*train_set()[:40])
        second = DataLoader(short, batch_size=batch_size, shuffle=True)
        return CombinedLoader({"a": toy.train_loader(batch_size=batch_size), "b": second}, mode)

    check(finder(), [], module=Pairs, train=pairs, val=None)
    given = pairs()
    kept = list(given.flattened)
    fit(Pairs(), finder(), data=given)
    assert all(a is b for a, b in zip(given.flattened, kept, strict=True)) and given.limits is None
    assert [item.batch_size for item in kept] == [4, 4]


def test_a_learning_rate_is_found_for_the_size_that_was_found() -> None:
    def rates() -> LearningRateFinder:
        return LearningRateFinder(min_lr=1e-5, max_lr=0.3, num_steps=15)

    settings: dict[str, Any] = {"max_epochs": 2, "val_check_interval": None}
    both = toy.run([rates(), finder()], Limited, train=plain_loader, **settings)  # in whatever order
    alone = toy.run([rates()], Limited, train=lambda: plain_loader(8), **settings)
    assert_same_training(both, alone, "both finders")


def test_what_is_compiled_is_compiled_in_the_fit() -> None:
    """Anew, for its size: after several sizes dynamo would go on with a graph for any."""
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append(len(inputs[-1]))
        return graph.forward

    class Compiled(Limited):
        def __init__(self) -> None:
            super().__init__()
            self.halved = torch.compile(lambda x: x * 0.5, backend=backend, dynamic=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.halved(x))

    try:
        toy.run([finder()], Compiled, limit_train_batches=2, limit_val_batches=0, val_check_interval=None)
    finally:
        torch._dynamo.reset()
    assert sizes == [2, 4, 8, 16, 8]


# -------------------------------------------------------------------------------------------------------------- bounds


def reasons(search: BatchSizeFinder) -> list[str]:
    return [result["reason"] for result in search.results if not result["fits"]]


def test_it_stops_at_what_the_data_and_the_settings_allow() -> None:
    search = finder(mode="binsearch")
    fit(Tiny(), search)
    assert search.batch_size == 20 and not reasons(search)
    search = finder()
    fit(Tiny(), search, max_epochs=1)
    assert search.batch_size == 16
    search = finder(max_size=6, mode="binsearch")
    fit(Tiny(), search)
    assert search.batch_size == 6
    search = finder(mode="binsearch")
    fit(Tiny(), search, val_check_interval=4, limit_val_batches=1)
    assert search.batch_size == 6  # of 20, in four batches
    assert "must be less than or equal to the number of the training batches" in reasons(search)[0]
    search = finder(mode="binsearch")
    fit(Tiny(), search, limit_train_batches=0.5)
    assert search.batch_size == 19  # two batches, half of which is one
    search = finder(mode="binsearch")
    fit(Tiny(), search, GradientAccumulation(target_batch_size=9))
    assert search.batch_size == 9 and "more than target_batch_size=9" in reasons(search)[0]


def test_a_stream_ends_the_search_where_it_has_no_more() -> None:
    search = finder(mode="binsearch")
    fit(Tiny(), search, data=DataLoader(Stream(), batch_size=4))
    assert search.batch_size == 20 and "the data gives 20 samples at a time" in reasons(search)[0]
    search = finder()
    fit(Tiny(), search, data=DataLoader(Stream(), batch_size=4, drop_last=True))
    assert search.batch_size == 16 and "the data gives 0 samples at a time" in reasons(search)[0]


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_batches_that_are_none_and_batches_without_tensors() -> None:
    first = float(samples(1)[0][0][0])

    def nothing(items: list[Any]) -> Any:
        return None if float(items[0][0][0]) == first else default_collate(items)

    class Lists(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(default_collate(batch["items"]), batch_idx)

    search = finder(max_size=4)
    fit(Tiny(), search, data=loader(collate_fn=nothing))
    assert search.batch_size == 4
    search = finder(max_size=8)
    fit(Lists(), search, data=DataLoader(Stream(), batch_size=4, collate_fn=lambda items: {"items": Items(items)}))
    assert search.batch_size == 8


class Items(list[Any]):
    """No list to those who look for tensors in one."""


def test_what_nothing_fits_in_says_what_to_do() -> None:
    search = finder(memory_budget="130KiB", min_size=4)
    module = Wide()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with pytest.raises(MisconfigurationException, match=r"4 took at least .* of the 117 KiB .*MicroBatching.*LowBit"):
        fit(module, search, data=wide_loader())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert search.batch_size is None and reasons(search) == ["out of memory"]


# ------------------------------------------------------------------------------------------------------ what is refused


class Closed(BatchSampler):
    """Has made its batches before it is asked."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(range(20)), 4, False)
        self.batches = list(super().__iter__())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Batches:
    """No DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no DataLoader": (lambda: Batches(), "is a Batches, which is no DataLoader"),
    "no batch size": (lambda: DataLoader(list(loader()), batch_size=None), "the data set makes the batches itself"),
    "batches that are fixed": (lambda: DataLoader(samples(5), batch_sampler=Closed()), "makes batches of 4 .* is 2"),
    "lists of indices": (
        lambda: DataLoader(samples(5), batch_sampler=[[0, 1], [2, 3]]),  # type: ignore[arg-type]
        "list has no attribute `batch_size`",
    ),
    "two sizes": (
        lambda: CombinedLoader([loader(), loader(batch_size=2)]),
        "for all training loaders, but theirs are 4 and 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_whose_batch_size_can_not_be_set_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=f"{message}.*remove the finder"):
        fit(Tiny(), finder(), data=make())


def test_what_it_can_not_do_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"on cpu.*give it `memory_budget`, in bytes or as in '8GiB'"):
        fit(Tiny(), BatchSizeFinder())
    with pytest.raises(MisconfigurationException, match=r"a batch size of 21: a rank has 20 samples.*Lower `min_size`"):
        fit(Tiny(), finder(min_size=21))
    with pytest.raises(MisconfigurationException, match=r"can't work with MicroBatching: it splits each batch"):
        fit(Tiny(), finder(), MicroBatching())
    with pytest.raises(MisconfigurationException, match="in the Trainer's callbacks twice"):
        fit(Tiny(), finder(), finder(max_size=4))


# ------------------------------------------------------------------------------------------------------- what is left


def test_other_errors_go_through_and_everything_is_put_back() -> None:
    class Fails(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(batch[0]) == 8:
                raise RuntimeError("shapes differ")
            return super().training_step(batch, batch_idx)

    module, data = Fails(), loader()
    before = module.layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(module, finder(), data=data)
    assert torch.equal(module.layer.weight, before) and data.batch_size == 4
    assert not module.seen and module.layer.weight.grad is None


def test_memory_is_given_back() -> None:
    alive: list[Any] = []

    class Holding(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            big = batch[0] * self.layer.weight
            alive.append(weakref.ref(big))
            if len(big) > 8:
                raise torch.OutOfMemoryError
            return big.square().mean()

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            alive[:] = [item for item in alive if item() is not None]
            self.left = len(alive)

    gc.disable()  # it must not depend on when the collector runs
    try:
        fit(Holding(), finder(), look := Look())
    finally:
        gc.enable()
    assert look.left == 0


def test_others_see_nothing_of_the_search() -> None:
    seen: list[int] = []

    class Others(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen.append(len(batch[0]))

    data = loader()
    trainer = fit(Tiny(), finder(), Others(), data=data)
    assert seen == [16, 4] and trainer.num_training_batches == 2 and trainer.global_step == 2
    assert data.batch_size == 4 and len(data) == 5


def test_loaders_are_copied_and_not_made_again() -> None:
    class Special(DataLoader[Any]):
        def __init__(self, secret: str, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.secret = secret

    generator = torch.Generator()
    made = Special("x", samples(5), batch_size=3, shuffle=True, drop_last=True, generator=generator, timeout=0.0)
    own: Any = with_batch_size(made, 7)
    assert type(own) is Special and own.secret == "x" and own.batch_size == 7 and len(own) == 2
    for name in ("dataset", "sampler", "generator", "collate_fn", "drop_last", "worker_init_fn"):
        assert getattr(own, name) is getattr(made, name)
    assert made.batch_size == 3 and len(made) == 6 and made.batch_sampler.batch_size == 3  # type: ignore[union-attr]


def test_data_that_is_set_up_too_early_is_said() -> None:
    class Early(Tiny):
        def setup(self, stage: str) -> None:
            self.steps = self.trainer.estimated_stepping_batches

    module = Early()
    with pytest.warns(UserWarning, match=r"set up before BatchSizeFinder searched.*in `configure_optimizers`"):
        trainer = fit(module, finder())
    assert module.steps == 5 and trainer.num_training_batches == 2


@pytest.mark.parametrize("settings", [{"limit_train_batches": 0}, {"max_epochs": 0}])
def test_a_fit_that_trains_nothing(settings: dict[str, Any]) -> None:
    fit(Tiny(), finder(), **settings)


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("point", [("train batch end", 3), ("train batch end", 9), ("validation end", 9)])
def test_a_resume_goes_on_with_the_size_and_does_not_search(point: tuple[str, int], tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    settings: dict[str, Any] = {"max_epochs": 2, "val_check_interval": None}
    first, second = finder(), finder()
    whole = toy.run([first, ExactResume()], Limited, train=plain_loader, saves={path: point}, **settings)
    resumed = toy.run([second, ExactResume()], Limited, train=plain_loader, seed=9, ckpt_path=path, **settings)
    assert second.batch_size == first.batch_size == 8 and second.results == first.results
    tail = {batch: loss for batch, loss in whole.trace.items() if batch > point[1]}
    assert resumed.trace == tail and resumed.final["state_dict"].keys() == whole.final["state_dict"].keys()
    assert all(torch.equal(resumed.weights[name], value) for name, value in whole.weights.items())
    module: Any = resumed.trainer.lightning_module
    assert set(module.sizes) == {(8, 8)}


def test_a_checkpoint_without_a_size_keeps_the_configured_one(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    fit(Tiny(), save_at("on_train_epoch_end", path, 0), max_epochs=1)
    search = finder()
    with pytest.warns(UserWarning, match="the checkpoint has no batch size that it found"):
        trainer = fit(Tiny(), search, max_epochs=2, ckpt_path=path)
    assert search.batch_size is None and trainer.num_training_batches == 5


# ---------------------------------------------------------------------------------------------------- what is printed


def test_the_table_and_the_line(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(Wide(), finder(memory_budget="1MiB"), data=wide_loader(), limit_train_batches=1)
        fit(Tiny(), finder(max_size=4, min_size=4))
    printed, said = capsys.readouterr().out, [line for line in caplog.messages if "was found" in line]
    assert "BatchSizeFinder: 1 MiB, of which 10% are left free" in printed
    assert printed.count("fits") >= 3 and printed.count("out of memory") == 1 and "over " in printed
    assert "a batch size of 8 was configured, 256 was found" in said[0] and "another learning rate" in said[0]
    assert "max_size is 4" in said[1] and "another learning rate" not in said[1]


def test_lightnings_own_refuses_what_this_can() -> None:
    """So that a release that mends it is seen."""
    from lightning.pytorch.callbacks import BatchSizeFinder as Lightnings

    with pytest.raises(MisconfigurationException, match="cannot be used with dataloaders passed directly"):
        fit(Tiny(), Lightnings())


@pytest.mark.parametrize(("budget", "found"), [(None, 16), (700, 8)])
def test_what_cudas_allocator_says_decides(budget: int | None, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an allocator that gives out 50 bytes a sample."""
    given: list[int] = []

    class Asking(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            given.append(50 * len(batch[0]))
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 9999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: max(given, default=0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: given.clear())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1600))
    assert CudaMemory(torch.device("cuda", 0), None, 0.2).total == 800  # what this process may have
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
    search = finder(margin=0.2)
    memory = CudaMemory(torch.device("cuda", 0), budget, 0.2)
    assert memory.total == (budget or 1000)
    monkeypatch.setattr(search, "_memory", lambda *_: memory)
    fit(Asking(), search, data=loader(10))
    assert search.batch_size == found
    assert search.results[-1] == {
        "batch_size": 2 * found,
        "fits": False,
        "peak": 100 * found,
        "reason": "out of memory",
    }
