"""Gradual magnitude pruning: zero more and more of the smallest weights while the rest goes on learning.

Pruning in many small updates, fast at first and slower towards the end, lets the network recover in between, and loses
less accuracy than pruning at once. From "To prune, or not to prune: exploring the efficacy of pruning for model
compression" (Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878).

The functions are in :mod:`lightning_accel.pruning.masks`; the callback decides when they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_accel.errors import check_choice, check_fraction, check_patterns
from lightning_accel.hooks import AccelCallback, Contract, fit_length, moment, trainer_callbacks
from lightning_accel.pruning.masks import (
    apply_masks_,
    compute_masks,
    count_pruned,
    keeps_zero,
    mask_optimizer_state_,
    pack_mask,
    unpack_mask,
)
from lightning_accel.pruning.partitions import PartitionsOf, mask_partitions_
from lightning_accel.pruning.selection import PrunedLayer, report_layers, report_table, select_weights
from lightning_accel.schedules import Duration, Moment, interval_progress, value_at

__all__ = ["GradualPruning"]

_SCHEDULES = ("cubic", "linear", "cosine", "polynomial", "step", "constant")
_ROUNDING = 1e-9
_SHARDED = "it shards the weights, so no rank can rank them all: train with `strategy='ddp'`, or prune before sharding."


class GradualPruning(AccelCallback):
    """Prune the smallest weights step by step until ``amount`` of them is zero, and keep them zero.

    Weights are masked directly: no parameter is renamed or replaced, and every checkpoint holds a plain module whose
    pruned weights are zero. The gradients of pruned weights are zeroed before clipping and the optimizer's momentum of
    them at the update that prunes them, so weight decay, momentum and the gradient's norm know nothing of them.

    Args:
        amount: The fraction of all eligible weights that is zero in the end, in [0, 1]; 0 changes nothing.
        start: When pruning begins; an int is in optimizer steps.
        end: When ``amount`` is reached, exactly; an int is in optimizer steps.
        every: How often more is pruned between ``start`` and ``end``; an int is in optimizer steps.
        schedule: How the sparsity rises from 0 to ``amount``: ``"cubic"`` (as in the paper), ``"linear"``,
            ``"cosine"``, ``"polynomial"`` (of power 2), ``"step"`` (4 jumps) or ``"constant"`` (all at ``start``).
        scope: ``"global"`` compares all weights with one another, ``"layer"`` prunes the same fraction of each.
        include: Regular expressions for the names of the parameters to prune. ``None``: the weights of linear,
            convolution and attention layers.
        exclude: Regular expressions for the names of parameters to leave alone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value, or (when training starts) a pattern of ``include`` matches
            nothing.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> pruning = GradualPruning(amount=0.9, start="0.1fit", end="0.7fit", every="50step")
        >>> trainer = Trainer(callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    contract: ClassVar[Contract] = Contract(
        purpose="Prune the smallest weights gradually while training goes on, and keep them zero.",
        touches=frozenset({"weights", "gradients", "optimizer"}),
        acts="every optimizer step; prunes more every `every` from `start` to `end`",
        expects="fewer non-zero weights; a smaller compressed checkpoint",
        docs="methods/gradual_pruning",
        refuses={
            "FSDPStrategy": _SHARDED,
            "ModelParallelStrategy": _SHARDED,
            "DeepSpeedStrategy": "its optimizers keep flat float32 copies of the weights that masks can't reach: train "
            "with ZeROStrategy at stage 1 or 2, with `strategy='ddp'`, or prune before.",
            "ModelPruning": "both would prune: remove one of them.",
        },
        accepts=frozenset({"ZeROStrategy"}),
    )

    def __init__(
        self,
        amount: float = 0.9,
        start: str | int | Duration = "0.1fit",
        end: str | int | Duration = "0.7fit",
        every: str | int | Duration = "50step",
        schedule: Literal["cubic", "linear", "cosine", "polynomial", "step", "constant"] = "cubic",
        scope: Literal["global", "layer"] = "global",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        self.amount = check_fraction("amount", amount)
        self.start = Duration.parse("start", start)
        self.end = Duration.parse("end", end)
        self.every = Duration.parse("every", every)
        if self.every.value == 0:
            raise ValueError(f"Expected `every` to be longer than 0, but got {every!r}.")
        if self.start.unit == self.end.unit and self.start.value > self.end.value:
            raise ValueError(f"Expected `end` to be at or after `start` ('{self.start}'), but got {end!r}.")
        self.schedule = check_choice("schedule", schedule, _SCHEDULES)
        self.scope = check_choice("scope", scope, ("global", "layer"))
        for name, patterns in (("include", include), ("exclude", exclude)):
            if patterns is not None:
                check_patterns(name, patterns)
        self.include = None if include is None else list(include)
        self.exclude = [] if exclude is None else list(exclude)
        super().__init__(
            amount=self.amount,
            start=str(self.start),
            end=str(self.end),
            every=str(self.every),
            schedule=self.schedule,
            scope=self.scope,
            include=self.include,
            exclude=self.exclude,
        )
        self._reset()

    def _reset(self) -> None:
        self._weights: dict[str, nn.Parameter] = {}
        self._frozen: dict[str, nn.Parameter] = {}
        self._places: dict[Tensor, int] = {}
        self._masks: list[Tensor] = []
        self._num_pruned = 0
        self._gradients_stay = True  # nobody changes gradients between their masking and the step
        self._gradients_masked = False  # those of the present step
        self._last_update: float | None = None  # in the unit of `every`
        self._seen_step: int | None = None  # the optimizer steps done when the schedule was last looked at
        self._done = False
        self._restored: dict[str, Any] | None = None
        self._partitions_of: PartitionsOf | None = None  # of a strategy that steps flat copies of the weights

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is to be pruned."""
        return self.amount == 0

    def report(self) -> list[PrunedLayer]:
        """What is zero now in every parameter that is pruned, or would be if it weren't frozen."""
        return report_layers(self._weights, self._frozen)

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, unless this one goes on from it."""
        if not self.is_neutral and getattr(trainer.strategy, "zero_stage_3", False):
            raise MisconfigurationException(
                f"{type(self).__name__} can't work with {type(trainer.strategy).__name__} at stage 3: {_SHARDED} "
                "Stages 1 and 2 work too."
            )
        goes_on = self.state_dict() if trainer.global_step else None
        self._reset()
        self._restored = goes_on

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights, take up restored masks, and stand by after every optimizer step."""
        if self.is_neutral:
            return
        self._weights, self._frozen, unmatched = select_weights(pl_module, self.include, self.exclude)
        if self._restored is not None:
            self._take_up(self._restored, pl_module)
        self._places = {weight: place for place, weight in enumerate(self._weights.values())}
        if not self._weights:
            frozen = f" ({len(self._frozen)} that match are frozen)" if self._frozen else ""
            self.warn_no_effect(f"the module has no trainable weights to prune{frozen}; name some with `include`.")
            return
        if unmatched:
            rank_zero_warn(f"{type(self).__name__}: no parameter matches `exclude` {unmatched}.")
        self._gradients_stay &= not _changes_gradients(trainer, pl_module)
        optimizers: list[Any] = list(trainer.optimizers)
        self._partitions_of = getattr(trainer.strategy, "partitions_of", None)
        if self._partitions_of is not None:
            optimizers = [optimizer.optimizer for optimizer in optimizers]  # the one that steps the partitions
            for index, weight in enumerate(self._weights.values()):
                register: Any = weight.register_hook  # which torch does not type
                self.on_undo(register(partial(self._mask_gradient, index)).remove)
        for optimizer in optimizers:
            handle = optimizer.register_step_post_hook(self._mask_weights)
            self.on_undo(handle.remove)
        # a checkpoint may have been saved after the last step but before this callback acted on it
        self._advance_after_step(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Zero the gradients of pruned weights; Lightning clips after this."""
        pairs = zip((weight.grad for weight in self._weights.values()), self._masks, strict=False)
        present = [(grad, mask) for grad, mask in pairs if grad is not None]
        apply_masks_([grad for grad, _ in present], [mask for _, mask in present])
        self._gradients_masked = self._gradients_stay

    def change_gradient(self, parameter: Tensor) -> None:
        """Zero the gradient of what is pruned of one parameter."""
        place = self._places.get(parameter)
        if place is not None and self._masks and parameter.grad is not None:
            apply_masks_([parameter.grad], [self._masks[place]])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune more where it is due."""
        self._advance_after_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what was pruned, and say so where the fit ended too early."""
        if not self._weights:
            return
        if self._masks:  # whatever the user's hooks did since the last step
            apply_masks_(list(self._weights.values()), self._masks)
        self._advance(trainer)  # a fit that a clock ended is at its end only now
        sparsity = self._num_pruned / max(sum(weight.numel() for weight in self._weights.values()), 1)
        if not self._done:
            rank_zero_warn(
                f"{type(self).__name__} reached a sparsity of {sparsity:.4f} of {self.amount:g}: the fit ended before "
                f"`end` ('{self.end}'). Train for longer, or give an earlier `end`."
            )
        if trainer.is_global_zero and not trainer.barebones:
            from rich import print as rich_print

            rich_print(report_table(self.report(), f"{type(self).__name__}: sparsity {sparsity:.4f}"))

    def constrain(self, weights: Mapping[str, Tensor]) -> None:
        """Zero what is pruned."""
        masks = dict(zip(self._weights, self._masks, strict=False))
        pairs = [(weight, masks[name]) for name, weight in weights.items() if name in masks]
        apply_masks_([weight for weight, _ in pairs], [mask.to(weight) for weight, mask in pairs])

    def state_dict(self) -> dict[str, Any]:
        """The masks, in one bit a weight, and where the schedule is."""
        if self._restored is not None:  # saved before training started
            return self._restored
        return {
            "masks": {name: pack_mask(mask) for name, mask in zip(self._weights, self._masks, strict=False)},
            "names": list(self._weights),
            "last_update": self._last_update,
            "seen_step": self._seen_step,
            "done": self._done,
            "gradients_stay": self._gradients_stay,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: the module is not at hand here."""
        self._restored = state_dict

    def _take_up(self, state: dict[str, Any], pl_module: LightningModule) -> None:
        if state["names"]:
            trained = {**self._weights, **self._frozen}
            missing = [name for name in state["names"] if name not in trained]
            if missing:
                raise ValueError(
                    f"Expected the parameters that the checkpoint prunes, but the module has no {missing}."
                )
            self._weights = {name: trained.pop(name) for name in state["names"]}
            self._frozen = {name: weight for name, weight in trained.items() if name in self._frozen}
        if state["masks"]:
            self._masks = [unpack_mask(state["masks"][name], like=weight) for name, weight in self._weights.items()]
            apply_masks_(list(self._weights.values()), self._masks)
        self._num_pruned = sum(map(count_pruned, self._masks))
        self._last_update, self._seen_step, self._done = state["last_update"], state["seen_step"], state["done"]
        self._gradients_stay = state.get("gradients_stay", False)
        self._restored = None

    def _mask_gradient(self, index: int, gradient: Tensor) -> Tensor:
        """The gradient of a weight without what is pruned, before it is reduced and split."""
        return gradient * self._masks[index] if self._masks else gradient

    def _mask_weights(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Zero the weights again, unless this step can't have changed them: reading every mask twice takes time."""
        masked, self._gradients_masked = self._gradients_masked, False
        if not self._masks:
            return
        if self._partitions_of is not None:
            if not keeps_zero(optimizer):  # before the strategy copies them to the weights
                mask_partitions_(self._partitions_of, list(self._weights.values()), self._masks, state=False)
            return
        if not (masked and keeps_zero(optimizer)):
            apply_masks_(list(self._weights.values()), self._masks)
        self._gradients_stay &= masked  # a momentum that saw other gradients goes on to push

    def _advance_after_step(self, trainer: Trainer) -> None:
        """Advance if an optimizer step was made since: weights stay as they are within an accumulation window."""
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self._advance(trainer)

    def _advance(self, trainer: Trainer) -> None:
        """Prune more if an update is due now."""
        if self._done or not self._weights:
            return
        now = moment(trainer)
        if self.end.reached(now):
            self._update(trainer.optimizers, self.amount)
            self._done = True
        elif self.start.reached(now) and self._is_due(now):
            progress = interval_progress(now, self.start, self.end, fit_length(trainer))
            self._update(trainer.optimizers, value_at(self.schedule, progress, 0.0, self.amount))
            self._last_update = self.every.elapsed(now)

    def _is_due(self, now: Moment) -> bool:
        if self._last_update is None:
            return True
        return self.every.elapsed(now) - self._last_update >= self.every.value - _ROUNDING

    def _update(self, optimizers: Sequence[torch.optim.Optimizer], amount: float) -> None:
        weights = list(self._weights.values())
        masks = compute_masks(weights, amount, self.scope, self._masks or None)
        num_pruned = sum(map(count_pruned, masks))
        if num_pruned == self._num_pruned:
            return
        self._masks, self._num_pruned = masks, num_pruned
        apply_masks_(weights, masks)
        if self._partitions_of is not None:
            mask_partitions_(self._partitions_of, weights, masks, state=True)
            return
        for optimizer in optimizers:
            mask_optimizer_state_(optimizer, weights, masks)


def _changes_gradients(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the user's own hooks may change gradients after they were masked and before the step."""
    hooks = ("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
    others = (other for other in trainer_callbacks(trainer) if not isinstance(other, AccelCallback))
    return any(is_overridden(hook, pl_module) for hook in hooks) or any(
        type(other).on_before_optimizer_step is not Callback.on_before_optimizer_step for other in others
    )
