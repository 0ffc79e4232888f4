"""NoiseScaleAccumulation: let the batch grow while training, as far as the gradient's noise says that it pays.

A gradient is the true one plus noise that a larger batch averages away. The simple noise scale is the batch size at
which both are equally large, tr(Sigma) / |G|^2. Below it a batch twice as large saves nearly half of the steps; far
above it, it saves nothing. It grows as the loss falls. Squared norms of gradients at two batch sizes give unbiased
estimates of both parts: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training",
https://arxiv.org/abs/1812.06162, appendix A.1. An accumulation window has both for free.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.errors import check_choice, check_int, check_number
from lightning_accel.hooks import AccumulationWindow, Contract, Moment
from lightning_accel.hooks.clock import logs_now
from lightning_accel.hooks.data import window_is_open
from lightning_accel.hooks.gradients import gradients_of, part_of_square, squared_norm
from lightning_accel.hooks.weights import samples_of_a_batch, sum_over_ranks
from lightning_accel.hooks.window import steps_at, unknown_steps
from lightning_accel.schedules import Duration

__all__ = ["NoiseScaleAccumulation", "gradient_and_noise", "grown_factor", "noise_scale"]

_POWERS = {None: 0.0, "sqrt": 0.5, "linear": 1.0}
_ROUNDING = 1e-9


def gradient_and_noise(small_square: float, large_square: float, small: float, large: float) -> tuple[float, float]:
    """Unbiased estimates of |G|^2 and tr(Sigma), from the squared norms of two gradients of means.

    Args:
        small_square: The squared norm at the smaller batch size, or a mean of several.
        large_square: At the larger one; its samples may include those of the smaller.
        small: The smaller batch size, in any unit.
        large: The larger one, in the same unit, in which tr(Sigma) is too: that of one sample, or of one micro-batch.

    Example:
        >>> gradient_and_noise(small_square=1.0 + 8.0 / 2, large_square=1.0 + 8.0 / 16, small=2, large=16)
        (1.0, 8.0)
    """
    signal = (large * large_square - small * small_square) / (large - small)
    noise = (small_square - large_square) / (1 / small - 1 / large)
    return signal, noise


def noise_scale(signal: float, noise: float) -> float:
    """tr(Sigma) / |G|^2 of smoothed estimates: infinite where no gradient stands out, 0 where no noise does.

    Example:
        >>> noise_scale(signal=0.5, noise=16.0)
        32.0
    """
    if noise <= 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf


def grown_factor(factor: int, wanted: float, low: int, high: int, *, shrink: bool = False) -> int:
    """The next factor: nearer to ``wanted``, but not more than twice or less than half the present one.

    Args:
        factor: The present one.
        wanted: How many batches the noise scale is; may be infinite.
        low: The least factor.
        high: The largest.
        shrink: Whether it may also become smaller.

    Example:
        >>> grown_factor(4, wanted=6.2, low=1, high=64), grown_factor(4, wanted=90, low=1, high=64)
        (6, 8)
        >>> grown_factor(4, wanted=1, low=1, high=64), grown_factor(4, wanted=1, low=1, high=64, shrink=True)
        (4, 2)
    """
    least = max(low, (factor + 1) // 2) if shrink else factor
    most = min(high, 2 * factor)
    return max(least, min(most, round(min(wanted, float(most)))))


class NoiseScaleAccumulation(AccumulationWindow):
    """Make one optimizer step of as many training batches as the gradient's noise scale says, growing while training.

    Noise is measured in every window, from the difference between the gradient of its first batch on each rank and
    that of the window over all ranks. On a single device that needs windows of two batches at least.

    Args:
        min_factor: How many batches make a step at first, and at least. 1 needs several ranks under DDP.
        max_factor: How many at most.
        every: The time between two decisions, at each of which the factor at most doubles; an int is in optimizer
            steps.
        smoothing: How much of the averages of both estimates is kept at each window, in [0, 1).
        shrink: Whether the factor may also become smaller, at most halved at a decision.
        scale_lr: How the learning rate follows: ``"linear"``, times factor / min_factor; ``"sqrt"``, times the square
            root of it, as is usual with Adam; None, not at all. It multiplies what the scheduler set, in each step.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> growing = NoiseScaleAccumulation(max_factor=32, every="100step", scale_lr="sqrt")
        >>> trainer = Trainer(callbacks=[growing], logger=False, enable_checkpointing=False)
    """

    contract = Contract(
        purpose="Make one optimizer step of as many batches as the gradient's noise scale says.",
        touches=frozenset({"accumulation window"}),
        acts="at the start and the end of each window of batches",
        expects="larger effective batches where they pay, in the same memory",
        docs="methods/noise_scale_accumulation",
        reads=frozenset({"gradients"}),
        once=True,
        manual_optimization="there the module itself decides when to step. Accumulate in `training_step`, or set "
        "`automatic_optimization = True`.",
        refuses={
            "GradientAccumulation": "both set how many batches make an optimizer step. Remove one of them.",
            "GradientAccumulationScheduler": "both set how many batches make an optimizer step. Remove the scheduler.",
            "DeepSpeedStrategy": "its engine reduces and splits gradients inside the backward, so that the gradient of "
            "one batch can't be told from the window's. Use strategy='ddp' or FullyShardStrategy (accel_fsdp2), or "
            "GradientAccumulation with a schedule.",
        },
    )

    def __init__(
        self,
        min_factor: int = 2,
        max_factor: int = 64,
        every: str | int | Duration = "20step",
        smoothing: float = 0.95,
        shrink: bool = False,
        scale_lr: Literal["linear", "sqrt"] | None = None,
    ) -> None:
        self.min_factor = check_int("min_factor", min_factor, minimum=1)
        self.max_factor = check_int("max_factor", max_factor, minimum=1)
        if max_factor < min_factor:
            raise ValueError(f"Expected `max_factor` to be at least min_factor={min_factor}, but got {max_factor}.")
        self.every = Duration.parse("every", every)
        if self.every.value == 0:
            raise ValueError(f"Expected `every` to be longer than 0, but got {every!r}.")
        self.smoothing = check_number("smoothing", smoothing, 0, 1, open_high=True)
        if not isinstance(shrink, bool):
            raise TypeError(f"Expected `shrink` to be a bool, but got {shrink!r}.")
        self.shrink = shrink
        self._power = _POWERS[check_choice("scale_lr", scale_lr, tuple(_POWERS))]
        super().__init__(
            min_factor=min_factor,
            max_factor=max_factor,
            every=str(self.every),
            smoothing=self.smoothing,
            shrink=shrink,
            scale_lr=scale_lr,
        )

    def _forget(self) -> None:
        super()._forget()
        self.factor = self.min_factor
        self._signal = self._noise = 0.0  # averages of both estimates, in units of one rank's batch
        self._measured = 0  # windows that were
        self._decided = 0.0  # when the factor was last decided, in the unit of `every`
        self._small: Tensor | None = None  # the squared norm of this rank's first gradient of the window
        self._listened: list[Tensor] = []  # its parts, where they are seen on their way into the all-reduce
        self._listening = False
        self._heard: set[int] = set()  # parameters that are listened to
        self._ignored = 0
        self._ranks = 1
        self._samples: int | None = None  # in a batch of one rank
        self._rates: list[tuple[dict[str, Any], Any]] = []  # the groups whose rates are scaled now, and the true rates
        self._logs = False  # whether there is something new to log

    @property
    def is_neutral(self) -> bool:
        """Whether every step takes one batch."""
        return self.max_factor == 1

    @property
    def noise_scale(self) -> float:
        """The noise scale, in batches of one rank; NaN before the first measurement."""
        return noise_scale(self._signal, self._noise) if self._measured else math.nan

    # ------------------------------------------------------------------------------------------- how long a window is

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the Trainer's own counting of windows."""
        super().install(trainer, pl_module)
        if self.is_neutral:
            return
        reaches = not hasattr(trainer.strategy, "waiting_gradients")
        if self.min_factor == 1 and (trainer.world_size == 1 or not reaches):
            why = "under FullyShardStrategy" if not reaches else "on a single device"
            raise MisconfigurationException(
                f"NoiseScaleAccumulation(min_factor=1) can't measure noise {why}: with one batch in a step there is no "
                "second gradient to compare with. Set min_factor=2 (and halve the loader's batch size to start with "
                "steps of the same size), or train on several devices with strategy='ddp'."
            )
        self.on_undo(self._unscale)
        self.patch(trainer.strategy, "optimizer_step", self._step)

    def next_factor(self, now: Moment) -> int:
        """The factor of a window that starts at ``now``, decided anew where that is due."""
        position = self.every.elapsed(now)
        if self._measured and position - self._decided >= self.every.value - _ROUNDING:
            self._decided, self._logs = position, True
            wanted = self.noise_scale / self._ranks
            self.factor = grown_factor(self.factor, wanted, self.min_factor, self.max_factor, shrink=self.shrink)
        return self.factor

    def look_at(self, trainer: Trainer, *, agree: bool) -> None:
        """See how many ranks there are and how large batches are; listen to parameters that are new."""
        self._ranks = trainer.world_size
        if not agree:
            return
        samples = samples_of_a_batch(trainer, agree=True)
        self._samples = None if samples is None else samples // trainer.world_size
        if self.min_factor == 1:
            for parameter in trainer.lightning_module.parameters():
                if parameter.requires_grad and id(parameter) not in self._heard:
                    self._heard.add(id(parameter))
                    handle: Any = parameter.register_hook(self._listen)  # type: ignore[no-untyped-call]  # of torch
                    self.on_undo(handle.remove)

    def count_steps(self, batches: int, epochs: int, max_steps: int = -1) -> int | float:
        """The optimizer steps of a whole fit; infinite, since they depend on what will be measured."""
        if self.min_factor == self.max_factor:
            return steps_at(self.min_factor, batches, epochs, max_steps)
        return unknown_steps(f"{self.min_factor} to {self.max_factor} batches, as the noise scale says", max_steps)

    # ------------------------------------------------------------------------------------------------------ measuring

    def fill(self, trainer: Trainer, batch: Any, position: int) -> None:
        """Begin to measure a window."""
        if position == 1:
            self._small = None
            self._listened.clear()
            self._listening = self.min_factor == 1 and self._length == 1

    def _listen(self, gradient: Tensor) -> None:
        """See a gradient on its way into the all-reduce."""
        if self._listening:
            self._listened.append(squared_norm([gradient]))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the gradient of a window's first batch, before it meets that of other batches and ranks."""
        if self.is_neutral or self._position(trainer) != 1:
            return
        if self._listened:
            self._small = torch.stack([part.to(self._listened[0].device) for part in self._listened]).sum()
            self._listened.clear()
        elif window_is_open(trainer):
            own = getattr(trainer.strategy, "waiting_gradients", None)
            found = own() if own else [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._small = squared_norm(found) * self._length**2  # losses are divided by it
        self._listening = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the window's gradient, before it is clipped, and scale the learning rate."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.is_neutral:
            return
        taken, ranks = self._position(trainer), trainer.world_size
        if self._small is not None and taken * ranks > 1:
            self._measure(trainer, optimizer, taken * ranks)
        self._small = None
        if self._power:
            scale = (self.factor / self.min_factor) ** self._power
            if scale != 1.0:
                for group in optimizer.param_groups:
                    self._rates.append((group, group["lr"]))
                    group["lr"] = group["lr"] * scale  # a new number or tensor: the true one stays

    def _measure(self, trainer: Trainer, optimizer: Optimizer, large: int) -> None:
        assert self._small is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())  # the first gradient still has it
        small = self._small / scale**2 / trainer.world_size
        part = part_of_square(gradients_of(optimizer), trainer.world_size)
        own = torch.stack([small.double().cpu(), part.double().cpu()])
        small_square, large_square = sum_over_ranks(trainer, own).tolist()
        if not (math.isfinite(small_square) and math.isfinite(large_square)):
            if not self._ignored:
                rank_zero_warn(
                    f"The gradient of a window that ends with batch {self._ready(trainer) - 1} of epoch "
                    f"{trainer.current_epoch} holds inf or NaN: its noise is not measured. This is said once."
                )
            self._ignored += 1
            return
        signal, noise = gradient_and_noise(small_square, large_square, 1, large)
        self._measured += 1
        # the mean of all at first: the first one gets no more weight than the later ones
        keep = min(self.smoothing, 1 - 1 / self._measured)
        self._signal = keep * self._signal + (1 - keep) * signal
        self._noise = keep * self._noise + (1 - keep) * noise
        self._logs = self._logs or logs_now(trainer)  # logging takes longer than measuring

    def _step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Step with scaled rates; schedulers, other callbacks and checkpoints see the true ones."""
        try:
            return original(*args, **kwargs)
        finally:
            self._unscale()

    def _unscale(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the averages, after each decision and where loggers ask for it."""
        if self._logs and not window_is_open(trainer):
            self._logs = False
            found = {"noise_scale": self.noise_scale * (self._samples or 1), "accumulation_factor": float(self.factor)}
            finite = {name: value for name, value in found.items() if math.isfinite(value)}
            pl_module.log_dict(finite, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many windows were not measured."""
        super().on_train_end(trainer, pl_module)
        if self._ignored > 1:
            rank_zero_warn(f"The noise of {self._ignored} windows was not measured: their gradients held inf or NaN.")

    # --------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Where the present window began, its length, the averages, the factor and when it was decided."""
        return super().state_dict() | {
            "factor": self.factor,
            "signal": self._signal,
            "noise": self._noise,
            "measured": self._measured,
            "decided": self._decided,
            "small": None if self._small is None else self._small.cpu(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window that the checkpoint was taken in, and the averages."""
        super().load_state_dict(state_dict)
        self.factor, self._measured = state_dict["factor"], state_dict["measured"]
        self._signal, self._noise, self._decided = (state_dict[name] for name in ("signal", "noise", "decided"))
        self._small = state_dict["small"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what each rank measured of the open window; not on an exception, when the others may never come."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if state.get("small") is not None and not trainer.interrupted:
            own = torch.zeros(trainer.world_size, dtype=torch.float64)
            own[trainer.global_rank] = state["small"]
            state["small"] = sum_over_ranks(trainer, own).cpu()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take this rank's part of what a checkpoint has."""
        super().on_train_start(trainer, pl_module)
        if self._small is not None and self._small.dim():
            same = len(self._small) == trainer.world_size
            self._small = self._small[trainer.global_rank] if same else None
