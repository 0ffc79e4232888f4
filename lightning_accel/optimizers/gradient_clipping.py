"""GradientClipping: bound the gradient of a step, by norm, by value, or unit by unit against the weights.

The adaptive way bounds the gradient of each unit (the weights into one output) by a fraction of the norm of its
weights, so that large batches and rates stay stable without batch normalization: Brock et al. 2021,
"High-Performance Large-Scale Image Recognition Without Normalization", https://arxiv.org/abs/2102.06171, equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.errors import check_choice, check_number, check_patterns, matches_any
from lightning_accel.hooks import AccelCallback, Contract, parameter_names

__all__ = ["GradientClipping", "clip_units_", "unit_norms"]

_DEFAULTS = {"norm": 1.0, "value": 0.5, "adaptive": 0.01}


def unit_norms(value: Tensor) -> Tensor:
    """The Euclidean norm of each unit of a weight, or of its gradient.

    Args:
        value: Of a linear layer (out, in), a convolution (out, in / groups, ...): a unit is all that leads to one
            output. Of a bias, a gain or a single number: the whole is one unit.

    Returns:
        In float32 at least; (out, 1, ...), or no dimensions.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
    """
    dims = tuple(range(1, value.dim())) or None
    dtype = torch.promote_types(value.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(value, dim=dims, keepdim=dims is not None, dtype=dtype)
    return norms


@torch.no_grad()
def clip_units_(parameters: Iterable[Tensor], fraction: float, eps: float = 1e-3) -> None:
    """Scale the gradient of each unit down to ``fraction`` of the norm of its weights, in place, where it is larger.

    Args:
        parameters: Those with gradients are clipped; a ``DTensor`` across all ranks.
        fraction: The bound, above 0; 0.01 for batches of 4096 in the paper.
        eps: The least norm that weights are taken to have, so that weights of 0 can move.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            bound = unit_norms(parameter).clamp(min=eps) * fraction
            scale = bound / unit_norms(gradient).clamp(min=1e-6)
            gradient.mul_(scale.clamp(max=1.0).to(gradient.dtype))


class GradientClipping(AccelCallback):
    """Clip the gradient before each optimizer step: of a whole window, over all ranks, after a scaler has unscaled it.

    Args:
        threshold: The bound. By ``"norm"``: of all gradients together; by ``"value"``: of each number;
            ``"adaptive"``: of each unit, as a fraction of the norm of its weights. ``None``: 1.0, 0.5 or 0.01.
            Infinity is off.
        by: ``"norm"``, ``"value"`` or ``"adaptive"``.
        exclude: Regular expressions for the names of parameters that are not clipped, where ``by`` is
            ``"adaptive"``; the paper leaves out the last linear layer.
        eps: The least norm that a unit's weights are taken to have, where ``by`` is ``"adaptive"``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value, or (when training starts) a pattern matches nothing.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> clipping = GradientClipping(0.01, by="adaptive", exclude=["head"])
        >>> trainer = Trainer(callbacks=[clipping], logger=False, enable_checkpointing=False)
    """

    contract: ClassVar[Contract] = Contract(
        purpose="Bound the gradient of a step, by norm, by value, or unit by unit against the weights.",
        touches=frozenset({"gradients"}),
        acts="before every optimizer step",
        expects="no step far out of line; stable training at higher rates",
        docs="methods/gradient_clipping",
        after=frozenset({"GradualPruning"}),
        once=True,
        manual_optimization="there the module itself decides when to step. Call `self.clip_gradients(...)` before "
        "`optimizer.step()`, or set `automatic_optimization = True`.",
    )

    def __init__(
        self,
        threshold: float | None = None,
        by: Literal["norm", "value", "adaptive"] = "norm",
        exclude: list[str] | None = None,
        eps: float = 1e-3,
    ) -> None:
        self.by = check_choice("by", by, tuple(_DEFAULTS))
        if threshold is None:
            threshold = _DEFAULTS[self.by]
        self.threshold = check_number("threshold", threshold, 0, math.inf, open_low=True)
        self._patterns = check_patterns("exclude", exclude) if exclude is not None else ()
        if self._patterns and self.by != "adaptive":
            raise ValueError(f"Expected `exclude` to be used with by='adaptive', but got by={by!r}.")
        self.eps = check_number("eps", eps, 0, math.inf, open_low=True, open_high=True)
        super().__init__(threshold=self.threshold, by=self.by, exclude=list(exclude or ()), eps=self.eps)
        self._excluded: set[Tensor] = set()

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is out of bounds."""
        return math.isinf(self.threshold)

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the Trainer clip, where it can: it knows how each strategy and precision does."""
        if self.is_neutral:
            return
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"{type(self).__name__} can't work with Trainer(gradient_clip_val={trainer.gradient_clip_val}): both "
                "would clip. Remove one of them."
            )
        if self.by == "adaptive":
            if hasattr(trainer.strategy, "partitions_of"):
                raise MisconfigurationException(
                    f"{type(self).__name__}(by='adaptive') can't work with {type(trainer.strategy).__name__}: its "
                    "engine splits gradients within units. Use by='norm', or FullyShardStrategy (accel_fsdp2)."
                )
            return
        before = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        self.on_undo(lambda: _set(trainer, *before))
        _set(trainer, self.threshold, GradClipAlgorithmType(self.by))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is excluded, where the strategy has put it."""
        names = parameter_names(pl_module)
        for pattern in self._patterns:
            if not any(pattern.search(name) for name in names.values()):
                raise ValueError(
                    f"Expected `exclude` to match names of parameters, but {pattern.pattern!r} matches none of "
                    f"{', '.join(list(names.values())[:8])}, ..."
                )
        self._excluded = {parameter for parameter, name in names.items() if matches_any(self._patterns, name)}
        self.on_undo(self._excluded.clear)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip unit by unit."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.change_gradient(parameter)

    def change_gradient(self, parameter: Tensor) -> None:
        """Clip the units of one parameter; by norm and by value the Trainer does it."""
        if self.by == "adaptive" and parameter not in self._excluded:
            clip_units_([parameter], self.threshold, self.eps)


def _set(trainer: Trainer, value: float | None, algorithm: GradClipAlgorithmType | None) -> None:
    trainer.gradient_clip_val, trainer.gradient_clip_algorithm = value, algorithm
