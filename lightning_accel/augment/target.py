"""MixedTarget: a target that knows how it was mixed, so that an unedited training step gets the exact loss.

MixUp and CutMix make one sample out of several, with several labels. The loss is computed inside a ``training_step``
that nobody wants to edit, and so are the metrics beside it, which understand hard labels alone. A ``MixedTarget`` is a
tensor that *is* the hard label with the largest share for every operation; only loss functions, met in
``__torch_function__``, see the mix and return ``lam * loss(a) + (1 - lam) * loss(b)``.

Papers: `mixup <https://arxiv.org/abs/1710.09412>`_ (Zhang et al. 2018), `CutMix <https://arxiv.org/abs/1905.04899>`_
(Yun et al. 2019), label smoothing in `Inception v3 <https://arxiv.org/abs/1512.00567>`_ (Szegedy et al. 2016).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_accel.augment.losses import LOSSES, compose_smoothing, mixed_loss
from lightning_accel.errors import check_fraction

__all__ = ["MixedTarget", "Usage", "mix_targets", "smooth_targets"]


@dataclass
class Usage:
    """What a training step did with one batch's target; shared by all tensors derived from it."""

    mixed_by: str = ""
    """Name of the loss function that took the mix; empty if none did."""
    bypassed_by: str = ""
    """Name of an operation that combined the hard target with values that require grad; empty if none did."""
    unsmoothed_by: str = ""
    """Name of a loss function that took the mix but for which label smoothing means nothing; empty if none did."""


class MixedTarget(torch.Tensor):
    """The label with the largest share, which loss functions see as the mix that it was made from.

    Make one with :func:`mix_targets` or :func:`smooth_targets`.

    - Loss functions of ``torch.nn.functional`` (and the modules that call them) return the mix of the losses.
    - Casts, moves and changes of layout (``long()``, ``to()``, ``view()``, ``y[:8]``, ...) keep the mix.
    - ``F.one_hot`` gives the soft vector, as floats; a metric of torchmetrics, and code under ``torch.no_grad()``, gets
      the hard one.
    - Everything else gets the plain hard label and returns plain tensors. Editing the labels in place raises.
    """

    hard: Tensor
    """The label with the largest share, as a plain tensor."""
    targets: tuple[Tensor, ...]
    """The labels that were mixed, each of this tensor's shape."""
    weights: tuple[Tensor, ...]
    """The share of each: 0-d float32 for the whole batch, or of this tensor's shape; they sum to 1."""
    smoothing: float
    """Share that label smoothing moves from each label to all classes, in [0, 1]."""
    usage: Usage
    """What the training step did with it."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Give losses the mix, layout changes the mix to carry on, and everything else the hard label."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in LOSSES:
            named = {**dict(zip(LOSSES[func], args, strict=False)), **kwargs}
            target = named["target"]
            if isinstance(target, MixedTarget):
                target.usage.mixed_by = name
                loss, smoothed = mixed_loss(func, _hard(named), target.targets, target.weights, target.smoothing)
                if not smoothed:
                    target.usage.unsmoothed_by = name
                return loss
        target = args[0] if args else None
        if isinstance(target, MixedTarget):
            rest, options = _hard(tuple(args[1:])), _hard(kwargs)
            if name in _CASTS or name in _LAYOUTS:
                return target.map(lambda t: func(t, *rest, **options), spread=name in _LAYOUTS)
            if name == "one_hot" and not _asked_by_metric():
                target.usage.mixed_by = name
                return _soft_one_hot(target, *rest, **options)
            if _edits(name):
                # no TypeError: `y += 1` would turn that into `y = y + 1`
                raise RuntimeError(
                    f"Expected mixed targets to be left as they are, but `{name}` edits them in place: edit the labels "
                    "before the batch is augmented, in the dataset or in `on_after_batch_transfer`."
                )
        if torch.is_grad_enabled() and (_wants_grad(args) or _wants_grad(tuple(kwargs.values()))):
            for value in (*args, *kwargs.values()):
                if isinstance(value, MixedTarget):
                    value.usage.bypassed_by = name
        return func(*_hard(tuple(args)), **_hard(kwargs))

    def map(self, function: Callable[[Tensor], Any], spread: bool = False) -> Any:
        """Apply ``function`` to the hard label and to every label of the mix.

        Args:
            function: From a tensor to a tensor, or to a tuple of tensors.
            spread: Whether it moves elements about, so that shares of single elements must move with them.
        """
        hard = function(self.hard)
        targets = [function(target) for target in self.targets]
        first = hard if isinstance(hard, Tensor) else hard[0]
        weights = [weight.to(first.device) for weight in self.weights]
        # a share that is expanded from one number a sample has no strides of its own to `view`
        moved = [function(weight.contiguous()) if spread and weight.ndim else weight for weight in weights]
        if isinstance(hard, Tensor):
            return _build(hard, tuple(targets), tuple(moved), self.smoothing, self.usage)
        return tuple(
            _build(
                part,
                tuple(target[i] for target in targets),
                tuple(weight if isinstance(weight, Tensor) else weight[i] for weight in moved),
                self.smoothing,
                self.usage,
            )
            for i, part in enumerate(hard)
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _build, (self.hard, self.targets, self.weights, self.smoothing, Usage())

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedTarget:
        build, parts = self.__reduce_ex__(2)
        target: MixedTarget = build(*copy.deepcopy(parts, memo))
        return target


# fmt: off
_CASTS = frozenset(
    (
        "to", "cpu", "cuda", "type", "type_as", "long", "int", "short", "float", "double", "half", "bfloat16",
        "bool", "clone", "detach", "contiguous", "pin_memory",
    )
)
_LAYOUTS = frozenset(
    (
        "__getitem__", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze",
        "unsqueeze", "permute", "transpose", "movedim", "expand", "expand_as", "repeat", "repeat_interleave",
        "narrow", "select", "index_select", "chunk", "split", "tensor_split", "unbind", "flip", "roll",
    )
)
# fmt: on


def _asked_by_metric() -> bool:
    """Whether the code that called ``F.one_hot`` measures, and so wants the hard vector."""
    if not torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    # this function, `__torch_function__`, and the caller; `Metric.forward` runs with gradients enabled
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return str(caller).partition(".")[0] == "torchmetrics"


def _edits(name: str) -> bool:
    """Whether a function of this name changes a tensor's values in place."""
    if name.endswith("__"):
        return name in ("__setitem__", "__iand__", "__ior__", "__ixor__")
    return name.endswith("_") and name not in ("requires_grad_", "detach_", "share_memory_")


def _build(
    hard: Tensor, targets: tuple[Tensor, ...], weights: tuple[Tensor, ...], smoothing: float, usage: Usage
) -> MixedTarget:
    target = hard.as_subclass(MixedTarget)
    # `hard` goes along as a plain tensor: AOTAutograd refuses operations on a subclass that is its input
    target.hard = hard
    target.targets, target.weights = targets, weights
    target.smoothing, target.usage = smoothing, usage
    return target


def _hard(value: Any) -> Any:
    """``value`` with the hard label in place of every ``MixedTarget``."""
    if isinstance(value, MixedTarget):
        return value.hard
    if isinstance(value, dict):
        return {key: _hard(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple([_hard(item) for item in value])
    if isinstance(value, list):
        return [_hard(item) for item in value]
    return value


def _wants_grad(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any([_wants_grad(item) for item in value])
    return isinstance(value, Tensor) and not isinstance(value, MixedTarget) and value.requires_grad


def _soft_one_hot(target: MixedTarget, num_classes: int = -1) -> Tensor:
    """The share of each class, floats of shape (*target.shape, num_classes)."""
    if num_classes == -1:
        num_classes = 1 + max(int(labels.max()) for labels in target.targets)
    soft = torch.zeros((), dtype=torch.get_default_dtype(), device=target.hard.device)
    for labels, weight in zip(target.targets, target.weights, strict=True):
        soft = soft + weight.unsqueeze(-1) * F.one_hot(labels, num_classes)
    return soft * (1 - target.smoothing) + target.smoothing / num_classes if target.smoothing else soft


def _dominant(targets: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Per element, the label whose shares add up to the most; on a tie the one that comes first."""
    if len(targets) == 1:
        return targets[0]
    shares = [
        torch.stack([(target == label) * weight for target, weight in zip(targets, weights, strict=True)]).sum(0)
        for label in targets
    ]
    best, most = targets[0], shares[0]
    for label, share in zip(targets[1:], shares[1:], strict=True):
        best, most = torch.where(share > most, label, best), torch.maximum(share, most)
    return best


def _parts(y: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], float, Usage]:
    if isinstance(y, MixedTarget):
        return y.targets, y.weights, y.smoothing, y.usage
    return (y,), (torch.ones((), device=y.device),), 0.0, Usage()


def mix_targets(y: Tensor, indices: Tensor, lam: Tensor) -> Tensor:
    """Mix each target with that of another sample: ``lam`` of its own, ``1 - lam`` of the other's.

    Integer (and bool) targets are labels: the result is a :class:`MixedTarget`. Floating targets are values
    (regression, soft labels, several labels at once): the result is the plain tensor
    ``lam * y + (1 - lam) * y[indices]``. Targets that are mixed already are mixed further, exactly.

    Args:
        y: Targets of shape (B, ...).
        indices: The other sample of each, of shape (B,).
        lam: Share of the sample's own target: 0-d, or of shape (B,) for one a sample.
    """
    targets, weights, smoothing, usage = _parts(y)
    lam = lam.to(y.device)
    shape = (-1, *[1] * (y.ndim - 1))
    if y.is_floating_point() and len(targets) == 1:
        own = targets[0]
        mixed = own.index_select(0, indices).lerp_(own, (lam.view(shape) if lam.ndim else lam).to(own.dtype))
        return _build(mixed, (mixed,), weights, smoothing, usage) if isinstance(y, MixedTarget) else mixed
    if lam.ndim:
        lam = lam.view(shape).expand(y.shape)
    targets = (*targets, *[target.index_select(0, indices) for target in targets])
    others = [weight.index_select(0, indices) if weight.ndim else weight for weight in weights]
    weights = (*[weight * lam for weight in weights], *[weight * (1 - lam) for weight in others])
    return _build(_dominant(targets, weights), targets, weights, smoothing, usage)


def smooth_targets(y: Tensor, smoothing: float) -> Tensor:
    """Move the share ``smoothing`` of each target to all classes equally, when a loss is taken.

    Args:
        y: Targets: class indices, class probabilities, or 0/1 values for a binary loss. Which of these they are is
            decided by the loss.
        smoothing: Share in [0, 1]; 0 returns ``y`` itself.
    """
    smoothing = check_fraction("smoothing", smoothing)
    if not smoothing:
        return y
    targets, weights, before, usage = _parts(y)
    hard = y.hard if isinstance(y, MixedTarget) else y
    return _build(hard, targets, weights, compose_smoothing(before, smoothing), usage)


# A batch that travels in a checkpoint, for what needs it again after a resume, is loaded with `weights_only=True`
torch.serialization.add_safe_globals([_build, Usage])
