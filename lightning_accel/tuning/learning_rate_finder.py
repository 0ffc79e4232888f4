"""LearningRateFinder: a range test before training, and the rate that it suggests.

The rate of a few steps on the side is raised exponentially; where the loss falls fastest, a good rate is near: Smith
2017, "Cyclical Learning Rates for Training Neural Networks", https://arxiv.org/abs/1506.01186, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_accel.errors import check_choice, check_int, check_number
from lightning_accel.hooks import AccelCallback, Contract
from lightning_accel.hooks.atomic import write_beside
from lightning_accel.hooks.rates import configured_rates, reconfigure_rates, set_rates, unknown_schedulers
from lightning_accel.hooks.trial import before_training, training_batches, trial
from lightning_accel.hooks.weights import sum_over_ranks

__all__ = ["LearningRateFinder", "rate_at", "smoothed", "steepest", "valley"]


def rate_at(step: int, num_steps: int, min_lr: float, max_lr: float) -> float:
    """The rate of one step of an exponential sweep.

    Example:
        >>> [round(rate_at(step, 3, 1e-4, 1.0), 6) for step in range(3)]
        [0.0001, 0.01, 1.0]
    """
    share = step / max(1, num_steps - 1)
    return max_lr if share == 1 else float(min_lr * (max_lr / min_lr) ** share)


def smoothed(losses: Sequence[float], smoothing: float) -> list[float]:
    """Exponential moving averages of losses, each divided by the weights that are in it.

    Example:
        >>> smoothed([1.0, 1.0, 4.0], 0.5)[:2]
        [1.0, 1.0]
    """
    average, weight, found = 0.0, 0.0, []
    for loss in losses:
        average = smoothing * average + (1 - smoothing) * loss
        weight = smoothing * weight + 1 - smoothing
        found.append(average / weight)
    return found


def steepest(losses: Sequence[float]) -> int | None:
    """Where the losses of equally spaced exponents fall fastest, before their least; None where they do not fall."""
    values = torch.tensor(losses, dtype=torch.float64)
    if len(values) < 3:
        return None
    before = values[: int(values.argmin()) + 1]
    if not _falls(float(before.max()), float(before[-1])):
        return None
    return int(torch.gradient(values)[0][: len(before)].argmin())


def _falls(high: float, low: float) -> bool:
    """Whether that is more than rounding."""
    return high - low > 1e-6 * abs(high)


def valley(losses: Sequence[float]) -> int | None:
    """The middle of the longest way down, as a longest falling subsequence; None where the losses do not fall.

    The default of fastai: steadier than the steepest point, which one lucky batch can move.
    """
    length, previous = [1] * len(losses), list(range(len(losses)))
    for place in range(len(losses)):
        for before in range(place):
            if losses[place] < losses[before] and length[place] < length[before] + 1:
                length[place], previous[place] = length[before] + 1, before
    end = max(range(len(losses)), key=lambda place: length[place], default=0)
    if len(losses) < 3 or length[end] < 3:
        return None
    way = [end]
    while previous[way[-1]] != way[-1]:
        way.append(previous[way[-1]])
    return way[len(way) // 2] if _falls(losses[way[-1]], losses[end]) else None


class LearningRateFinder(AccelCallback):
    """Find a learning rate before training, and train with it.

    A sweep of rates is tried on the side, on batches of the fit; then weights, the optimizer, random numbers, data and
    every counter are put back, and the optimizer and its schedulers are brought to where they would be had they been
    configured with the rate that was found. Groups keep their shares of it.

    Args:
        min_lr: The rate of the first step, of the group with the highest configured rate.
        max_lr: The rate of the last step.
        num_steps: How many optimizer steps are tried.
        method: ``"valley"``, the middle of the longest way down, or ``"steepest"``, where the loss falls fastest.
        smoothing: How much of the average loss is kept at each step, in [0, 1).
        early_stop: The sweep ends where the average loss is this many times the least so far, or not finite; None:
            only where it is not finite.
        plot: Where the curve is drawn, as PNG; None: nowhere.
        enabled: False trains with the configured rate.

    Attributes:
        rate: The rate that was found, of the group with the highest one; None where none was.
        results: ``rates``, ``losses`` (means over ranks), ``smoothed``, and the rates by ``valley`` and ``steepest``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> finder = LearningRateFinder(max_lr=0.5, num_steps=200)
        >>> trainer = Trainer(callbacks=[finder], logger=False, enable_checkpointing=False)
    """

    contract = Contract(
        purpose="Find a learning rate by a range test before training.",
        touches=frozenset({"parameter groups"}),
        acts="once, before training",
        expects="a learning rate that fits the model and the batch size",
        docs="methods/learning_rate_finder",
        once=True,
        manual_optimization="there the module itself steps its optimizers, maybe several with a loss each. Find the "
        "rate of each with a module of automatic optimization, or remove the finder.",
    )

    def __init__(
        self,
        min_lr: float = 1e-6,
        max_lr: float = 1.0,
        num_steps: int = 100,
        method: Literal["valley", "steepest"] = "valley",
        smoothing: float = 0.9,
        early_stop: float | None = 4.0,
        plot: str | None = None,
        enabled: bool = True,
    ) -> None:
        self.min_lr = check_number("min_lr", min_lr, 0, math.inf, open_low=True, open_high=True)
        self.max_lr = check_number("max_lr", max_lr, self.min_lr, math.inf, open_low=True, open_high=True)
        self.num_steps = check_int("num_steps", num_steps, minimum=3)
        self.method = check_choice("method", method, ("valley", "steepest"))
        self.smoothing = check_number("smoothing", smoothing, 0, 1, open_high=True)
        self.early_stop = None if early_stop is None else check_number("early_stop", early_stop, 1, math.inf)
        if plot is not None and not isinstance(plot, str):
            raise TypeError(f"Expected `plot` to be a path or None, but got {plot!r}.")
        if not isinstance(enabled, bool):
            raise TypeError(f"Expected `enabled` to be a bool, but got {enabled!r}.")
        self.plot, self.enabled = plot, enabled
        super().__init__(
            min_lr=self.min_lr,
            max_lr=self.max_lr,
            num_steps=num_steps,
            method=method,
            smoothing=self.smoothing,
            early_stop=self.early_stop,
            enabled=enabled,
        )
        self._fresh()

    def _fresh(self) -> None:
        self.rate: float | None = None
        self.results: dict[str, Any] = {}
        self._resumed = False

    @property
    def is_neutral(self) -> bool:
        """Whether it is off."""
        return not self.enabled

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the search run before training begins."""
        self._fresh()
        if self.enabled:
            before_training(self, trainer, partial(self._search, trainer, pl_module))

    def _search(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed:
            if self.rate is None:
                rank_zero_warn(
                    "LearningRateFinder does not search in a run that goes on from a checkpoint, and the checkpoint "
                    "has no rate that it found: the run goes on with the rates of the checkpoint."
                )
            return
        optimizer = trainer.optimizers[0]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        configured = configured_rates(optimizer, schedulers)
        highest = max(configured)
        if highest <= 0:
            raise MisconfigurationException(
                "LearningRateFinder keeps the groups' shares of the highest rate, but all rates are 0: configure the "
                "optimizer with a rate above 0."
            )
        shares = [rate / highest for rate in configured]
        if unknown := unknown_schedulers(schedulers):
            rank_zero_warn(
                f"LearningRateFinder does not know how {', '.join(unknown)} keeps rates, and leaves it as it is: if it "
                "sets the old rate again, configure the optimizer with what was found, and remove the finder."
            )
        with trial(trainer, pl_module, without=[self]) as side:
            side.start()
            batches = training_batches(trainer)
            rates, losses = self._sweep(trainer, side, batches, shares)
        found = smoothed(losses, self.smoothing)
        places = {"valley": valley(found), "steepest": steepest(found)}
        named = {name: None if place is None else rates[place] for name, place in places.items()}
        self.results = {"rates": rates, "losses": losses, "smoothed": found, **named}
        self.rate = named[self.method]
        if self.rate is None:
            self.warn_no_effect(
                f"the loss did not fall in {len(losses)} steps at rates from {self.min_lr:g} to "
                f"{rates[-1] if rates else self.min_lr:g}, so the configured rate stays. Try more steps, other bounds."
            )
        else:
            reconfigure_rates(optimizer, schedulers, [self.rate * share for share in shares])
            rank_zero_info(f"LearningRateFinder: {highest:g} was configured, {self.rate:.3g} was found.")
        if self.plot is not None and trainer.is_global_zero:
            self._draw(Path(self.plot))

    def _sweep(
        self, trainer: Trainer, side: Any, batches: Iterator[Any], shares: list[float]
    ) -> tuple[list[float], list[float]]:
        """The rates that were tried and the mean losses over all ranks: all of them see the same, and stop together."""
        rates: list[float] = []
        losses: list[float] = []
        least = math.inf
        for step in range(self.num_steps):
            rate = rate_at(step, self.num_steps, self.min_lr, self.max_lr)
            set_rates(trainer.optimizers[0], [rate * share for share in shares])
            own = side.step(batches)
            pair = torch.tensor([0.0, 0.0] if own is None else [float(own), 1.0], dtype=torch.float64)
            total, count = sum_over_ranks(trainer, pair).tolist()
            if count == 0:  # no training_step returned a loss
                continue
            loss = total / count
            if not math.isfinite(loss):
                break
            rates.append(rate)
            losses.append(loss)
            average = smoothed(losses, self.smoothing)[-1]
            least = min(least, average)
            if self.early_stop is not None and average > least + (self.early_stop - 1) * abs(least):
                break
        return rates, losses

    def _draw(self, path: Path) -> None:
        try:
            with write_beside(path) as partial_path:
                draw_curve(self.results, self.rate, partial_path)
        except OSError as error:  # the other ranks go on, and would wait for this one
            rank_zero_warn(f"LearningRateFinder could not draw its curve: {error}.")

    # --------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What was found; the rate itself is in the states of the optimizer and the schedulers."""
        return {"rate": self.rate, "results": self.results} if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was found."""
        if state_dict:
            self.rate, self.results = state_dict["rate"], state_dict["results"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that this run goes on from a checkpoint."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._resumed = True


def draw_curve(results: dict[str, Any], rate: float | None, path: Path) -> None:
    """Draw the losses of a sweep against its rates, as PNG.

    Args:
        results: What :attr:`LearningRateFinder.results` has.
        rate: The rate to mark.
        path: The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(results["rates"], results["losses"], color="#b8c4d6", lw=1, label="loss")
    axes.plot(results["rates"], results["smoothed"], color="#3a6ea5", lw=1.6, label="smoothed")
    if rate is not None:
        axes.axvline(rate, color="#d9730d", ls="--", lw=1, label=f"found: {rate:.3g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.legend(frameon=False)
    figure.savefig(path, format="png")
