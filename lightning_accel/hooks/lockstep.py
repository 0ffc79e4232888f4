"""Ranks that go through a block in lockstep: where one of them fails all leave it, and none waits for ever.

A rank that runs out of memory alone in the middle of a step makes no more collective operations, for which the others
would wait. So before each one the ranks agree that none has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_accel.hooks.weights import largest_over_ranks

__all__ = ["run_in_lockstep"]

_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


def run_in_lockstep(trainer: Trainer, function: Callable[[], Any], name_failure: Callable[[Exception], int]) -> int:
    """Run ``function`` on all ranks; where it fails on one, end it on all.

    Collective operations in it must be those of all ranks, in one order; what is sent between two ranks is not seen.

    Args:
        trainer: The Trainer.
        function: What to run.
        name_failure: From an exception to a number above 0 that names it; it raises what ends the program.

    Returns:
        0 where it went through on all ranks, or else the highest number that a rank gave its failure.
    """
    failure = 0
    try:
        if trainer.world_size == 1:
            function()
        else:
            with _Watched(trainer):
                function()
    except _OtherRankFailed as other:
        return other.failure
    except Exception as error:
        failure = name_failure(error)
    return _agree(trainer, failure)  # when nothing of the error is referred to any more


def _agree(trainer: Trainer, failure: int) -> int:
    return largest_over_ranks(trainer, [failure])[0]


class _OtherRankFailed(BaseException):  # or Lightning, which takes in what happens as it shares signals, would keep it
    def __init__(self, failure: int) -> None:
        super().__init__()
        self.failure = failure


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves these without types
    """Sees every collective operation before it is made."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trainer = trainer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _COLLECTIVES and (failure := _agree(self._trainer, 0)):
            raise _OtherRankFailed(failure)
        return func(*args, **(kwargs or {}))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether what is compiled runs compiled in this context."""
        return True
