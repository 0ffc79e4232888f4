"""OptimizerTransform: change the optimizers that ``configure_optimizers`` returned, before anything else sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_accel.hooks.callback import AccelCallback

__all__ = ["OptimizerTransform", "parameter_names", "replace_optimizers"]


def parameter_names(module: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    """The dotted name of each parameter: a shared one's first name, without ``torch.compile``'s prefix."""
    return {parameter: name.replace("_orig_mod.", "") for name, parameter in module.named_parameters()}


def replace_optimizers(configured: Any, replacements: Mapping[int, Optimizer]) -> Any:
    """Replace optimizers in any shape that ``configure_optimizers`` may return, and in the schedulers built on them.

    Args:
        configured: An optimizer, a list or tuple of them, two lists, or dictionaries; containers are rebuilt, not
            mutated.
        replacements: From ``id(old)`` to the new optimizer; an optimizer that is not in it stays.
    """
    if isinstance(configured, LightningOptimizer):
        return replacements.get(id(configured.optimizer), configured)
    if isinstance(configured, Optimizer):
        return replacements.get(id(configured), configured)
    if isinstance(configured, dict):
        return {key: replace_optimizers(value, replacements) for key, value in configured.items()}
    if isinstance(configured, (list, tuple)):
        items = [replace_optimizers(item, replacements) for item in configured]
        if hasattr(configured, "_fields"):  # a named tuple such as LRSchedulerConfig
            return type(configured)(*items)
        return type(configured)(items)
    for scheduler in _with_nested(configured):
        old = getattr(scheduler, "optimizer", None)
        if old is not None and id(old) in replacements:
            new = replacements[id(old)]
            scheduler.optimizer = new
            _carry_step_counter(old, new, scheduler)
    return configured


def _with_nested(scheduler: Any) -> list[Any]:
    """A scheduler and those inside it (SequentialLR, ChainedScheduler)."""
    return [scheduler, *(leaf for inner in getattr(scheduler, "_schedulers", []) for leaf in _with_nested(inner))]


def _carry_step_counter(old: Optimizer, new: Optimizer, scheduler: Any) -> None:
    """Let the new optimizer's ``step`` be counted as the scheduler has the old one's counted.

    A scheduler wraps ``optimizer.step`` when it is made, to tell a user who steps it first. Its wrapper stays on the
    old object; without it on the new one the scheduler would warn in every run.
    """
    if not hasattr(new.step, "_wrapped_by_lr_sched") and hasattr(scheduler, "step"):
        step = new.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            new._opt_called = True  # type: ignore[attr-defined]
            return step(*args, **kwargs)

        counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        new.step = counted  # type: ignore[method-assign]


def _carry_group_options(old: Optimizer, new: Optimizer) -> None:
    """Give the new groups what schedulers keep in the old ones: ``initial_lr``, OneCycleLR's ``max_lr``, ..."""
    group_of = {id(parameter): group for group in old.param_groups for parameter in group["params"]}
    for group in new.param_groups:
        source = next((group_of[id(parameter)] for parameter in group["params"] if id(parameter) in group_of), {})
        for key, value in source.items():
            group.setdefault(key, value)


def find_optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in what ``configure_optimizers`` returned, each once, in order."""
    found: list[Optimizer] = []
    stack = [configured]
    while stack:
        item = stack.pop(0)
        if isinstance(item, LightningOptimizer):
            item = item.optimizer
        if isinstance(item, Optimizer):
            if all(item is not other for other in found):
                found.append(item)
        elif isinstance(item, dict):
            stack = [*item.values(), *stack]
        elif isinstance(item, (list, tuple)):
            stack = [*item, *stack]
    return found


def find_schedulers(configured: Any) -> list[Any]:
    """The learning-rate schedulers in what ``configure_optimizers`` returned, in order; each before those inside it."""
    if isinstance(configured, (Optimizer, LightningOptimizer)):
        return []
    if isinstance(configured, dict):
        configured = list(configured.values())
    if isinstance(configured, (list, tuple)):
        return [scheduler for item in configured for scheduler in find_schedulers(item)]
    return _with_nested(configured) if hasattr(configured, "optimizer") else []


class OptimizerTransform(AccelCallback):
    """A callback that changes each optimizer when the strategy has it made.

    Every strategy calls ``configure_optimizers``, so this works under all of them, before a checkpoint's optimizer
    state is restored. Changing an optimizer in place keeps everything that refers to it valid; returning another one is
    supported, and schedulers are then pointed at it.

    Attributes:
        module: Whose optimizer is being changed; None where none is.
    """

    module: torch.nn.Module | None = None

    def transform_optimizer(self, optimizer: Optimizer, names: Mapping[torch.nn.Parameter, str]) -> Optimizer:
        """Return the optimizer to train with: the same object changed in place, or another.

        Args:
            optimizer: One that ``configure_optimizers`` returned.
            names: The dotted name of each parameter of the module.
        """
        raise NotImplementedError

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``configure_optimizers``."""
        self.patch(pl_module, "configure_optimizers", lambda original: self._configured(original(), pl_module))

    def transform(self, optimizer: Optimizer, module: torch.nn.Module) -> Optimizer:
        """Return what is to train ``module`` in the place of one of its optimizers."""
        self.module = module
        try:
            return self.transform_optimizer(optimizer, parameter_names(module))
        finally:
            self.module = None

    def _configured(self, configured: Any, pl_module: LightningModule) -> Any:
        old = find_optimizers(configured)
        new = [self.transform(optimizer, pl_module) for optimizer in old]
        replacements = {}
        for before, after in zip(old, new, strict=True):
            if after is not before:
                _carry_group_options(before, after)
                replacements[id(before)] = after
        return replace_optimizers(configured, replacements) if replacements else configured
