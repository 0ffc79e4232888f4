"""Averages of gradients over ranks, one parameter at a time, in an order that all ranks share.

Ranks must call collectives in the same order, but gradients may arrive in another, and on some ranks not at all. So a
gradient waits until all that come before it in the order have been sent. The order is that of the first backward pass
on the first rank, in which nothing waits for long; the numbers do not depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["OrderedReduction"]

_IN_FLIGHT = 1
"""How many gradients may be on their way while the backward pass goes on."""


class OrderedReduction:
    """Averages the gradients of one backward pass after another.

    Args:
        group: The ranks; ``None``: all.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._order: list[Tensor] = []
        self._known = False  # whether the order is that of a backward pass
        self._arrived: dict[Tensor, None] = {}  # in the order in which they did
        self._sent = 0
        self._in_flight: deque[tuple[Any, Tensor, Tensor]] = deque()
        self._take: Callable[[Tensor], Any] | None = None  # in a backward pass

    def begin(self, parameters: Sequence[Tensor], take: Callable[[Tensor], Any]) -> None:
        """Get ready for a backward pass.

        Args:
            parameters: All that may get a gradient, the same on every rank.
            take: Called with each parameter whose gradient is the average of all ranks.
        """
        if set(parameters) != set(self._order):
            self._order, self._known = list(reversed(parameters)), False
        self._arrived.clear()
        self._in_flight.clear()
        self._sent, self._take = 0, take

    @torch.no_grad()
    def arrive(self, parameter: Tensor) -> None:
        """Send a gradient, and those that waited for it.

        Raises:
            RuntimeError: If its gradient is sparse, or the backward pass is over.
        """
        if self._take is None:
            raise RuntimeError("Expected one backward pass a step, but a gradient arrived after it was over.")
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise RuntimeError(
                "Expected dense gradients to average over ranks, but one is sparse. Make its layer with sparse=False."
            )
        self._arrived[parameter] = None
        while self._sent < len(self._order) and self._order[self._sent] in self._arrived:
            self._send(self._order[self._sent])
            self._sent += 1
            self._receive(self._take, _IN_FLIGHT)

    @torch.no_grad()
    def finish(self) -> None:
        """End the backward pass: take part in the averages of what got no gradient on this rank. Call it on all ranks.

        What got a gradient on no rank is left without one. A second call does nothing.

        Raises:
            RuntimeError: If there is a gradient that did not arrive in the backward pass.
        """
        take, self._take = self._take, None
        if take is None:
            return
        missing = [parameter for parameter in self._order if parameter not in self._arrived]
        if any(parameter.grad is not None for parameter in missing):
            raise RuntimeError(
                "Expected the gradients of a step to be made by the closure that `optimizer.step` gets, but there is "
                "one that was not, so it was not averaged over the ranks. Call `optimizer.step(closure)`."
            )
        for parameter in self._order[self._sent :]:
            if parameter not in self._arrived:
                parameter.grad = torch.zeros_like(parameter)
            self._send(parameter)
            self._receive(take, _IN_FLIGHT)
        self._receive(take)
        if self._order:
            self._agree(missing, take)

    def _send(self, parameter: Tensor) -> None:
        gradient: Tensor = parameter.grad  # type: ignore[assignment]  # it has arrived
        gradient.mul_(1 / dist.get_world_size(self._group))  # before the sum, as DDP does
        sent = gradient.contiguous()  # a copy where it is channels_last
        self._in_flight.append((dist.all_reduce(sent, group=self._group, async_op=True), parameter, sent))

    def _receive(self, take: Callable[[Tensor], Any], left: int = 0) -> None:
        """Wait for what was sent, and take it if it arrived here too."""
        while len(self._in_flight) > left:
            work, parameter, received = self._in_flight.popleft()
            work.wait()
            if received is not parameter.grad:
                parameter.grad.copy_(received)  # type: ignore[union-attr]
            if parameter in self._arrived:
                take(parameter)

    def _agree(self, missing: list[Tensor], take: Callable[[Tensor], Any]) -> None:
        """Take what is missing here, but arrived on another rank; after the first backward pass, agree on the order."""
        arrived = torch.tensor([parameter in self._arrived for parameter in self._order], dtype=torch.uint8)
        arrived = arrived.to(self._order[0].device)
        dist.all_reduce(arrived, dist.ReduceOp.MAX, group=self._group)
        if missing:  # else there is no need to wait for the device
            for parameter, somewhere in zip(self._order, arrived.tolist(), strict=True):
                if parameter not in self._arrived:
                    take(parameter) if somewhere else setattr(parameter, "grad", None)
        if not self._known:
            self._known = True
            places = {parameter: place for place, parameter in enumerate(self._order)}
            order = [places[parameter] for parameter in [*self._arrived, *missing]]
            shared = torch.tensor(order, device=arrived.device)
            dist.broadcast(shared, group=self._group, group_src=0)
            self._order = [self._order[place] for place in shared.tolist()]
