"""What ``self.log`` is given while a batch is trained in micro-batches, logged once for the batch.

Held back until the step is done, so that what a failed attempt logged is forgotten, that ranks exchange values
(``sync_dist``) once a batch, however many micro-batches each has, and that the value of a step is that of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.memory import recursive_detach
from torch import Tensor

from lightning_accel.hooks.tensors import weighted_mean

__all__ = ["StepLogs", "size_to_log"]


class _Call(NamedTuple):
    part: int
    value: Any
    step_value: Any
    """Of a metric object: its value on this micro-batch."""
    arguments: dict[str, Any]


class StepLogs:
    """The calls of ``self.log`` in the step of one batch.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._results = trainer._results
        self._calls: dict[tuple[str, str], list[_Call]] = {}
        self.part = 0
        """The number of the micro-batch that runs, from 0."""

    def forget(self) -> None:
        """Forget what was logged so far."""
        self._calls.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the calls in this block back."""
        if self._results is None:
            yield
            return
        self._results.__dict__["log"] = self._hold
        try:
            yield
        finally:
            del self._results.__dict__["log"]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it without types
    def _hold(self, fx: str, name: str, value: Any, **arguments: Any) -> None:
        if isinstance(value, Tensor):
            value = value if arguments.get("enable_graph") else value.detach().clone()
            step_value = None
        else:
            step_value = recursive_detach(value._forward_cache)
        self._calls.setdefault((fx, name), []).append(_Call(self.part, value, step_value, arguments))

    def release(self, samples: Sequence[int], weights: Sequence[float]) -> None:
        """Log what was held back, once for the batch.

        Args:
            samples: The sizes of the micro-batches.
            weights: Their weights.
        """
        for (fx, name), calls in self._calls.items():
            times: list[list[_Call]] = []  # whoever logs a name twice in a step means to
            seen: dict[int, int] = {}
            for call in calls:
                place = seen[call.part] = seen.get(call.part, -1) + 1
                if place == len(times):
                    times.append([])
                times[place].append(call)
            for together in times:
                self._log(fx, name, together, samples, weights)
        self._calls.clear()

    def _log(self, fx: str, name: str, calls: list[_Call], samples: Sequence[int], weights: Sequence[float]) -> None:
        assert self._results is not None
        counted = [call for call in calls if weights[call.part]] or calls
        last, own = counted[-1], [weights[call.part] for call in counted]
        arguments = dict(last.arguments)
        if not isinstance(last.value, Tensor):  # a metric, which has been updated by each micro-batch
            self._results.log(fx, name, last.value, **arguments)
            if len(counted) > 1 and all(isinstance(call.step_value, Tensor) for call in counted):
                step_value = weighted_mean([call.step_value for call in counted], own)
                self._results[f"{fx}.{name}"]._forward_cache = step_value
            return
        if len(counted) > 1 and all(call.arguments.get("batch_size") is not None for call in counted):
            counted = [call for call in counted if int(call.arguments["batch_size"])] or counted[:1]
            sizes = [int(call.arguments["batch_size"]) for call in counted]
            arguments["batch_size"] = size = size_to_log(sizes, [samples[call.part] for call in counted])
            own = [weights[call.part] for call in counted] if size == sizes[0] else list(map(float, sizes))
        value = _reduced([call.value for call in counted], own, arguments.get("reduce_fx", "mean"))
        if not any(own):  # nothing counts in the batch: it adds nothing to a mean over batches
            arguments["batch_size"], value = 0, torch.zeros_like(value)
        self._results.log(fx, name, value, **arguments)


def size_to_log(given: Sequence[int], samples: Sequence[int]) -> int:
    """The ``batch_size`` of a whole batch, of those that were given for its micro-batches.

    Args:
        given: What ``self.log(batch_size=...)`` got in each micro-batch.
        samples: How many samples each has.

    Returns:
        Their sum; but a constant once, such as the loader's batch size: what is the same in all, not below the number
        of samples in the batch, and not that many times the samples of a micro-batch.

    Example:
        >>> size_to_log([4, 4, 2], samples=[4, 4, 2]), size_to_log([32, 32, 32], samples=[4, 4, 2])
        (10, 32)
    """
    first = given[0]
    whole = sum(samples)
    constant = (
        len(set(given)) == 1 and first >= whole and (len(set(samples)) > 1 or first == whole or first % samples[0])
    )
    return first if constant else sum(given)


def _reduced(values: list[Tensor], weights: Sequence[float], reduce_fx: Any) -> Tensor:
    """One value of those of the micro-batches, in the way in which batches are reduced to an epoch's."""
    kind = reduce_fx.lower() if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
    if len(values) > 1 and kind in ("sum", "max", "min"):
        stacked = torch.stack([value.to(values[0].device) for value in values])
        return stacked.sum() if kind == "sum" else stacked.max() if kind == "max" else stacked.min()
    return weighted_mean(values, weights)
