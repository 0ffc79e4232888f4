"""Parameters that are frozen when training starts and trained later, with the numbers that DDP would give.

DeepSpeed splits what is trainable at the start into one flat tensor a group, and never updates anything else. A flat
tensor also has one step count, so that what joins later would start with the wrong bias correction in Adam. Here what
is frozen gets groups of its own in a copy of the optimizer that DeepSpeed drives; they are passed over as long as
they are frozen. The caller's optimizer keeps its groups, so that schedulers go on as they are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

__all__ = ["FreezeWatch", "LateGroups", "all_trainable"]


class LateGroups:
    """The groups of an optimizer, each split into what is trained from the start and what each pattern names.

    Args:
        optimizer: The caller's; it is left as it is.
        names: The dotted name of each parameter.
        patterns: Regular expressions; what one of them finds is frozen and unfrozen as a whole.

    Attributes:
        inner: The optimizer to give to DeepSpeed.
        parameters: What is frozen and will be trained.

    Raises:
        MisconfigurationException: If a pattern matches no frozen parameter of the optimizer.
    """

    def __init__(
        self, optimizer: Optimizer, names: Mapping[nn.Parameter, str], patterns: Sequence[re.Pattern[str]]
    ) -> None:
        self.outer = optimizer
        self.parameters: list[nn.Parameter] = []
        self._sources: list[dict[str, Any]] = []
        unused = set(patterns)
        groups = []
        for group in optimizer.param_groups:
            parts: dict[re.Pattern[str] | None, list[nn.Parameter]] = {None: []}
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parts[None].append(parameter)
                    continue
                for pattern in patterns:
                    if pattern.search(names[parameter]):
                        parts.setdefault(pattern, []).append(parameter)
                        self.parameters.append(parameter)
                        unused.discard(pattern)
                        break
            for members in filter(None, parts.values()):
                groups.append({**group, "params": members})
                self._sources.append(group)
        if unused:
            missing = ", ".join(repr(pattern.pattern) for pattern in patterns if pattern in unused)
            raise MisconfigurationException(
                f"`trained_later` {missing} matches no frozen parameter of the optimizer. Give the optimizer every "
                "parameter that will be trained, and freeze those of `trained_later` before training starts."
            )
        self.inner: Any = object.__new__(type(optimizer))
        # A scheduler's counter in place of `step` would step the outer optimizer
        vars(self.inner).update({key: value for key, value in vars(optimizer).items() if key != "step"})
        self.inner.param_groups = groups
        self.inner.state = defaultdict(dict)

    def take_over_options(self) -> None:
        """Give the inner groups what schedulers changed in the outer ones."""
        self.outer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at
        for group, source in zip(self.inner.param_groups, self._sources, strict=True):
            group.update({key: value for key, value in source.items() if key != "params"})

    def give_back_options(self) -> None:
        """Give the outer groups what a checkpoint restored in the inner ones: schedulers go on from it."""
        for group, source in zip(self.inner.param_groups, self._sources, strict=True):
            source.update({key: value for key, value in group.items() if key != "params"})


class FreezeWatch:
    """Which groups of the optimizer are frozen now; whether what is frozen is what DeepSpeed can leave alone.

    Args:
        groups: The optimizer's groups, before DeepSpeed flattens them.
        names: The dotted name of each parameter of the module.
        late: Where those groups are not the ones that schedulers know.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], names: Mapping[nn.Parameter, str], late: LateGroups | None = None
    ) -> None:
        self._late = late
        self._members = [[parameter for parameter in group["params"] if parameter.requires_grad] for group in groups]
        inside = {parameter for members in self._members for parameter in members}
        self._outside = [parameter for parameter in names if not parameter.requires_grad and parameter not in inside]
        self._names = names

    def before_step(self) -> set[int]:
        """Take over what schedulers changed; return what :meth:`frozen_groups` does."""
        if self._late is not None:
            self._late.take_over_options()
        return self.frozen_groups()

    def frozen_groups(self) -> set[int]:
        """The numbers of the groups whose partitions must stay as they are.

        Raises:
            MisconfigurationException: If a part of a group is frozen, or something outside of all groups is trained.
        """
        for parameter in self._outside:
            if parameter.requires_grad:
                raise MisconfigurationException(
                    f"{self._names[parameter]!r} was unfrozen after training had started, and DeepSpeed would never "
                    "update it. Give it to the optimizer from the start, and name it in "
                    "ZeROStrategy(trained_later=[...])."
                )
        frozen = set()
        for number, members in enumerate(self._members):
            trained = [parameter.requires_grad for parameter in members]
            if not any(trained):
                frozen.add(number)
            elif not all(trained):
                name = self._names[members[trained.index(False)]]
                raise MisconfigurationException(
                    f"{name!r} was frozen after training had started, but others in its part of the optimizer are "
                    "trained, and DeepSpeed steps them as one. Give it a parameter group of its own, or train with "
                    "strategy='accel_fsdp2' or 'accel_ddp'."
                )
        return frozen


@contextmanager
def all_trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters look trainable, while DeepSpeed decides what to split."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
