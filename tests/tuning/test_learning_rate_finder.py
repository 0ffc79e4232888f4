"""LearningRateFinder: after it a run is, bit for bit, the run that was configured with the rate from the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler

from lightning_accel import LearningRateFinder, NoEffectWarning
from lightning_accel.tuning.learning_rate_finder import rate_at, smoothed, steepest, valley
from tests.conformance import toy
from tests.conformance.rows import EXACT, everything
from tests.conformance.toy import Digits, DigitsData, assert_same_training
from tests.hooks.common import Tiny, fit, loader, save_at
from tests.methods import build, use

# ------------------------------------------------------------------------------------------------- the pure functions


def test_the_rates_are_equally_spaced_exponents() -> None:
    rates = [rate_at(step, 5, 1e-4, 1.0) for step in range(5)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert rates[0] == 1e-4 and rates[-1] == 1.0


def test_smoothing_is_right_from_the_first_loss() -> None:
    assert smoothed([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 3.0], 0.5)[1] == pytest.approx((0.5 * 1.0 + 3.0) / 1.5)
    assert smoothed([1.0, 3.0], 0.0) == [1.0, 3.0]


def curve(count: int = 60, fall: float = 30.0, rise: float = 45.0) -> list[float]:
    """A loss that falls fastest at step ``fall`` and rises after step ``rise``."""
    return [2 - 1 / (1 + math.exp(-(n - fall) / 3)) + max(0.0, n - rise) ** 2 / 50 for n in range(count)]


def test_both_methods_find_the_way_down() -> None:
    assert steepest(curve()) == 30
    place = valley(curve())
    assert place is not None and 18 <= place <= 35
    noisy = [value + 0.02 * (-1) ** n for n, value in enumerate(curve())]
    place = valley(noisy)
    assert place is not None and 18 <= place <= 40


@pytest.mark.parametrize(
    "losses", [[], [1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1 - 1e-9, 1 - 2e-9, 1 - 3e-9]]
)
def test_a_loss_that_does_not_fall_gives_none(losses: list[float]) -> None:
    assert steepest(losses) is None
    assert valley(losses) is None


# ----------------------------------------------------------------------------------------- the run after the search


def finder(**arguments: Any) -> LearningRateFinder:
    return LearningRateFinder(**{"min_lr": 1e-5, "num_steps": 30, **arguments})


class TwoRates(Digits):
    """Two groups whose rates are 4:1, under any scheduler; ``factor`` scales both."""

    def __init__(self, scheduler: str = "none", rate: float = 3e-3) -> None:
        super().__init__(scheduler=None)
        self.name, self.rate = scheduler, rate

    def configure_optimizers(self) -> Any:
        early, late = [*self.conv.parameters(), *self.hidden.parameters()], [*self.between.parameters()]
        late += [*self.again.parameters(), *self.head.parameters(), *self.norm.parameters()]
        groups = [{"params": early, "lr": self.rate / 4}, {"params": late}]
        optimizer = torch.optim.AdamW(groups, lr=self.rate)
        made = SCHEDULERS[self.name](optimizer, self.rate)
        if made is None:
            return optimizer
        interval = {"interval": "step", "monitor": "loss", "strict": False}
        return [optimizer], [{"scheduler": item, **interval} for item in made]


def warm_up(optimizer: Any) -> Any:
    return lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)


def cosine(optimizer: Any) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=14, eta_min=1e-5)


SCHEDULERS: dict[str, Callable[[Any, float], Any]] = {
    "none": lambda optimizer, rate: None,
    "LambdaLR": lambda optimizer, rate: [lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))],
    "StepLR": lambda optimizer, rate: [lr_scheduler.StepLR(optimizer, 3, 0.7)],
    "OneCycleLR": lambda optimizer, rate: [lr_scheduler.OneCycleLR(optimizer, [rate / 4, rate], 30, div_factor=7.0)],
    "CyclicLR": lambda optimizer, rate: [
        lr_scheduler.CyclicLR(optimizer, [rate / 32, rate / 8], [rate / 4, rate], 4, cycle_momentum=False)
    ],
    "ReduceLROnPlateau": lambda optimizer, rate: [
        lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs", min_lr=1e-6)
    ],
    "a warm-up": lambda optimizer, rate: [warm_up(optimizer)],
    "SequentialLR": lambda optimizer, rate: [
        lr_scheduler.SequentialLR(optimizer, [warm_up(optimizer), cosine(optimizer)], [4])
    ],
    "ChainedScheduler": lambda optimizer, rate: [
        lr_scheduler.ChainedScheduler([warm_up(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)])
    ],
    "two": lambda optimizer, rate: [
        warm_up(optimizer),
        lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs"),
    ],
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
def test_it_is_the_run_configured_with_the_rate(name: str) -> None:
    search = finder()
    arguments: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 7, "val_check_interval": None}
    found = toy.run([search], lambda: TwoRates(name), **arguments)
    assert search.rate is not None and search.rate != 3e-3
    configured = toy.run([], lambda: TwoRates(name, search.rate), **arguments)  # type: ignore[arg-type]
    assert found.rates == configured.rates
    assert_same_training(found, configured, name)


ROWS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "everything": (everything(), {}),
    "a datamodule": ([], {"datamodule": DigitsData()}),
    "workers": ([EXACT], {"train": lambda: toy.train_loader(num_workers=1, persistent_workers=True)}),
    "windows": ([use("GradientAccumulation", factor=3)], {}),
}


@pytest.mark.parametrize("name", ROWS)
def test_with_other_methods_and_data(name: str) -> None:
    specs, arguments = ROWS[name]
    arguments = {"max_epochs": 2, "limit_train_batches": 7, "val_check_interval": None, **arguments}
    search = finder()
    found = toy.run([search, *map(build, specs)], lambda: TwoRates("LambdaLR"), **arguments)
    assert search.rate is not None
    configured = toy.run([*map(build, specs)], lambda: TwoRates("LambdaLR", search.rate), **arguments)  # type: ignore[arg-type]
    assert_same_training(found, configured, name)


def test_a_monitor_logs_the_rate_from_the_first_step_on(tmp_path: Path) -> None:
    search, logger = finder(), CSVLogger(tmp_path)
    module = Tiny(lambda module: torch.optim.SGD(module.parameters(), lr=1e-4))
    monitor = LearningRateMonitor(logging_interval="step")
    fit(module, search, monitor, logger=logger, log_every_n_steps=1, max_epochs=2)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert [float(line.split(",")[lines[0].split(",").index("lr-SGD")]) for line in lines[1:]] == [search.rate] * 10


def test_a_resume_does_not_search_again(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    whole, first = Tiny(), finder()
    fit(whole, first, save_at("on_train_epoch_end", path, 0), max_epochs=2)
    again, second = Tiny(lr=7.0), finder()
    fit(again, second, max_epochs=2, ckpt_path=path)
    assert torch.equal(whole.layer.weight, again.layer.weight)
    assert second.rate == first.rate and second.results == first.results
    assert len(again.seen) == 5  # nothing was tried
    fit(Tiny(), save_at("on_train_epoch_end", path, 0), max_epochs=1)
    third = finder()
    with pytest.warns(UserWarning, match="the checkpoint has no rate that it found"):
        fit(Tiny(), third, max_epochs=2, ckpt_path=path)
    assert third.rate is None


def test_the_results_and_the_curve(tmp_path: Path) -> None:
    path = tmp_path / "curves" / "found.png"
    search = finder(plot=str(path), max_lr=1e3)
    fit(Tiny(), search)
    results = search.results
    assert len(results["rates"]) == len(results["losses"]) == len(results["smoothed"]) < 30  # it diverged and stopped
    assert results["rates"] == sorted(results["rates"]) and results["rates"][0] == 1e-5
    assert search.rate == results["valley"]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in path.parent.iterdir()] == ["found.png"]
    all_steps = finder(max_lr=1e3, early_stop=None)
    fit(Tiny(), all_steps)
    assert len(all_steps.results["rates"]) > len(results["rates"])


def test_a_curve_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not draw its curve"):
        fit(Tiny(), finder(plot=str(tmp_path / "file" / "found.png")))


def test_a_loss_that_never_falls_keeps_the_rate() -> None:
    class Flat(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * 0 + 1

    search, module = finder(), Flat()
    with pytest.warns(NoEffectWarning, match="the loss did not fall in 30 steps"):
        trainer = fit(module, search)
    assert search.rate is None
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_is_left_out() -> None:
    class Some(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return None if len(self.seen) % 3 == 0 else self.loss(batch)

    search = finder()
    fit(Some(), search)
    assert len(search.results["rates"]) == 20


def test_what_it_can_not_do_is_refused() -> None:
    class Manual(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="can't work with manual optimization"):
        fit(Manual(), finder())
    with pytest.raises(MisconfigurationException, match="all rates are 0"):
        fit(Tiny(lr=0.0), finder())


def test_a_scheduler_of_an_unknown_kind_is_said() -> None:
    class Own:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self, *_: Any) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    class Stepped(Tiny):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": Own(optimizer)}]

    with pytest.warns(UserWarning, match="does not know how Own keeps rates"):
        fit(Stepped(configure), finder())


@pytest.mark.skipif(lightning.__version__.startswith("2.5."), reason="that of Lightning 2.5 sets no optimizer's rates")
def test_lightning_flattens_the_shares_and_this_keeps_them() -> None:
    """What Lightning's own finder does to groups of 100:1, so that a release that mends it is seen."""
    from lightning.pytorch.callbacks import LearningRateFinder as Lightnings

    def configure(module: LightningModule) -> Any:
        weight, bias = module.parameters()
        return torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.001}])

    callback = Lightnings(num_training_steps=40, early_stop_threshold=None)
    theirs = fit(Tiny(configure), callback, data=loader(), enable_checkpointing=True, max_epochs=9)
    rates = [group["lr"] for group in theirs.optimizers[0].param_groups]
    assert rates[0] == rates[1]
    search = finder()
    ours = fit(Tiny(configure), search)
    rates = [group["lr"] for group in ours.optimizers[0].param_groups]
    assert rates[0] == search.rate and rates[1] == pytest.approx(rates[0] / 100)
