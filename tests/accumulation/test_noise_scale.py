"""NoiseScaleAccumulation where the noise scale is known in closed form."""

from __future__ import annotations

import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler

from lightning_accel import ExactResume, GradientAccumulation, GradientClipping, NoiseScaleAccumulation
from lightning_accel.accumulation.noise_scale import gradient_and_noise, grown_factor, noise_scale
from lightning_accel.hooks.gradients import squared_norm
from tests.accumulation.noisy import Noisy, fit, noise_data, noise_loader
from tests.hooks.common import save_at


class Windows(Callback):
    """The factor, the estimate and the learning rate of each step, and what was logged."""

    def __init__(self) -> None:
        self.factors: list[int] = []
        self.taken: list[int] = []
        self.rates: list[float] = []
        self.logged: list[dict[str, float]] = []
        self._open = 0

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        self._open += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.taken.append(self._open)
        self._open = 0
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# ------------------------------------------------------------------------------------------------- the pure functions


def test_both_estimates_are_unbiased() -> None:
    small, large, scale, signal = 4, 12, 20.0, 2.0
    signals, noises = [], []
    for seed in range(400):
        x = noise_data(large, scale, seed, signal).tensors[0].double()
        squares = [float(x[:size].mean(0).square().sum()) for size in (small, large)]
        one_signal, one_noise = gradient_and_noise(*squares, small, large)
        signals.append(one_signal)
        noises.append(one_noise)
    for values, truth in ((signals, signal), (noises, scale * signal)):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert abs(statistics.mean(values) - truth) < 3 * error
        assert error < 0.1 * truth  # so that the bias of a wrong formula would be seen


def test_a_scale_without_signal_is_infinite_and_without_noise_nothing() -> None:
    assert noise_scale(2.0, 8.0) == 4.0
    assert noise_scale(-0.1, 8.0) == math.inf
    assert noise_scale(2.0, -0.1) == 0.0


@pytest.mark.parametrize(
    ("factor", "wanted", "shrink", "expected"),
    [
        (2, 3.4, False, 3),
        (2, math.inf, False, 4),
        (2, 1.0, False, 2),
        (8, 1.0, True, 4),
        (3, 0.0, True, 2),
        (2, 0.0, True, 2),  # the least
        (10, 100.0, False, 16),  # the largest
        (16, 100.0, False, 16),
    ],
)
def test_the_factor_moves_towards_the_scale(factor: int, wanted: float, shrink: bool, expected: int) -> None:
    assert grown_factor(factor, wanted, 2, 16, shrink=shrink) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_squared_norm_is_that_of_all_numbers(dtype: torch.dtype) -> None:
    parts = [torch.full((3, 2), 200.0, dtype=dtype), torch.tensor(10.0, dtype=torch.float32)]
    assert float(squared_norm(parts)) == pytest.approx(6 * 200.0**2 + 100.0, rel=1e-3)  # too much for float16 itself
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([3.0, 4.0]), (5,), check_invariants=True)
    assert float(squared_norm([sparse])) == 49.0
    assert float(squared_norm([])) == 0.0


# -------------------------------------------------------------------------------------------------------- in a fit


def test_the_factor_follows_the_noise_scale_and_is_logged() -> None:
    watch = Windows()
    growing = NoiseScaleAccumulation(2, 64, every="20step", smoothing=0.98)
    fit(Noisy(), growing, watch, data=noise_loader(1200, scale=8.0), log_every_n_steps=1)
    assert watch.taken[:20] == [2] * 20
    assert watch.taken[20] in (3, 4)
    assert 6 <= growing.factor <= 11
    assert growing.noise_scale == pytest.approx(8.0, rel=0.35)
    last = watch.logged[-1]
    assert last["noise_scale"] == pytest.approx(4 * growing.noise_scale)  # in samples, of which a batch has 4
    assert last["accumulation_factor"] == growing.factor


def test_the_estimate_is_the_one_made_by_hand() -> None:
    """Two windows of three and a short one of two: the averages of both estimates, from the data itself."""
    growing = NoiseScaleAccumulation(3, 3, smoothing=0.5)
    data = noise_loader(8, scale=4.0)
    fit(Noisy(), growing, data=data)
    batches = [x.double().mean(0) for (x,) in data]
    kept = [0.0, 0.0]
    for number, window in enumerate((batches[:3], batches[3:6], batches[6:]), start=1):
        small, large = window[0].square().sum(), torch.stack(window).mean(0).square().sum()
        found = gradient_and_noise(float(small), float(large), 1, len(window))
        keep = min(0.5, 1 - 1 / number)
        kept = [keep * old + (1 - keep) * new for old, new in zip(kept, found, strict=True)]
    assert growing.noise_scale == pytest.approx(noise_scale(*kept), rel=1e-4)


def test_clipping_and_a_scaler_do_not_disturb_the_estimate() -> None:
    plain = NoiseScaleAccumulation(3, 3)
    fit(Noisy(), plain, data=noise_loader(9, scale=4.0))
    clipped = NoiseScaleAccumulation(3, 3)
    fit(Noisy(), clipped, GradientClipping(0.01), data=noise_loader(9, scale=4.0))
    assert clipped.noise_scale == plain.noise_scale
    scaled = NoiseScaleAccumulation(3, 3)
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    fit(Noisy(), scaled, data=noise_loader(9, scale=4.0), plugins=[precision])
    assert scaled.noise_scale == pytest.approx(plain.noise_scale, rel=0.05)  # half precision


def test_it_shrinks_only_where_it_may() -> None:
    for shrink in (False, True):
        changing = NoiseScaleAccumulation(2, 64, every=4, smoothing=0.5, shrink=shrink)
        changing._forget()
        x = torch.cat([noise_data(160, 160.0).tensors[0], noise_data(320, 0.4).tensors[0]])
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
        watch = Windows()
        fit(Noisy(), changing, watch, data=data)
        assert max(watch.taken) >= 4
        assert (changing.factor == 2) == shrink


@pytest.mark.parametrize(("scale_lr", "power"), [("linear", 1.0), ("sqrt", 0.5), (None, 0.0)])
@pytest.mark.parametrize("name", ["OneCycleLR", "ReduceLROnPlateau", "StepLR", "none"])
def test_the_rate_is_what_the_scheduler_set_times_the_growth(name: str, scale_lr: Any, power: float) -> None:
    def configure(module: Noisy) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scheduler: Any = {
            "OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=200),
            "ReduceLROnPlateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=0),
            "StepLR": lambda: lr_scheduler.StepLR(optimizer, 2, 0.9),
            "none": lambda: None,
        }[name]()
        if scheduler is None:
            return optimizer
        monitor = {"monitor": "noise_scale", "strict": False}
        return [optimizer], [{"scheduler": scheduler, "interval": "step", **monitor}]

    class Between(Windows):
        """The rates that everyone else sees: between two steps."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.logged.append({"lr": float(trainer.optimizers[0].param_groups[0]["lr"])})

    class Used(Callback):
        """The rates that steps are made with."""

        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            def note(optimizer: Any, args: Any, kwargs: Any) -> None:
                self.rates.append(float(optimizer.param_groups[0]["lr"]))

            trainer.optimizers[0].register_step_post_hook(note)

    runs: dict[Any, tuple[Between, Used, Any]] = {}
    for how in (None, scale_lr):
        growing, between, used = NoiseScaleAccumulation(2, 8, every=5, scale_lr=how), Between(), Used()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ReduceLROnPlateau conditioned on metric")
            trainer = fit(Noisy(configure), growing, between, used, data=noise_loader(120, scale=30.0))
        runs[how] = between, used, trainer
    (plain, plain_used, plain_trainer), (scaled, scaled_used, trainer) = runs[None], runs[scale_lr]
    assert scaled.logged == plain.logged  # nobody else sees it
    assert max(scaled.taken) > 2
    expected = [rate * (factor / 2) ** power for rate, factor in zip(plain_used.rates, scaled.taken, strict=True)]
    full = slice(0, -1)  # the last window may be short, which is no smaller factor
    assert scaled_used.rates[full] == pytest.approx(expected[full])
    state, plain_state = trainer.optimizers[0].state_dict(), plain_trainer.optimizers[0].state_dict()
    assert state["param_groups"] == plain_state["param_groups"]


def test_a_resume_inside_a_window_is_exact(tmp_path: Path) -> None:
    path, data = tmp_path / "saved.ckpt", noise_loader(60, scale=12.0)

    def make() -> NoiseScaleAccumulation:
        return NoiseScaleAccumulation(2, 16, every=4, scale_lr="sqrt")

    whole, watch, module = make(), Windows(), Noisy()
    fit(module, whole, ExactResume(), watch, save_at("on_train_batch_end", path, 20), data=data, max_epochs=2)
    resumed, again = make(), Noisy()
    saved = torch.load(path, weights_only=True)["callbacks"][resumed.state_key]
    assert saved["small"] is not None and saved["factor"] > 2
    fit(again, resumed, ExactResume(), data=data, max_epochs=2, ckpt_path=path)
    assert torch.equal(module.weight, again.weight)
    assert (resumed.factor, resumed._signal, resumed._noise) == (whole.factor, whole._signal, whole._noise)


def test_inf_and_nan_are_not_measured_and_said() -> None:
    class Broken(Noisy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx in (4, 10) else 1.0)

    growing = NoiseScaleAccumulation(2, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(Broken(lambda module: torch.optim.SGD(module.parameters(), lr=0.0)), growing, data=noise_loader(12, 4.0))
    assert growing._measured == 4 and math.isfinite(growing.noise_scale)
    texts = [str(warning.message) for warning in said]
    assert sum("its noise is not measured. This is said once" in text for text in texts) == 1
    assert any("The noise of 2 windows was not measured" in text for text in texts)


def test_the_number_of_steps_is_unknown_where_the_factor_is() -> None:
    counted: list[float] = []

    def configure(module: Noisy) -> Any:
        counted.append(module.trainer.estimated_stepping_batches)
        return torch.optim.SGD(module.parameters(), lr=0.1)

    fit(Noisy(configure), NoiseScaleAccumulation(2, 2), data=noise_loader(9, 4.0))
    fit(Noisy(configure), NoiseScaleAccumulation(2, 4), data=noise_loader(9, 4.0), max_epochs=-1, max_steps=4)
    with pytest.warns(UserWarning, match="unknown: a step takes 2 to 4 batches.*set `max_steps`"):
        fit(Noisy(configure), NoiseScaleAccumulation(2, 4), data=noise_loader(9, 4.0))
    assert counted == [5, 4, math.inf]


def test_one_device_and_one_batch_have_nothing_to_compare() -> None:
    with pytest.raises(MisconfigurationException, match=r"on a single device.*Set min_factor=2"):
        fit(Noisy(), NoiseScaleAccumulation(1, 4), data=noise_loader(4, 4.0))


def test_two_that_decide_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="both set how many batches make an optimizer step"):
        fit(Noisy(), NoiseScaleAccumulation(), GradientAccumulation(2), data=noise_loader(4, 4.0))


def test_max_below_min_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `max_factor` to be at least min_factor=8, but got 4"):
        NoiseScaleAccumulation(8, 4)
