"""What the forward pass keeps for the backward pass, measured by saved-tensor hooks.

Autograd tells of each tensor that it saves and when it lets go of it (``torch.autograd.graph.saved_tensors_hooks``).
What is counted is the storage behind each of them, once however many save it, without parameters and buffers, which
are there anyway. It works on tensors with shapes and no memory as on real ones.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["SavedTensors"]


class SavedTensors:
    """Measures what autograd keeps alive while this context is entered; it may be entered several times.

    Args:
        module: Its parameters and buffers are not counted.

    Attributes:
        peak: The most bytes that were kept at a time, without ``casts``.
        casts: The most bytes of copies of parameters in another dtype, which autocast makes. A strategy that casts
            the parameters itself (FSDP2's mixed precision) has none.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> with SavedTensors(net) as saved:
        ...     loss = net(torch.ones(2, 4)).sum()
        >>> saved.peak  # the input (2, 4), and what ReLU returned (2, 8), which the last layer saves as well
        96
    """

    def __init__(self, module: nn.Module) -> None:
        self.peak = 0
        self.casts = 0
        self._own = {storage_key(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._module = module  # or the keys could be those of other storages
        self._users: dict[int, int] = {}
        self._live = {"activation": 0, "cast": 0}
        self._hooks: list[saved_tensors_hooks] = []

    def __enter__(self) -> SavedTensors:
        hooks = saved_tensors_hooks(self._pack, lambda held: held.tensor)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.pop().__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(tensor, self)

    def _take(self, held: _Held) -> None:
        self._users[held.key] = self._users.get(held.key, 0) + 1
        if held.key not in self._own and self._users[held.key] == 1:
            self._live[held.kind] += held.nbytes
            self.peak = max(self.peak, self._live["activation"])
            self.casts = max(self.casts, self._live["cast"])

    def _release(self, held: _Held) -> None:
        self._users[held.key] -= 1
        if not self._users[held.key]:
            del self._users[held.key]
            if held.key not in self._own:
                self._live[held.kind] -= held.nbytes


class _Held:
    """One saved tensor; gone when autograd lets go of it."""

    def __init__(self, tensor: Tensor, meter: SavedTensors) -> None:
        self.tensor, self.meter, self.key = tensor, meter, storage_key(tensor)
        self.nbytes = tensor.untyped_storage().nbytes()
        self.kind = "cast" if is_cast_parameter(tensor) else "activation"
        meter._take(self)

    def __del__(self) -> None:
        self.meter._release(self)


def storage_key(tensor: Tensor) -> int:
    """What two tensors have in common if, and only if, they share memory; ``data_ptr`` is 0 where there is none."""
    key: int = tensor.untyped_storage()._cdata
    return key


def is_cast_parameter(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a copy of a parameter in another dtype, or a view of one."""
    node: Any = tensor.grad_fn
    cast = False
    while node is not None and len(node.next_functions) == 1:
        cast = cast or node.name().startswith("ToCopyBackward")
        if not cast and not node.name().startswith(("TBackward", "Transpose", "View", "Permute")):
            return False
        node = node.next_functions[0][0]
        if node is not None and hasattr(node, "variable"):
            return cast
    return False
