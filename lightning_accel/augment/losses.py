"""The loss of a mix of targets: what each loss function of ``torch.nn.functional`` does with shares and smoothing.

Every loss of a mix is ``sum_k share_k * loss(target_k)``, each ``loss`` being the caller's own call with all of its
options. Where the shares differ from element to element, each element's loss is multiplied by its share and then
reduced as the caller asked. The ``"mean"`` divides by what the loss divides by for ``target_k`` alone: the number of
elements, or for class indices the class weights of those that are not ignored. So shares that happen to be equal give
the same number as one share for the batch, and the scale of the gradient does not depend on the draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOSSES", "compose_smoothing", "mixed_loss"]

_NAMES = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",  # newer than the oldest torch that is supported
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
)
LOSSES: dict[Callable[..., Any], tuple[str, ...]] = {
    getattr(F, name): tuple(inspect.signature(getattr(F, name)).parameters) for name in _NAMES if hasattr(F, name)
}
"""The loss functions that see the mix, and the names of their parameters in order."""

_CLASS_INDEX = ("cross_entropy", "linear_cross_entropy", "nll_loss")
_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "multilabel_soft_margin_loss")


def compose_smoothing(first: float, second: float) -> float:
    """The smoothing that one after the other amounts to: ``1 - (1 - first) * (1 - second)``."""
    if not first or not second:
        return first or second
    return 1 - (1 - first) * (1 - second)


def mixed_loss(
    func: Callable[..., Any],
    named: dict[str, Any],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    smoothing: float = 0.0,
) -> tuple[Tensor, bool]:
    """The loss of a mix of targets.

    Args:
        func: One of :data:`LOSSES`.
        named: The call's arguments by name; ``target`` among them is not used.
        targets: The targets that were mixed.
        weights: The share of each: 0-d, or of the targets' shape.
        smoothing: Label smoothing of the targets, in [0, 1].

    Returns:
        The loss, and whether ``smoothing`` is in it (it means nothing for a regression loss).
    """
    name = func.__name__
    smoothed = not smoothing or name in _CLASS_INDEX or name in _BINARY
    total: Tensor | None = None
    for target, weight in zip(targets, weights, strict=True):
        call = {**named, "target": target}
        if len(targets) == 1:  # a share of 1, whether 0-d or not
            return _smoothed_loss(func, call, smoothing), smoothed
        if weight.ndim:
            loss = _shared_loss(func, call, weight, smoothing)
        else:
            loss = _smoothed_loss(func, call, smoothing)
            loss = weight.to(loss.dtype) * loss
        total = loss if total is None else total + loss
    assert total is not None
    return total, smoothed


def _shared_loss(func: Callable[..., Any], call: dict[str, Any], weight: Tensor, smoothing: float) -> Tensor:
    """The loss with each element multiplied by its share, in the reduction of the caller."""
    reduction = _reduction(call)
    each = _smoothed_loss(func, {**call, "size_average": None, "reduce": None, "reduction": "none"}, smoothing)
    if weight.ndim > each.ndim:  # one loss for the classes of dimension 1, which share a share
        weight = weight.select(1, 0)
    each = weight.to(each.dtype) * each
    if reduction == "none":
        return each
    total = each.sum()
    return total if reduction == "sum" else total / _divisor(func, call, reduction, each)


def _smoothed_loss(func: Callable[..., Any], call: dict[str, Any], smoothing: float) -> Tensor:
    """The loss of one target, with the smoothing of the target and the caller's own."""
    call = {key: value for key, value in call.items() if key in LOSSES[func]}
    name = func.__name__
    if smoothing and name == "nll_loss":
        return _smoothed_nll(call, smoothing)
    if smoothing and name in _CLASS_INDEX:
        call["label_smoothing"] = compose_smoothing(call.get("label_smoothing", 0.0), smoothing)
    elif smoothing and name in _BINARY:  # two classes, each of which gets half
        call["target"] = call["target"] * (1 - smoothing) + smoothing / 2
    loss: Tensor = func(**call)
    return loss


def _smoothed_nll(call: dict[str, Any], smoothing: float) -> Tensor:
    """``F.nll_loss`` of smoothed labels, as ``F.cross_entropy`` defines it for logits."""
    reduction = _reduction(call)
    log_probs, target, weight = call["input"], call["target"], call.get("weight")  # (N, C, ...), (N, ...), (C,)
    classes = 1 if log_probs.ndim > 1 else 0
    if weight is not None:
        log_probs = log_probs * weight.view(-1, *[1] * (log_probs.ndim - classes - 1))
    uniform: Tensor = -log_probs.mean(classes).masked_fill(target == call.get("ignore_index", -100), 0)
    if reduction != "none":
        uniform = uniform.sum()
    if reduction == "mean":
        uniform = uniform / _divisor(F.nll_loss, call, reduction, uniform)
    hard: Tensor = F.nll_loss(**call)
    return (1 - smoothing) * hard + smoothing * uniform


def _reduction(call: dict[str, Any]) -> str:
    """The reduction in force, whether by its own name or by the two deprecated flags."""
    average, reduce = call.get("size_average"), call.get("reduce")
    if average is None and reduce is None:
        return str(call.get("reduction", "mean"))
    if reduce is False:
        return "none"
    return "sum" if average is False else "mean"


def _divisor(func: Callable[..., Any], call: dict[str, Any], reduction: str, each: Tensor) -> Tensor | int:
    """What ``func`` divides its sum by for one target."""
    target: Tensor = call["target"]
    weight: Tensor | None = call.get("weight")
    if reduction == "batchmean":
        return int(call["input"].size(0))
    if func.__name__ in _CLASS_INDEX and not target.is_floating_point():
        ignored = call.get("ignore_index", -100)
        counted = target != ignored if ignored is not None else torch.ones_like(target, dtype=torch.bool)
        if weight is None:
            return counted.sum()
        return (weight[target.where(counted, 0)] * counted).sum()
    if func.__name__ in ("mse_loss", "huber_loss") and weight is not None:
        return weight.sum()
    return each.numel()
