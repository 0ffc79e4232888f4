"""Sharding a module with FSDP2 from outside: the units, what all ranks must agree on, and gradients between steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = [
    "CallOrder",
    "ShardedRoot",
    "broadcast_values",
    "check_same_modules",
    "clip_mixed_norm_",
    "forget_partial_gradients",
    "load_partial_gradients",
    "partial_gradients",
    "shard",
    "units",
    "waiting_gradients",
]


class ShardedRoot(nn.Module):
    """The unit of everything that is in no block.

    Its forward runs a step of the module, so that its parameters are there for the whole step, whatever that calls.

    Args:
        module: The module inside.

    Attributes:
        replicated: Parameters without dimensions, which can't be split: each rank has them whole.
        sync_gradients: Whether a backward reduces their gradients over the ranks.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.sync_gradients = True
        self.replicated = [parameter for parameter in module.parameters() if parameter.ndim == 0]
        for parameter in self.replicated:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)  # type: ignore[no-untyped-call]

    settings: Any = None
    """What it was sharded with."""

    def forward(self, step: Callable[[], Any]) -> Any:
        """Run ``step``."""
        return step()

    def _average(self, parameter: Tensor) -> None:
        if self.sync_gradients and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool = True,
    offload: bool = False,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Any:
    """Shard a module in place.

    Args:
        module: The module; nothing but its blocks changes its class.
        blocks: Modules inside it to gather one at a time, outer ones before those inside them.
        mesh: One dimension to shard over, or two: to replicate and to shard over.
        reshard_after_forward: Whether blocks free their parameters after their forward.
        offload: Whether shards are kept in the memory of the host.
        param_dtype: What parameters are gathered in.
        reduce_dtype: What gradients are reduced in.

    Returns:
        The root around it, a :class:`ShardedRoot` that is an ``FSDPModule`` too.
    """
    root = ShardedRoot(module)
    arguments: dict[str, Any] = {
        "mesh": mesh,
        # autocast casts inputs where it needs to, labels and targets stay as they are
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy(),
    }
    if root.replicated:
        arguments["ignored_params"] = set(root.replicated)
        for parameter in root.replicated:
            parameter.data = parameter.data.to(mesh.device_type)
    for block in reversed(list(blocks)):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **arguments)
    fully_shard(root, reshard_after_forward=False, **arguments)
    with torch.no_grad():
        root(lambda: None)  # the first to run is the root: this must be it, not a block that is called in some hook
    root.reshard()  # type: ignore[operator]  # fully_shard made it an FSDPModule
    return root


def units(root: nn.Module) -> list[Any]:
    """All modules that are gathered on their own, the root first."""
    return [item for item in root.modules() if isinstance(item, FSDPModule)]


class CallOrder:
    """Remembers in which order units are called, to gather them as often as ranks that have more batches."""

    def __init__(self, units: Iterable[Any]) -> None:
        self.called: list[Any] = []
        self._handles = [unit.register_forward_pre_hook(lambda unit, _: self.called.append(unit)) for unit in units]

    def repeat(self) -> None:
        """Gather and free what was called, in that order."""
        for unit in self.called:
            unit.unshard()
            unit.reshard()

    def remove(self) -> None:
        """Stop to remember."""
        for handle in self._handles:
            handle.remove()


def check_same_modules(module: nn.Module) -> None:
    """Raise on every rank where ranks have different modules, which would mix their parameters or wait for ever.

    Raises:
        RuntimeError: With the first difference.
    """
    own = [
        f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        + (" trainable" if tensor.requires_grad else "")
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    ]
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256("\n".join(own).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    rank = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    first, other = everyone[0], everyone[rank]
    place = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
    has = [names[place] if place < len(names) else "nothing" for names in (first, other)]
    raise RuntimeError(
        f"The ranks have different modules: rank 0 has `{has[0]}` where rank {rank} has `{has[1]}`. Build the same "
        "module on every rank: nothing in it may depend on the rank, or on a random number that is not seeded."
    )


def broadcast_values(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Give every rank the values of rank 0, as DDP does; ``device`` is where ranks communicate."""
    if dist.get_world_size() == 1:
        return
    for tensor in tensors:
        value = tensor.detach().to(device).contiguous()
        dist.broadcast(value, 0)
        if value.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(value)


def clip_mixed_norm_(optimizer: Optimizer, max_norm: float) -> None:
    """Clip the norm over sharded and whole gradients together."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    kinds = [
        [gradient for gradient in gradients if isinstance(gradient, DTensor)],
        [gradient for gradient in gradients if not isinstance(gradient, DTensor)],
    ]
    norms = [torch.nn.utils.get_total_norm(kind) for kind in kinds if kind]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not whole:
        return
    factor = (max_norm / (torch.linalg.vector_norm(torch.stack(whole)) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))


# ------------------------------------------------------------------------- gradients that wait for the end of a window


def _sharded_parameters(root: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The units with FSDP2's own records of their parameters, which are not public."""
    for unit in units(root):
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch < 2.11 has one
        for group in groups:
            for record in group.fsdp_params if group is not None else ():
                yield unit, record


def waiting_gradients(root: ShardedRoot) -> Iterator[tuple[str, Tensor]]:
    """This rank's gradients that were not reduced yet, by name, whole."""
    names = {parameter: name for name, parameter in root.module.named_parameters()}
    for _, record in _sharded_parameters(root):
        gradient = record.unsharded_accumulated_grad
        if gradient is None and hasattr(record, "_unsharded_param"):
            gradient = record._unsharded_param.grad
        if gradient is not None:
            yield names[record.sharded_param], gradient
    for parameter, name in names.items():
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            yield name, parameter.grad


def partial_gradients(root: ShardedRoot) -> dict[str, Tensor]:
    """This rank's gradients that were not reduced yet, or not used yet, by name; on the CPU."""
    found = dict(waiting_gradients(root))
    for name, parameter in root.module.named_parameters():
        if isinstance(parameter.grad, DTensor):
            found[f"{name} (reduced)"] = parameter.grad.to_local()
    return {name: gradient.detach().cpu().clone() for name, gradient in found.items()}


def load_partial_gradients(root: ShardedRoot, gradients: Mapping[str, Tensor]) -> None:
    """Put back what :func:`partial_gradients` gave, on the same number of ranks."""
    names = {parameter: name for name, parameter in root.module.named_parameters()}
    for parameter, name in names.items():
        if isinstance(parameter, DTensor) and (part := gradients.get(f"{name} (reduced)")) is not None:
            local = part.to(parameter.device)
            parameter.grad = DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        elif not isinstance(parameter, DTensor) and name in gradients:
            parameter.grad = gradients[name].to(parameter.device)
    for unit, record in _sharded_parameters(root):
        if (part := gradients.get(names[record.sharded_param])) is None:
            continue
        unit.unshard()  # makes the whole parameter, if this is the first time
        if part.dtype == record._unsharded_param.dtype:
            record._unsharded_param.grad = part.to(record._unsharded_param.device)
        else:
            record.unsharded_accumulated_grad = part.to(record._unsharded_param.device)
        unit.reshard()


def forget_partial_gradients(root: ShardedRoot) -> None:
    """Drop gradients that an earlier fit left in an unfinished window."""
    for _, record in _sharded_parameters(root):
        record.unsharded_accumulated_grad = None
        if hasattr(record, "_unsharded_param"):
            record._unsharded_param.grad = None
