"""The plan of a fit: in which order the callbacks act, which of them can't go together, and the table that says so."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_accel.hooks.callback import TOUCHABLE, AccelCallback, Patched, trainer_callbacks

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Plan", "check_conflicts", "derive_order"]


def derive_order(callbacks: Sequence[AccelCallback]) -> list[AccelCallback]:
    """Order callbacks by the first thing each touches (in the order of ``TOUCHABLE``), then by their ``after``.

    Ties keep the user's order. A cycle of ``after`` is a programming error and raises ``RuntimeError``.
    """

    def first_touched(callback: AccelCallback) -> int:
        return min((TOUCHABLE.index(name) for name in callback.contract.touches), default=len(TOUCHABLE))

    waiting = sorted(callbacks, key=first_touched)
    ordered: list[AccelCallback] = []
    while waiting:
        for callback in waiting:
            if not any(_is_named(other, callback.contract.after) for other in waiting if other is not callback):
                break
        else:
            names = ", ".join(type(callback).__name__ for callback in waiting)
            raise RuntimeError(f"The contracts of {names} each want to come after another.")
        waiting.remove(callback)
        ordered.append(callback)
    return ordered


def check_conflicts(callbacks: Sequence[AccelCallback], trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse what can't work together.

    Raises:
        MisconfigurationException: With the reason and the way out.
    """
    for callback in callbacks:
        name, contract = type(callback).__name__, callback.contract
        if contract.manual_optimization and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{name} can't work with manual optimization: {contract.manual_optimization}"
            )
        if contract.once and any(other is not callback and isinstance(other, type(callback)) for other in callbacks):
            raise MisconfigurationException(f"{name} is in the Trainer's callbacks twice: remove one.")
        others: list[object] = [
            trainer.strategy,
            *(other for other in trainer_callbacks(trainer) if other is not callback),
        ]
        for other in others:
            if _is_named(other, contract.accepts):
                continue
            for refused, reason in contract.refuses.items():
                if _is_named(other, {refused}):
                    raise MisconfigurationException(f"{name} can't work with {type(other).__name__}: {reason}")


def _is_named(thing: object, names: frozenset[str] | set[str]) -> bool:
    return any(cls.__name__ in names for cls in type(thing).__mro__)


class Plan:
    """The callbacks of one fit, in order, and what has to be undone at its end.

    Attributes:
        callbacks: In the order in which they are installed.
        undo_stack: Functions that undo their changes, run in the reverse order.
    """

    def __init__(self, callbacks: Sequence[AccelCallback], trainer: Trainer) -> None:
        self.callbacks = derive_order(callbacks)
        self.trainer = trainer
        self.undo_stack = ExitStack()
        self._joined: set[int] = set()

    @classmethod
    def join(cls, callback: AccelCallback, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the plan at the first callback of a fit; the later ones find it made."""
        plan = callback.plan
        if plan is not None and plan.trainer is trainer and id(callback) not in plan._joined:
            plan._joined.add(id(callback))
            return
        if plan is not None:  # left by a fit whose end was never announced
            plan.undo()
        callbacks = [other for other in trainer_callbacks(trainer) if isinstance(other, AccelCallback)]
        check_conflicts(callbacks, trainer, pl_module)
        plan = cls(callbacks, trainer)
        plan._joined.add(id(callback))
        for other in callbacks:
            other.plan = plan
        plan._order_trainer_callbacks()
        for other in plan.callbacks:
            other.install(trainer, pl_module)
            other.mute_batch_hooks()
        if trainer.is_global_zero and not trainer.barebones:
            from rich import print as rich_print

            rich_print(plan.table())

    def table(self) -> Table:
        """The plan as a table: method, what it touches, when it acts, what it is expected to change."""
        from rich.table import Table

        table = Table(title="lightning_accel plan", title_justify="left")
        for heading in ("", "method", "touches", "acts", "expected to change"):
            table.add_column(heading, no_wrap=heading == "method")  # a name cut short can't be looked up
        for number, callback in enumerate(self.callbacks, start=1):
            contract = callback.contract
            touches = ", ".join(name for name in TOUCHABLE if name in contract.touches)
            expects = "nothing (neutral settings)" if callback.is_idle else contract.expects
            table.add_row(str(number), type(callback).__name__, touches, contract.acts, expects)
        return table

    def undo(self) -> None:
        """Undo every change of every callback; a second call does nothing."""
        for callback in self.callbacks:
            callback.plan = None
        self.undo_stack.close()

    def undo_with_strategy(self) -> None:
        """Undo when the strategy is torn down, which Lightning does after the ``on_exception`` hooks."""
        strategy = self.trainer.strategy
        if isinstance(vars(strategy).get("teardown"), Patched):
            return

        def undo_then(original: object) -> None:
            del strategy.teardown
            self.undo()
            strategy.teardown()

        strategy.teardown = Patched(strategy.teardown, undo_then)  # type: ignore[method-assign]

    def _order_trainer_callbacks(self) -> None:
        """Let the Trainer call the callbacks' hooks in the plan's order too.

        A new list, since Lightning is iterating over the present one; other callbacks keep their places.
        """
        before = trainer_callbacks(self.trainer)
        queue = iter(self.callbacks)
        after = [next(queue) if isinstance(item, AccelCallback) else item for item in before]
        self.trainer.__dict__["callbacks"] = after

        def restore() -> None:
            if set(map(id, before)) == set(map(id, trainer_callbacks(self.trainer))):
                self.trainer.__dict__["callbacks"] = before

        self.undo_stack.callback(restore)
