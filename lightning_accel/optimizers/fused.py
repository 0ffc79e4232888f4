"""FusedOptimizer: turn on the fused, else the multi-tensor, implementation that torch's optimizers have but rarely use.

torch steps each parameter by a dozen operations in Python unless it is told otherwise, also on the CPU, where one fused
kernel does the same in a single pass over memory. The maths is the same; the last bits differ, since the operations are
ordered differently. See the options ``fused`` and ``foreach`` in https://pytorch.org/docs/stable/optim.html.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_accel.hooks import Contract, OptimizerTransform
from lightning_accel.optimizers.fuse import sparse_parameters, use_fused_

__all__ = ["FusedOptimizer"]


class FusedOptimizer(OptimizerTransform):
    """Turn on ``fused``, else ``foreach``, in every optimizer and parameter group that can have it.

    Args:
        enabled: Whether to do so; ``False`` gives the plain run.

    Attributes:
        choices: One line an optimizer: what was turned on.

    Raises:
        TypeError: If ``enabled`` is not a bool.

    Example:
        >>> FusedOptimizer().state_key
        "FusedOptimizer{'enabled': True}"
    """

    contract = Contract(
        purpose="Turn on the fused step of torch's optimizers, else the multi-tensor one.",
        touches=frozenset({"optimizer"}),
        acts="every optimizer step",
        expects="less time in the optimizer's step",
        docs="methods/fused_optimizer",
        once=True,
        refuses={"DeepSpeedStrategy": "its engine has fused optimizers of its own. Leave FusedOptimizer out."},
        accepts=frozenset({"ZeROStrategy"}),
    )

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"Expected `enabled` to be a bool, but got {enabled!r}.")
        super().__init__(enabled=enabled)
        self.enabled = enabled
        self.choices: list[str] = []

    @property
    def is_neutral(self) -> bool:
        """Whether it is switched off."""
        return not self.enabled

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``configure_optimizers``, unless it is switched off."""
        self.choices = []
        if self.enabled:
            super().install(trainer, pl_module)

    def transform_optimizer(self, optimizer: Optimizer, names: Mapping[torch.nn.Parameter, str]) -> Optimizer:
        """Turn on the fused step of one optimizer in place; say what was done, or warn that nothing could be."""
        result = use_fused_(optimizer, sparse_parameters(self.module) if self.module is not None else ())
        name = type(optimizer).__name__
        changes = [change or f"unchanged ({reason})" for change, reason in result]
        if not any(change for change, _ in result):
            self.warn_no_effect(f"{name}: {'; '.join(dict.fromkeys(reason for _, reason in result))}.")
            return optimizer
        choice = f"{name}: {', '.join(dict.fromkeys(changes))}"
        self.choices.append(choice)
        rank_zero_info(f"FusedOptimizer: {choice}")
        return optimizer
