"""MicroBatching: train each batch in micro-batches that fit in memory, with the numbers of the whole batch.

The gradient of a mean is the weighted mean of the gradients of its parts, so a batch that does not fit need not be made
smaller, nor the learning rate found anew: GPipe calls the parts micro-batches (Huang et al. 2018,
https://arxiv.org/abs/1811.06965). How large they may be is learnt where memory runs out, as in Composer's
``device_train_microbatch_size="auto"``: the step is undone and made again with halves.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_accel.accumulation.attempts import Attempts
from lightning_accel.accumulation.counting import count_batch
from lightning_accel.accumulation.splitting import combine_outputs, micro_sizes, samples_of, split_batch
from lightning_accel.errors import check_bytes, check_choice, check_int
from lightning_accel.hooks import AccelCallback, Contract, trainer_callbacks
from lightning_accel.hooks.micro import (
    MicroBatch,
    MicroStep,
    SplitClosure,
    check_model,
    replace_closures,
    steps_together,
    why_not_auto,
)
from lightning_accel.hooks.tensors import weighted_mean
from lightning_accel.hooks.weights import largest_over_ranks

__all__ = ["MicroBatching"]


class MicroBatching(AccelCallback):
    """Train each batch in micro-batches, so that it need not fit in memory; the step is that of the whole batch.

    Args:
        size: How many samples a micro-batch has at most, on each rank. ``"auto"`` begins with whole batches; where
            memory runs out, on any rank, all ranks undo the step, halve the size, and run the same batch again.
        weight_by: What the loss is a mean over, so that micro-batches weigh by their number: ``"samples"``, or
            ``"tokens"`` that count.
        count_key: For tokens: the item of the batch with the targets, a mask (booleans, or a key that ends in "mask")
            or their number; a key, an index, or a path such as ``"inputs.attention_mask"``.
        ignore_index: The target that does not count, where tokens are counted in targets.
        shared_keys: What all samples share, by its key, index or path in the batch: every micro-batch gets it whole.
        list_keys: Lists with an entry for each sample, of which each is a tensor or a container; ``""`` is the batch
            itself.
        grow_after: With ``"auto"``: after so many batches in which memory sufficed the double size is tried, and after
            twice as many where that failed; None: never.
        memory_budget: With ``"auto"``: bytes (or ``"2GiB"``) at which memory counts as run out. On the CPU, what the
            step makes and holds; on CUDA, all that torch holds of the device.

    Attributes:
        size: The size in use; None: whole batches.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value, or arguments contradict one another.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MicroBatching("auto")], logger=False, enable_checkpointing=False)
        >>> by_tokens = MicroBatching(8, weight_by="tokens", count_key="labels")
    """

    contract = Contract(
        purpose="Train each batch in micro-batches that fit in memory; the step is that of the whole batch.",
        touches=frozenset({"loss", "gradients"}),
        acts="in every training batch",
        expects="the same training in less memory",
        docs="methods/micro_batching",
        reads=frozenset({"input"}),
        once=True,
        manual_optimization="there the module itself goes backward and steps. Split the batch in `training_step`, or "
        "set `automatic_optimization = True`.",
        refuses={
            "DeepSpeedStrategy": "its engine counts the backwards of a step by itself. Use ZeROStrategy (accel_zero1, "
            "accel_zero2, accel_zero3), which leaves them to the Trainer.",
            "OptimizerInBackward": "it steps inside the backward, before the gradients of all micro-batches have been "
            "added up. Remove one of them.",
            "SAM": "its second pass takes the whole batch at once. Use GradientAccumulation, with smaller batches.",
        },
        accepts=frozenset({"ZeROStrategy"}),
    )

    def __init__(
        self,
        size: int | Literal["auto"] = "auto",
        weight_by: Literal["samples", "tokens"] = "samples",
        count_key: str | int | None = None,
        ignore_index: int = -100,
        shared_keys: list[str | int] | None = None,
        list_keys: list[str | int] | None = None,
        grow_after: int | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        self._by_tokens = check_choice("weight_by", weight_by, ("samples", "tokens")) == "tokens"
        self._count_key = _check_count_key(count_key, self._by_tokens)
        self._ignore_index = check_int("ignore_index", ignore_index)
        self._keys = _check_keys("shared_keys", shared_keys), _check_keys("list_keys", list_keys)
        self._grow_after = None if grow_after is None else check_int("grow_after", grow_after, minimum=1)
        self._budget = None if memory_budget is None else check_bytes("memory_budget", memory_budget)
        self._fixed: int | None = None
        if size != "auto":
            self._fixed = _check_size(size)
            for name, value in (("grow_after", grow_after), ("memory_budget", memory_budget)):
                if value is not None:
                    raise ValueError(f"Expected `{name}` to be given with size='auto' only, but got {value!r}.")
        super().__init__(
            size=size,
            weight_by=weight_by,
            count_key=count_key,
            ignore_index=ignore_index,
            shared_keys=shared_keys,
            list_keys=list_keys,
            grow_after=grow_after,
            memory_budget=memory_budget,
        )
        self._fresh()

    def _fresh(self) -> None:
        self._attempts = Attempts(self._grow_after, self._budget) if self._fixed is None else None
        self._together = self._alone = False  # whether ranks need equally many micro-batches; whether there is one rank
        self._largest = 0  # samples in a batch, so far
        self._said: set[str] = set()

    @property
    def size(self) -> int | None:
        """The size in use; None: whole batches."""
        return self._fixed if self._attempts is None else self._attempts.sizes.size

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the closure that Lightning makes for the step of a batch."""
        self._fresh()
        name = type(self).__name__
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{name} needs to see each batch, but `training_step` takes a `dataloader_iter` and fetches the "
                "batches by itself: give it the signature `training_step(self, batch, batch_idx)`."
            )
        for other in trainer_callbacks(trainer):
            measures = type(other).__name__ == "NoiseScaleAccumulation" and not getattr(other, "is_neutral", False)
            if measures and getattr(other, "min_factor", 0) == 1:
                raise MisconfigurationException(
                    f"{name} can't work with NoiseScaleAccumulation(min_factor=1), which measures the gradient of a "
                    "whole batch on its way into the all-reduce: set min_factor=2."
                )
        if self._attempts is not None:
            if reason := why_not_auto(trainer):
                raise MisconfigurationException(f"{name}(size='auto') {reason}")
            self.on_undo(self._attempts.limit_device(trainer.strategy.root_device))
        replace_closures(self, trainer, partial(self._make_closure, trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what the strategy made of the model."""
        check_model(trainer, type(self).__name__)
        self._together, self._alone = steps_together(trainer), trainer.world_size == 1

    # ------------------------------------------------------------------------------------------- the step of a batch

    def _make_closure(
        self, trainer: Trainer, original: Any, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int
    ) -> Any:
        attempts, batch = self._attempts, kwargs["batch"]
        if self._alone and self._fixed is not None:  # what a batch that fits costs is this
            samples = samples_of(batch, *self._keys)
            if samples <= self._fixed:
                self._largest = max(self._largest, samples)
                return original(kwargs, optimizer, batch_idx)
        fixed = [] if attempts is not None else self._split(trainer, batch, self._fixed)
        # What a rank that splits its batch logs is exchanged after its backward; one that does not must do the same
        if self._together and len(fixed) == 1 and fixed[0].batch is batch:
            return original(kwargs, optimizer, batch_idx)

        def run() -> tuple[Tensor | None, dict[str, Any]]:
            step, parts = MicroStep(trainer, kwargs, optimizer, batch_idx), fixed
            if attempts is None:
                results = step.run(parts)
            else:
                parts, results = attempts.run(trainer, step, optimizer, batch, partial(self._split, trainer, batch))
            step.logs.release([part.samples for part in parts], [part.weight for part in parts])
            return self._combine(trainer, step, parts, results)

        return SplitClosure(run)

    def _split(self, trainer: Trainer, batch: Any, size: int | None) -> list[MicroBatch]:
        """The micro-batches of a batch that are to be run."""
        if size is None:
            return [MicroBatch(batch, self._samples_if_known(batch), 1.0)]
        samples = samples_of(batch, *self._keys)
        self._largest = max(self._largest, samples)
        number = max(1, -(-samples // size))
        if self._together:
            number, least = largest_over_ranks(trainer, [number, -samples])
            if -least < number > 1:
                raise ValueError(
                    f"Expected every rank to have at least {number} samples, for as many micro-batches as the one with "
                    f"the largest batch makes, but one has {-least}: under {type(trainer.strategy).__name__} all ranks "
                    "go forward and backward together. Give the loader batches of equal sizes."
                )
        if number == 1:
            return [MicroBatch(batch, samples, 1.0)]
        self._warn_batch_norm(trainer)
        sizes = micro_sizes(samples, number)
        batches = split_batch(batch, sizes, *self._keys)
        weights = [size / samples for size in sizes]
        if self._by_tokens:
            counts = [count_batch(part, "tokens", self._count_key, self._ignore_index) for part in batches]
            tokens = torch.stack([count.double() for count in counts]).tolist()
            weights = [count / (sum(tokens) or 1.0) for count in tokens]
        parts = [MicroBatch(*part) for part in zip(batches, sizes, weights, strict=True)]
        return parts if all(weights) else self._that_count(trainer, parts)

    def _samples_if_known(self, batch: Any) -> int:
        """The number of samples; 0 where the batch can't be split, which matters when memory runs out."""
        try:
            return samples_of(batch, *self._keys)
        except (TypeError, ValueError):
            return 0

    def _that_count(self, trainer: Trainer, parts: list[MicroBatch]) -> list[MicroBatch]:
        """Without those in which nothing counts, whose loss may be NaN; but ranks that wait for this one need it."""
        self._say(
            trainer,
            "uncounted",
            "Nothing counts in a micro-batch: all its targets are ignored, or masked. It adds nothing to its batch",
        )
        counted = [part for part in parts if part.weight]
        if self._together:
            return parts
        alone = trainer.world_size == 1 or self._attempts is not None
        return counted or ([] if alone else parts[-1:])

    def _combine(
        self, trainer: Trainer, step: MicroStep, parts: Sequence[MicroBatch], results: Sequence[Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The loss and the other outputs of the step of a batch, of those of its micro-batches."""
        found = [(part, result) for part, result in zip(parts, results, strict=True) if result.loss is not None]
        counted = [(part, result) for part, result in found if part.weight]
        if not counted:
            if not parts or found:
                self._say(
                    trainer,
                    "nothing",
                    "Nothing counts in a whole batch: all its targets are ignored, or masked. It adds nothing to the "
                    "gradient",
                )
            # A rank that has none, where others have one, would leave a loss scaler out of step
            return (None if trainer.world_size == 1 else torch.zeros((), device=trainer.strategy.root_device)), {}
        losses, weights = [result.loss for _, result in counted], [part.weight for part, _ in counted]
        loss = weighted_mean(losses, weights)
        if len(parts) > 1 and "finite" not in self._said and not bool(loss.isfinite().all()):
            self._say_not_finite(trainer, step, losses)
        names = dict.fromkeys(name for _, result in counted for name in result.extra)
        extra = {}
        for name in names:
            having = [(part, result.extra[name]) for part, result in counted if name in result.extra]
            samples, own = [part.samples for part, _ in having], [part.weight for part, _ in having]
            extra[name] = combine_outputs([value for _, value in having], samples, own)
        return loss, extra

    # --------------------------------------------------------------------------------------------- what there is to say

    def _say(self, trainer: Trainer, what: str, sentence: str) -> None:
        """Warn once, on the rank that it is about."""
        if what not in self._said:
            self._said.add(what)
            rank = f" on rank {trainer.global_rank}" if trainer.world_size > 1 else ""
            warnings.warn(f"{sentence}. First in epoch {trainer.current_epoch}{rank}; this is said once.", stacklevel=2)

    def _say_not_finite(self, trainer: Trainer, step: MicroStep, losses: Sequence[Tensor]) -> None:
        numbers = [str(number) for number, loss in enumerate(losses, start=1) if not bool(loss.isfinite().all())]
        way_out = "" if self._by_tokens else "Where all targets of some samples are ignored, set weight_by='tokens'. "
        self._say(
            trainer,
            "finite",
            f"The loss of micro-batch {', '.join(numbers)} of {len(losses)} of batch {step.batch_idx} is inf or NaN, "
            f"and so is that of the batch, as it would be without splitting. {way_out}Find the operation with "
            "Trainer(detect_anomaly=True)",
        )

    def _warn_batch_norm(self, trainer: Trainer) -> None:
        if "norm" in self._said:
            return
        self._said.add("norm")
        for name, layer in trainer.lightning_module.named_modules():
            if isinstance(layer, _BatchNorm) and layer.training:
                rank_zero_warn(
                    f"`{name}` is a {type(layer).__name__}: it normalises each micro-batch by its own statistics, not "
                    "by those of the batch, and its running averages move once for each. SyncBatchNorm does not change "
                    "that. Use GroupNorm, freeze the statistics (`.eval()` on such layers), or accept statistics of "
                    "micro-batches."
                )
                return

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where no batch had to be split."""
        if self._fixed is not None:
            largest = largest_over_ranks(trainer, [self._largest])[0]
            if 0 < largest <= self._fixed:
                self.warn_no_effect(f"no batch of a rank had more than {largest} samples, and size={self._fixed}.")

    def state_dict(self) -> dict[str, Any]:
        """The size that was learnt."""
        return {} if self._attempts is None else dict(self._attempts.sizes.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the size that was learnt."""
        if self._attempts is not None:
            self._attempts.sizes.load_state_dict(state_dict)


def _check_size(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"Expected `size` to be 'auto' or an int of at least 1, but got {size!r}.")
    return check_int("size", size, minimum=1)


def _check_keys(argument: str, keys: Any) -> list[str]:
    if isinstance(keys, str) or not isinstance(keys, (list, tuple, type(None))):
        raise TypeError(f"Expected `{argument}` to be a list of keys of the batch, but got {keys!r}.")
    for key in keys or ():
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise TypeError(f"Expected `{argument}` to be a list of keys of the batch, but one of them is {key!r}.")
    return [str(key) for key in keys or ()]


def _check_count_key(key: Any, by_tokens: bool) -> Any:
    if key is not None and (isinstance(key, bool) or not isinstance(key, (str, int))):
        raise TypeError(f"Expected `count_key` to be a key or an index of the batch, but got {key!r}.")
    if by_tokens and key is None:
        raise ValueError(
            "Expected `count_key` to name the targets, the mask or the number of tokens in the batch, but got None."
        )
    if key is not None and not by_tokens:
        raise ValueError(f"Expected `count_key` to be None where samples are counted, but got {key!r}.")
    return key
