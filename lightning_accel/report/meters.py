"""The callback that measures a run without taking part in it.

It draws no random numbers, touches no tensor of the run and logs nothing: the run with it is bit for bit the run
without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_accel.hooks.clock import moment
from lightning_accel.report.record import Point
from lightning_accel.report.sizes import (
    PeakMemory,
    count_nonzeros,
    count_parameters,
    optimizer_state_bytes,
    state_dict_bytes,
)

__all__ = ["Meter"]


class Meter(Callback):
    """Records the history of every logged metric, the time and memory of the fit, and the sizes at its end.

    Args:
        on_progress: Called now and then with the fraction of the fit that is done, or None where that is not known.
        progress_every: Seconds between two such calls, at least.

    Attributes:
        history: The points of each metric, in order of time.
        monitored: Names of the metrics that the validation loop logged.
        measured: What :class:`~lightning_accel.report.record.Run` calls ``seconds_fit``, ``steps``, ``metrics``,
            ``peak_memory_bytes``, ... ; filled when the fit has ended.

    Example:
        >>> from lightning_accel.report.meters import Meter
        >>> meter = Meter()
        >>> # Trainer(callbacks=[meter]).fit(module); meter.measured["seconds_fit"]
    """

    def __init__(
        self, on_progress: Callable[[float | None], None] | None = None, *, progress_every: float = 0.5
    ) -> None:
        self.history: dict[str, list[Point]] = {}
        self.monitored: list[str] = []
        self.measured: dict[str, Any] = {}
        self._on_progress = on_progress
        self._progress_every = progress_every
        self._next_progress = 0.0
        self._before_validation: set[str] = set()
        self._memory = PeakMemory()
        self._began: float | None = None

    def begin(self, device: torch.device | None = None) -> None:
        """Start the clock; call it right before ``trainer.fit``, else it starts in ``setup``, after the data's."""
        self._memory.start(device)
        self._began = time.perf_counter()

    def end(self) -> None:
        """Stop the clock; call it right after ``trainer.fit``, else it stops in ``on_fit_end``."""
        assert self._began is not None
        if self._memory.kind == "cuda":
            torch.cuda.synchronize()
        paused = self.measured.pop("paused", 0.0)
        self.measured["seconds_fit"] = time.perf_counter() - self._began - paused

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock unless ``begin`` did."""
        if stage == "fit" and self._began is None:
            self.begin(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell how far the fit is, at most every ``progress_every`` seconds."""
        if self._on_progress is None or (now := time.perf_counter()) < self._next_progress:
            return
        self._next_progress = now + self._progress_every
        # With several ranks `moment` may be a collective, which the ranks would enter at different times.
        self._on_progress(moment(trainer).fit if trainer.world_size == 1 else None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which metrics were there before, to tell the validation loop's from the training loop's."""
        self._before_validation = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the validation metrics."""
        if trainer.sanity_checking:
            return
        new = [name for name in trainer.callback_metrics if name not in self._before_validation]
        self.monitored += [name for name in new if name not in self.monitored]
        self._record(trainer, self.monitored)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the training metrics."""
        self._record(trainer, [name for name in trainer.callback_metrics if name not in self.monitored])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the sizes, while the module and its optimizers still are as the methods made them."""
        assert self._began is not None
        began = time.perf_counter()
        peak, kind = self._memory.stop(), self._memory.kind
        model_bytes, compressed = state_dict_bytes(pl_module)
        self.measured = {
            "steps": trainer.global_step,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "monitored": self.monitored,
            "history": self.history,
            "peak_memory_bytes": peak,
            "memory_kind": kind,
            "optimizer_state_bytes": optimizer_state_bytes(trainer.optimizers),
            "parameters": count_parameters(pl_module),
            "nonzeros": count_nonzeros(pl_module),
            "model_bytes": model_bytes,
            "model_bytes_compressed": compressed,
            "seconds_fit": began - self._began,
            "paused": time.perf_counter() - began,
        }

    def _record(self, trainer: Trainer, names: list[str]) -> None:
        assert self._began is not None
        now = time.perf_counter() - self._began
        for name in names:
            if name in trainer.callback_metrics:
                point = Point(now, trainer.global_step, trainer.current_epoch, float(trainer.callback_metrics[name]))
                self.history.setdefault(name, []).append(point)
