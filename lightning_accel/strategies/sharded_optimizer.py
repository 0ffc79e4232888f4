"""An optimizer whose state and step are split over the ranks by whole parameters: ZeRO stage 1.

Torch's ZeroRedundancyOptimizer makes the optimizer again from its class, keeps the whole state on rank 0 after each
save, and sends frozen weights after each step. Here it goes around the optimizer that there is, which sees its own part
of the parameters while it steps, and all of them at any other time.

Paper: ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_accel.errors import NoEffectWarning
from lightning_accel.hooks.tensors import tensors_in

__all__ = ["ShardedOptimizer", "shard_optimizer", "split_by_size"]

_SENT = 2**20
"""The most bytes of parameters that are copied to be sent as one; a larger parameter is sent from where it is."""
_GATHERED = 256 * 2**20
"""About how many bytes of state are gathered at once."""
_REDIRECTED = ("step", "state_dict", "load_state_dict", "add_param_group")
_CHECKED_STEPS = 3
"""In how many first steps the ranks compare their groups: an optimizer that can't be split shows in the second."""
_WAY_OUT = "Use strategy='accel_ddp', where every rank steps all parameters."


def split_by_size(sizes: Sequence[int], loads: list[int]) -> list[int]:
    """The rank of each parameter, so that all ranks hold about as much.

    Args:
        sizes: Elements of each parameter.
        loads: Elements that each rank has already; what is given is added to it.

    Example:
        >>> split_by_size([1, 5, 2, 3], [0, 0])
        [0, 0, 1, 1]
    """
    ranks = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):  # the largest first
        ranks[index] = loads.index(min(loads))
        loads[ranks[index]] += sizes[index]
    return ranks


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """An optimizer whose state and step are split by parameters over the ranks; the step of each rank is then sent.

    It shares the groups and the state of the optimizer inside, so that either may be read or changed. An optimizer that
    treats each parameter alone gives what it gives unsplit, bit for bit.

    Args:
        optimizer: The optimizer of all parameters.

    Raises:
        MisconfigurationException: If it can't be split.
    """

    optim: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        _check_can_be_split(optimizer)
        super().__init__(optimizer.param_groups, optimizer_class=lambda *_, **__: optimizer)  # type: ignore[arg-type]
        self._owners: list[list[int]] = []
        self._loads = {trained: [0] * self.world_size for trained in (True, False)}
        self._whole: dict[str, Any] | None = None
        self._steps = 0
        self._share()
        # On the optimizer inside they would see half a step
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            hooks = getattr(optimizer, name)
            getattr(self, name).update(hooks)
            hooks.clear()
        self._before = {name: vars(optimizer).get(name) for name in _REDIRECTED}
        self._inside = {name: getattr(optimizer, name) for name in _REDIRECTED}
        for name in _REDIRECTED:
            setattr(optimizer, name, MethodType(partial(self._redirect, name), optimizer))
        for parameter, rank in self._assigned():  # what some, like Adagrad, make before the first step
            if rank != self.rank:
                optimizer.state.pop(parameter, None)

    def _redirect(self, name: str, _: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Do here what somebody who kept the optimizer inside asks of it: alone it would act on this rank only."""
        return getattr(self, name)(*args, **kwargs)

    def release(self) -> None:
        """Give the optimizer inside its methods back; it keeps the state of this rank."""
        for name, method in self._before.items():
            delattr(self.optim, name) if method is None else setattr(self.optim, name, method)
        self._before = {}

    def _share(self) -> None:
        self.param_groups, self.state, self.defaults = self.optim.param_groups, self.optim.state, self.optim.defaults

    def _assigned(self) -> list[tuple[Tensor, int]]:
        """Each parameter and its rank, which is that of its place in the groups."""
        groups = [group["params"] for group in self.param_groups]
        self._owners += [[] for _ in groups[len(self._owners) :]]
        if any(len(group) != len(owners) for group, owners in zip(groups, self._owners, strict=True)):
            new = [
                (number, parameter)
                for number, group in enumerate(groups)
                for parameter in group[len(self._owners[number]) :]
            ]
            ranks: dict[int, int] = {}
            for trained, loads in self._loads.items():  # frozen ones are split evenly too: they may be trained later
                chosen = [index for index, (_, parameter) in enumerate(new) if parameter.requires_grad == trained]
                sizes = [new[index][1].numel() for index in chosen]
                ranks.update(zip(chosen, split_by_size(sizes, loads), strict=True))
            for index, (number, _) in enumerate(new):
                self._owners[number].append(ranks[index])
        return [
            pair for group, owners in zip(groups, self._owners, strict=True) for pair in zip(group, owners, strict=True)
        ]

    @contextmanager
    def _own_part(self) -> Iterator[None]:
        """The groups with the parameters of this rank only."""
        groups = self.param_groups
        whole = [group["params"] for group in groups]
        try:
            for group, owners in zip(groups, self._owners, strict=True):
                own = zip(group["params"], owners, strict=True)
                group["params"] = [parameter for parameter, rank in own if rank == self.rank]
            yield
        finally:
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = parameters

    def step(self, closure: Callable[[], float] | None = None, **kwargs: Any) -> Any:
        """Step the parameters of this rank, and exchange them with the other ranks.

        Raises:
            MisconfigurationException: If the optimizer turns out to be one that can't be split.
        """
        if closure is not None:  # before the groups are cut: it clips and clears the gradients of all parameters
            with torch.enable_grad():
                kwargs["closure"] = _Once(closure(), type(self).__name__)
        assigned = self._assigned()
        with self._own_part():
            self._inside["step"](**kwargs)
        if self.world_size > 1:
            self._exchange(assigned)
            self._steps += 1
            if self._steps <= _CHECKED_STEPS:
                self._check_step(assigned)
        return kwargs["closure"].loss if closure is not None else None

    @torch.no_grad()
    def _exchange(self, assigned: list[tuple[Tensor, int]]) -> None:
        """Send the parameters of each rank to the others, small ones together; frozen ones can't have changed."""
        sent = []
        for rank in range(self.world_size):
            stepped = [
                parameter.detach()
                for parameter, owner in assigned
                if owner == rank and (parameter.requires_grad or parameter.grad is not None)
            ]
            for bucket in _buckets(stepped):
                alone = len(bucket) == 1 and bucket[0].is_contiguous()
                flat = bucket[0] if alone else torch.cat([tensor.reshape(-1) for tensor in bucket])
                received = bucket if rank != self.rank and not alone else []
                sent.append((dist.broadcast(flat, rank, async_op=True), flat, received))
        for work, flat, received in sent:
            work.wait()
            parts = torch.split(flat, [tensor.numel() for tensor in received]) if received else ()
            for tensor, part in zip(received, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _check_step(self, assigned: list[tuple[Tensor, int]]) -> None:
        """Refuse an optimizer whose groups differ between the ranks after a step, and tell one that splits nothing."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, _numbers(self.param_groups))
        for number, groups in enumerate(zip(*everyone, strict=True)):
            for name, value in groups[0].items():
                if any(other.get(name) != value for other in groups):
                    raise MisconfigurationException(
                        f"{type(self).__name__} can't be split: it makes `{name}` of parameter group {number} from the "
                        f"gradients of all parameters, and it differs between the ranks. {_WAY_OUT}"
                    )
        if self._steps == 1 and any(rank != self.rank and parameter in self.state for parameter, rank in assigned):
            rank_zero_warn(
                f"{type(self).__name__} keeps a list of parameters of its own: each rank has the state of all of them.",
                category=NoEffectWarning,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, on all ranks."""
        if self.initialized:
            self._inside["add_param_group"](param_group)
            self._assigned()
        else:
            super().add_param_group(param_group)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state on one rank, on the CPU; every rank must take part."""
        whole = self._inside["state_dict"]()
        parts = list(_parts(whole["state"])) if self.rank != to else []
        counts: list[Any] = [None] * self.world_size
        dist.all_gather_object(counts, len(parts))
        for part in parts:
            dist.send_object_list([_packed(part)], to)
        if self.rank != to:
            return
        state = dict(whole["state"])
        for rank, count in enumerate(counts):
            for _ in range(count):
                received: list[Any] = [None]
                dist.recv_object_list(received, rank)
                part = torch.load(io.BytesIO(received[0]), "cpu", weights_only=False)
                state = {**part, **state}  # what belongs to no parameter is that of this rank
        whole["state"] = {key: state[key] for key in sorted(state, key=lambda key: (isinstance(key, str), key))}
        self._whole = whole

    def state_dict(self) -> dict[str, Any]:
        """The state that :meth:`consolidate_state_dict` gathered here, once: it is not kept.

        Raises:
            RuntimeError: If there is none.
        """
        if self._whole is None:
            raise RuntimeError(
                f"Each rank has its part of the state of {type(self).__name__}. Call `consolidate_state_dict(to=RANK)` "
                "on every rank before each `state_dict()` on that rank."
            )
        whole, self._whole = self._whole, None
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's part of a whole state, that of this optimizer or of the one inside."""
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        owners = dict(zip(indices, (rank for _, rank in self._assigned()), strict=False))  # torch says what differs
        state = state_dict["state"].items()
        own = {index: value for index, value in state if owners.get(index, self.rank) == self.rank}
        self._inside["load_state_dict"]({**state_dict, "state": own})
        self._share()

    def __getattr__(self, name: str) -> Any:
        """What the optimizer inside has. Its methods would act on a part of the parameters, on each rank another."""
        if name.startswith("__") or "optim" not in vars(self):
            raise AttributeError(name)
        value = getattr(self.optim, name)
        if callable(value):
            raise AttributeError(f"`{name}` of {type(self).__name__} can't act on the part of a rank. {_WAY_OUT}")
        return value


def shard_optimizer(optimizer: Optimizer) -> Optimizer:
    """Split an optimizer, unless it is split already, or is what stands for the one that a module has not."""
    if isinstance(optimizer, ZeroRedundancyOptimizer) or not any(group["params"] for group in optimizer.param_groups):
        return optimizer
    return _class_named(type(optimizer).__name__)(optimizer)


@cache
def _class_named(name: str) -> type[ShardedOptimizer]:
    # The name stays, since loggers and LearningRateMonitor show it.
    return type(name, (ShardedOptimizer,), {"__module__": __name__})


class _Once:
    """The loss of a closure that has run."""

    def __init__(self, loss: Any, name: str) -> None:
        self.loss, self.name, self.called = loss, name, False

    def __call__(self) -> Any:
        if self.called:
            raise MisconfigurationException(
                f"{self.name} can't be split: it computes the loss more than once a step. {_WAY_OUT}"
            )
        self.called = True
        return self.loss


def _check_can_be_split(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            f"{name} can't be split: it steps along a line through all parameters at once. {_WAY_OUT}"
        )
    extra = [
        key
        for key, value in optimizer.state_dict().items()
        if key not in ("state", "param_groups") and not isinstance(value, (int, float, str, type(None)))
    ]
    if extra:  # of a wrapper such as Lookahead
        raise MisconfigurationException(
            f"{name} can't be split: what it saves as {', '.join(map(repr, extra))} can't be gathered from the ranks. "
            f"{_WAY_OUT}"
        )
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if isinstance(parameter, DTensor) or parameter.is_sparse or parameter.is_meta:
            kind = "split already" if isinstance(parameter, DTensor) else "sparse" if parameter.is_sparse else "meta"
            raise MisconfigurationException(
                f"ZeroRedundancyStrategy needs whole, dense parameters, but one of {name} with the shape "
                f"{tuple(parameter.shape)} is {kind}. Train it with strategy='accel_fsdp2', or make it dense."
            )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in runs of one dtype that are sent as one."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or size + tensor.nbytes > _SENT):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _parts(state: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
    """The state in parts that are small enough to be sent as one."""
    part: dict[Any, Any] = {}
    size = 0
    for key, value in state.items():
        part[key] = value
        size += sum(tensor.nbytes for tensor in tensors_in(value))
        if size > _GATHERED:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _packed(part: dict[Any, Any]) -> bytes:
    """A part of the state as a file: what pickle makes of float8 can't be read again."""
    file = io.BytesIO()
    torch.save(part, file)
    return file.getvalue()


def _numbers(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The options of each group that a step may change."""
    return [
        {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if isinstance(value, (int, float, Tensor))
        }
        for group in groups
    ]
