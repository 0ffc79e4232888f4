"""Gradient accumulation: several micro-batches make one optimizer step, so that a batch need not fit in memory.

The gradient of a window of micro-batches is exactly that of one big batch: also in the short last window of an epoch,
which Lightning divides by the full factor, and with batches of unequal numbers of tokens, over all ranks, where a mean
of means is another number. The factor may change at any point of the fit, as in "Don't Decay the Learning Rate,
Increase the Batch Size" (Smith et al. 2018, https://arxiv.org/abs/1711.00489), or follow from the size of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_accel.accumulation.counting import Counted, count_batch, nearest_factor
from lightning_accel.errors import check_choice, check_int
from lightning_accel.hooks import AccumulationWindow, Contract, Moment
from lightning_accel.hooks.weights import samples_of_a_batch, sum_over_ranks
from lightning_accel.hooks.window import steps_at, unknown_steps
from lightning_accel.schedules import Duration

__all__ = ["GradientAccumulation", "factor_at", "parse_factors"]


def parse_factors(factor: int | Mapping[int | str, int]) -> list[tuple[Duration, int]]:
    """Read a factor, or a schedule of factors, as a list of (from when, factor), in the order written.

    Raises:
        TypeError: If it is neither an int nor a mapping, or a factor in it is no int.
        ValueError: If a factor is below 1, the schedule is empty, or a key is not a duration.
    """
    if not isinstance(factor, Mapping):
        return [(Duration(0, "epoch"), check_int("factor", factor, minimum=1))]
    if not factor:
        raise ValueError("Expected `factor` to have at least one entry, but got {}.")
    return [
        (Duration.parse("factor", start, default_unit="epoch"), check_int(f"factor[{start!r}]", value, minimum=1))
        for start, value in factor.items()
    ]


def factor_at(factors: list[tuple[Duration, int]], now: Moment) -> int:
    """The factor at a moment: that of the last entry reached, or 1 before all of them.

    Raises:
        ValueError: If an entry is a fraction of the fit and the fit has no end.
    """
    return next((value for start, value in reversed(factors) if start.reached(now)), 1)


class GradientAccumulation(AccumulationWindow):
    """Make one optimizer step of ``factor`` training batches, or of as many as have ``target_batch_size`` samples.

    Args:
        factor: How many batches make a step; or a schedule from a duration to a factor, such as
            ``{0: 1, "0.5fit": 4}``. A plain int as a key counts epochs. Of the entries that are reached the last one
            written holds; before the first one the factor is 1. A change takes effect at the next window.
        target_batch_size: In place of ``factor``: how many samples or tokens make a step, over all ranks. Samples: the
            factor is the nearest one to that, by the batch size of the loader and the number of ranks. Tokens, and
            samples where the loader has no batch size: a window ends with the batch that reaches it.
        unit: What ``target_batch_size`` counts.
        weight_by: How much each batch of a window weighs: ``"batches"``, all the same; ``"samples"`` or ``"tokens"``,
            by their number, where the loss is the mean over them.
        count_key: The item of the batch to count: a key, an index, or a path such as ``"inputs.attention_mask"``. For
            tokens, the targets, a mask (booleans, or a key that ends in "mask") or the number itself. For samples,
            where None is the first tensor, what has one entry for each, or their number.
        ignore_index: The target that does not count, where tokens are counted in targets.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a factor is below 1, a key is not a duration, or arguments contradict one another.

    Example:
        >>> GradientAccumulation(factor=4).next_factor(Moment(step=0, batch=0, epoch=0.0, fit=0.0))
        4
        >>> GradientAccumulation({0: 1, "0.5fit": 4}).next_factor(Moment(step=9, batch=9, epoch=1.5, fit=0.75))
        4
        >>> by_tokens = GradientAccumulation(8, weight_by="tokens", count_key="labels")
    """

    contract = Contract(
        purpose="Make one optimizer step of several batches, by a factor that may change during the fit.",
        touches=frozenset({"accumulation window"}),
        acts="at the start of each window of batches",
        expects="larger effective batches in the same memory",
        docs="methods/gradient_accumulation",
        once=True,
        manual_optimization="there the module itself decides when to step. Accumulate in `training_step`, or set "
        "`automatic_optimization = True`.",
        refuses={
            "GradientAccumulationScheduler": "both set how many batches make an optimizer step. Remove the scheduler.",
            "DeepSpeedStrategy": "DeepSpeed's engine counts windows by itself, with one factor for the whole fit. Use "
            "ZeROStrategy (accel_zero1, accel_zero2, accel_zero3), which leaves them to the Trainer.",
        },
        accepts=frozenset({"ZeROStrategy"}),
    )

    def __init__(
        self,
        factor: int | dict[int | str, int] = 1,
        target_batch_size: int | None = None,
        unit: Literal["samples", "tokens"] = "samples",
        weight_by: Literal["batches", "samples", "tokens"] = "batches",
        count_key: str | int | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(
            factor=factor,
            target_batch_size=target_batch_size,
            unit=unit,
            weight_by=weight_by,
            count_key=count_key,
            ignore_index=ignore_index,
        )
        self._factors = parse_factors(factor)
        self._target = None if target_batch_size is None else check_int("target_batch_size", target_batch_size, 1)
        self._unit: Counted = check_choice("unit", unit, ("samples", "tokens"))
        self._weight_by = check_choice("weight_by", weight_by, ("batches", "samples", "tokens"))
        self._count_key = count_key
        self._ignore_index = check_int("ignore_index", ignore_index)
        self._check_together(factor)
        self.weighs = weight_by != "batches"
        self._fresh()

    def _check_together(self, factor: Any) -> None:
        target, key = self._target, self._count_key
        if target is not None and factor != 1:
            raise ValueError(f"Expected `target_batch_size` to be None where `factor` is given, but got {target}.")
        if target is None and self._unit != "samples":
            raise ValueError(f"Expected `unit` to be given with `target_batch_size` only, but got {self._unit!r}.")
        if key is not None and (isinstance(key, bool) or not isinstance(key, (str, int))):
            raise TypeError(f"Expected `count_key` to be a key or an index of the batch, but got {key!r}.")
        if key is None and "tokens" in (self._unit, self._weight_by):
            raise ValueError(
                "Expected `count_key` to name the targets, the mask or the number of tokens in the batch, but got None."
            )
        if key is not None and target is None and self._weight_by == "batches":
            raise ValueError(
                "Expected `count_key` to be None where nothing is counted (see `weight_by` and `target_batch_size`), "
                f"but got {key!r}."
            )

    def _fresh(self) -> None:
        self._factor: int | None = None  # the one that follows from the target; None where batches are counted
        self._agreed = False  # whether all ranks have the same
        self._filled = 0.0  # what the batches of this window have, over all ranks; where batches are counted
        self._taken = 1  # how many they are
        self._said: set[int] = set()  # the sizes of a step of one batch about which something was said

    def install(self, trainer: Trainer, pl_module: Any) -> None:
        """Take over the Trainer's own counting of windows."""
        self._fresh()
        super().install(trainer, pl_module)

    @property
    def is_neutral(self) -> bool:
        """Whether every factor is 1, and nothing is counted."""
        return all(value == 1 for _, value in self._factors) and self._target is None and not self.weighs

    # ------------------------------------------------------------------------------------------- how long a window is

    def next_factor(self, now: Moment) -> int:
        """The factor of a window that starts at ``now``; where batches are counted, how many the last one took."""
        if self._target is None:
            return factor_at(self._factors, now)
        return self._taken if self._factor is None else self._factor

    def look_at(self, trainer: Trainer, *, agree: bool) -> None:
        """Let the factor follow from the batch size and the number of ranks."""
        if self._target is None or self._unit == "tokens" or (self._agreed and not agree):
            return
        self._agreed = agree
        batch = samples_of_a_batch(trainer, agree=agree)
        factor = None if batch is None else nearest_factor(self._target, batch)
        if batch is not None and batch > self._target:
            raise MisconfigurationException(
                f"One batch of each of the {trainer.world_size} rank(s) has {batch} samples in all, more than "
                f"target_batch_size={self._target}: give the loader a smaller batch size, or raise the target."
            )
        if batch is not None and factor is not None and batch * factor != self._target and batch not in self._said:
            self._said.add(batch)
            rank_zero_warn(
                f"target_batch_size={self._target} is no multiple of the {batch} samples that one batch of each of the "
                f"{trainer.world_size} rank(s) has: a step takes {factor} of them, {batch * factor} samples."
            )
        if factor != self._factor:
            self._factor, self._estimate = factor, None

    @property
    def _counts_up(self) -> bool:
        """Whether a window ends where its batches reach the target."""
        return self._target is not None and self._factor is None

    def fill(self, trainer: Trainer, batch: Any, position: int) -> None:
        """Count up to the target, over all ranks, so that all of them end the window here or none does."""
        if not self._counts_up:
            return
        count = count_batch(batch, self._unit, self._count_key, self._ignore_index)
        total = sum_over_ranks(trainer, count).item()
        self._filled, self._taken = total + (self._filled if position > 1 else 0), position
        if position == 1 and total > (self._target or 0) and not self._said:
            self._said.add(0)
            rank_zero_warn(
                f"One batch of each of the {trainer.world_size} rank(s) has {total:g} {self._unit} in all, more than "
                f"target_batch_size={self._target}, so that it makes a step of its own: give the loader a smaller "
                "batch size, or raise the target."
            )

    def is_full(self, position: int) -> bool:
        """Whether a window is complete with the batch at ``position``."""
        if not self._counts_up:
            return super().is_full(position)
        return position > 0 and self._filled >= (self._target or 0)

    def progress(self, position: int) -> str:
        """How far a window is, in words."""
        if not self._counts_up:
            return super().progress(position)
        return f"{self._filled:g} of {self._target} {self._unit}"

    def count_steps(self, batches: int, epochs: int, max_steps: int = -1) -> int | float:
        """The optimizer steps of a whole fit; infinity where they depend on what is in the batches."""
        if self._counts_up:
            return unknown_steps(f"{self._target} {self._unit}, in as many batches as that needs", max_steps)
        (start, factor), *changes = self._factors
        if changes or start.value > 0:
            return super().count_steps(batches, epochs, max_steps)
        return steps_at(self._factor or factor, batches, epochs, max_steps)

    # -------------------------------------------------------------------------------------------- how much they weigh

    def count(self, batch: Any) -> Tensor:
        """How many samples or tokens a batch has."""
        unit: Counted = "tokens" if self._weight_by == "tokens" else "samples"
        return count_batch(batch, unit, self._count_key, self._ignore_index)

    def state_dict(self) -> dict[str, Any]:
        """Where the present window began, its length, and what is in it."""
        own = {"factor": self._factor, "filled": self._filled, "taken": self._taken}
        return super().state_dict() | (own if self._target else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window that the checkpoint was taken in."""
        super().load_state_dict(state_dict)
        if self._target:
            self._factor, self._filled, self._taken = (state_dict[name] for name in ("factor", "filled", "taken"))
