"""Averages of a module's weights, kept beside it, and put in their place and out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Averages", "update_averages_", "warm_decay"]


def warm_decay(decay: float, num_updates: int) -> float:
    """The decay of an early update, at which the average would else still be the weights it began with.

    ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow's ``ExponentialMovingAverage(num_updates=n)``.

    Example:
        >>> [round(warm_decay(0.999, n), 3) for n in (0, 10, 100, 10_000)]
        [0.1, 0.55, 0.918, 0.999]
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


def update_averages_(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Set each average to ``decay * average + (1 - decay) * value``, in place.

    Args:
        averages: Of a floating or complex dtype.
        values: One an average, of the same shape; moved to its device and dtype.
        decay: In [0, 1].
    """
    if averages:
        values = [value.to(average) for average, value in zip(averages, values, strict=True)]
        torch._foreach_lerp_(averages, values, 1.0 - decay)


class Averages:
    """The averages of what a module trains: its parameters that are not frozen, and its persistent buffers.

    A parameter that is shared has one average; one that is frozen gets one when it is unfrozen. Averages of
    floating dtypes below 32 bits are float32, which small changes would else be lost in; integer buffers are copied.
    Of a parameter that is sharded over ranks (a ``DTensor``, or DeepSpeed's at stage 3) each rank averages its part.

    Args:
        module: The module; its tensors are looked up by name at each use, since they may be replaced.
        device: Where the averages live; ``None``: where the weights do.

    Attributes:
        values: The averages by name: a rank's part of a sharded one.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None) -> None:
        self.device = device
        self.values: dict[str, Tensor] = {}
        self._module = module
        state = module.state_dict(keep_vars=True)
        self._places = _find_places(module, state)
        self._is_sharded = any(hasattr(value, "to_local") for value in state.values())
        self._trained: dict[str, Tensor] | None = None

    @property
    def in_place(self) -> bool:
        """Whether the averages are in the module now, in the place of the trained weights."""
        return self._trained is not None

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move each average towards the present value; one that there is none of yet starts there."""
        averages, values = [], []
        for name, value in self._present().items():
            average = self.values.get(name)
            if average is None:
                if not isinstance(value, nn.Parameter) or value.requires_grad:
                    self.values[name] = self._new(_local(value))
            elif average.is_floating_point() or average.is_complex():
                averages.append(average)
                values.append(_local(value))
            else:
                average.copy_(_local(value))
        update_averages_(averages, values, decay)

    @torch.no_grad()
    def enter(self) -> None:
        """Put the averages into the module; the trained weights are kept beside them."""
        if self.in_place:
            return
        present = self._present()
        self._trained = {}
        for name, average in self.values.items():
            value = _local(present[name])
            self._trained[name] = value.to(average.device, copy=True)
            value.copy_(average)
        _renew(present[name] for name in self.values)

    @torch.no_grad()
    def leave(self) -> None:
        """Put the trained weights back, exactly."""
        if self._trained is None:
            return
        present = self._present()
        for name, trained in self._trained.items():
            _local(present[name]).copy_(trained)
        _renew(present[name] for name in self._trained)
        self._trained = None

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """The averages by name, whole: a collective operation where they are sharded, which gathers them on the CPU."""
        present = self._present()
        return {name: _gathered(average, like=present[name]) for name, average in self.values.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages from what :meth:`state` returned, on any number of ranks.

        Raises:
            ValueError: If the module lacks one of them, or has it in another shape.
        """
        present = self._present()
        for name, average in state.items():
            if name not in present or _shape(present[name]) != average.shape:
                got = f"has it as {tuple(_shape(present[name]))}" if name in present else "has no such parameter"
                raise ValueError(
                    f"Expected the module to have the averaged {name!r} {tuple(average.shape)}, but it {got}. Use the "
                    "module that the checkpoint was saved with, or start without it."
                )
        self.values = {name: self._new(_part(average, like=present[name])) for name, average in state.items()}

    def _new(self, value: Tensor) -> Tensor:
        wide = value.is_floating_point() or value.is_complex()
        dtype = torch.promote_types(value.dtype, torch.float32) if wide else value.dtype
        return value.detach().to(self.device or value.device, dtype, copy=True)

    def _present(self) -> dict[str, Tensor]:
        """The module's tensors now."""
        if self._is_sharded:
            # After an evaluation FSDP2 may leave whole tensors in the place of the parts; writing to those would change
            # nothing for long. A state dict is of the parts: taking one puts them back.
            self._module.state_dict(keep_vars=True)
        return {name: getattr(owner, key) for name, (owner, key) in self._places.items()}


def _find_places(module: nn.Module, state: Mapping[str, Any]) -> dict[str, tuple[nn.Module, str]]:
    """Where each parameter and persistent buffer is: its module and its name there; a shared one by its first name."""
    buffers = (name for name, _ in module.named_buffers() if name in state)
    places = {}
    for name in (*(name for name, _ in module.named_parameters()), *buffers):
        path, _, key = name.rpartition(".")
        places[name.replace("_orig_mod.", "")] = (module.get_submodule(path), key)
    return places


def _shape(value: Any) -> torch.Size:
    """The shape of the whole tensor."""
    return torch.Size(value.ds_shape) if hasattr(value, "ds_shape") else value.shape


def _local(value: Any) -> Tensor:
    """The part of a tensor that this rank has."""
    if hasattr(value, "ds_tensor"):  # of DeepSpeed's stage 3: flat, of equal size on all ranks, the last one padded
        return value.ds_tensor.detach()  # type: ignore[no-any-return]
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local.detach()


def _renew(values: Iterable[Any]) -> None:
    """Let what is gathered of changed parts be gathered anew: a collective operation."""
    whole = [value for value in values if hasattr(value, "ds_tensor") and value.numel() == value.ds_numel]
    if whole:  # stage 3 keeps small ones whole at all times
        whole[0].partition(param_list=whole)
        whole[0].all_gather(param_list=whole)


def _gathered(average: Tensor, like: Any) -> Tensor:
    if hasattr(like, "ds_tensor"):
        part = average.to(like.device)
        parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(like.ds_process_group))]
        torch.distributed.all_gather(parts, part, group=like.ds_process_group)
        return torch.cat(parts)[: like.ds_numel].view(_shape(like)).cpu()
    if not hasattr(like, "to_local"):
        return average
    from torch.distributed.tensor import DTensor

    part = average.to(like.to_local().device)
    whole = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return whole.full_tensor().cpu()


def _part(average: Tensor, like: Any) -> Tensor:
    if hasattr(like, "ds_tensor"):
        size, rank = like.ds_tensor.numel(), torch.distributed.get_rank(like.ds_process_group)
        part = average.new_zeros(size)
        own = average.flatten()[rank * size : (rank + 1) * size]
        part[: own.numel()] = own
        return part.to(like.ds_tensor.device)
    if not hasattr(like, "to_local"):
        return average.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return _local(distribute_tensor(average.to(like.to_local().device), like.device_mesh, like.placements))
