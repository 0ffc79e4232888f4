"""The base of every callback: its contract, its state key, and changes that are undone when the fit is over."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_accel.errors import NoEffectWarning

if TYPE_CHECKING:
    from lightning_accel.hooks.plan import Plan

__all__ = ["BATCH_HOOKS", "TOUCHABLE", "AccelCallback", "Contract", "trainer_callbacks"]

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""The hooks that Lightning calls at every training batch."""

TOUCHABLE = (
    "data order",
    "random state",
    "accumulation window",
    "modules",
    "weights",
    "parameter groups",
    "optimizer",
    "input",
    "target",
    "loss",
    "gradients",
)
"""What a callback may touch, in the order in which callbacks are installed."""


@dataclass(frozen=True)
class Contract:
    """What a callback does to a run; the plan is made from it."""

    purpose: str
    """One line: what the method does."""
    touches: frozenset[str]
    """What it changes, of :data:`TOUCHABLE`."""
    acts: str
    """When it acts, in words: ``"every training batch"``."""
    expects: str
    """What it is expected to change, in words: ``"less optimizer memory"``."""
    docs: str
    """Its page under ``docs/``, without the ending: ``"methods/low_bit_optimizer"``."""
    reads: frozenset[str] = frozenset()
    """What it only reads, of :data:`TOUCHABLE`."""
    after: frozenset[str] = frozenset()
    """Class names of callbacks that must be installed before it, where they are present."""
    once: bool = False
    """Whether a second one in the same Trainer is refused."""
    manual_optimization: str = ""
    """Why it is refused under manual optimization, with the way out; empty where it works."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Class names of strategies or callbacks (a base class counts) it can't work with: the reason and the way out."""
    accepts: frozenset[str] = frozenset()
    """Class names of strategies that it works with although :attr:`refuses` names a base class of theirs."""

    def __post_init__(self) -> None:
        unknown = (self.touches | self.reads) - set(TOUCHABLE)
        if unknown:
            raise ValueError(f"Expected `touches` and `reads` to be of {TOUCHABLE}, but got {sorted(unknown)}.")


def trainer_callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks (a connector sets them, so that the Trainer's class does not declare them)."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return callbacks


class Patched:
    """A bound method in place of the original of the same name, on one instance.

    ``functools.update_wrapper`` keeps Lightning's inspection of signatures and of overridden hooks truthful. A deep
    copy of the owner gets the copy's own original method, without this wrapper: a copy is not part of the fit.
    """

    def __init__(self, original: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        # Lightning unwraps once to read a signature or to see whether a hook is overridden: give it what it would have
        # seen, also where the original is itself such a wrapper or a decorated method
        self.__wrapped__ = getattr(original, "__wrapped__", original)
        self.original = original
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        copied: Callable[..., Any] = copy.deepcopy(self.original, memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return (_identity, (self.original,))  # a bound method pickles as its owner and its name


def _identity(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


class AccelCallback(Callback):
    """A callback with a contract, whose changes to the Trainer and the module end with the fit.

    A subclass sets :attr:`contract`, passes its constructor's arguments on to ``super().__init__`` by name, and
    overrides :meth:`install` and the usual hooks of a Lightning callback, but not ``setup``, ``teardown`` or
    ``on_exception``.

    Args:
        **arguments: The constructor's arguments, for the state key and the printed plan.
    """

    contract: ClassVar[Contract]

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.plan: Plan | None = None
        # Lightning asks for the key at every hook; and the caller may change an argument later
        self._key = self._generate_state_key(**{name: _plain(value) for name, value in arguments.items()})

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint: its class and arguments."""
        return self._key

    @property
    def is_neutral(self) -> bool:
        """Whether the arguments ask for nothing, so that the run must be the plain run bit for bit."""
        return False

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do: what is neutral, unless it watches the run for the sake of a resume."""
        return self.is_neutral

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make this callback's changes to the Trainer and the module; called once per fit, in the plan's order.

        It runs in ``Callback.setup``, so layers made in ``configure_model`` do not exist yet, and neither do
        optimizers.
        """

    def change_gradient(self, parameter: torch.Tensor) -> None:
        """Change the gradient of one parameter before its step, in place.

        For what touches gradients: it is called in the place of its ``on_before_optimizer_step``, with each parameter
        that has a gradient, where parameters are stepped one at a time.

        Args:
            parameter: Its gradient is that of the step, over all ranks.
        """

    def constrain(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Hold other values of the module's parameters, in place, to what this method holds the parameters to.

        Args:
            weights: By name, such as averages of them, or a direction to move them in.
        """

    def patch(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        """Replace the method ``name`` on the instance ``owner`` until the fit is over.

        Args:
            owner: The instance (never a class).
            name: The method's name.
            call: Called as ``call(original, *args, **kwargs)``.
        """
        had_own = name in vars(owner)
        original = getattr(owner, name)
        self.on_undo(lambda: setattr(owner, name, original) if had_own else delattr(owner, name))
        setattr(owner, name, Patched(original, call))

    def on_undo(self, function: Callable[[], Any]) -> None:
        """Run ``function`` when the fit is over, also by an exception; the last one added runs first."""
        if self.plan is None:
            raise RuntimeError("Expected `on_undo` to be called during a fit, but none is running.")
        self.plan.undo_stack.callback(function)

    def mute_batch_hooks(self) -> None:
        """Let Lightning pass over the hooks of a batch that would do nothing, until the fit is over.

        It calls a hook only where it is callable; calling one that does nothing takes 2 to 3 us, six times a batch.
        """
        for name in BATCH_HOOKS:
            if self.is_idle or getattr(type(self), name) is getattr(Callback, name):
                vars(self)[name] = None
                self.on_undo(functools.partial(vars(self).pop, name, None))

    def warn_no_effect(self, message: str) -> None:
        """Warn on rank 0 that this callback found nothing to act on."""
        rank_zero_warn(f"{type(self).__name__} has no effect: {message}", category=NoEffectWarning, stacklevel=3)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the plan of all callbacks at the first of them."""
        if stage == "fit":
            from lightning_accel.hooks.plan import Plan

            Plan.join(self, trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo all changes."""
        if self.plan is not None:
            self.plan.undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo all changes once every callback has seen the exception.

        Not at once: a checkpoint callback that saves on an exception comes later in the list and must save the state of
        the run as it is. Lightning tears the strategy down right after these hooks.
        """
        if self.plan is not None:
            self.plan.undo_with_strategy()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn where the checkpoint has the state of this method under other arguments."""
        states = checkpoint.get("callbacks", {})
        others = [key for key in states if isinstance(key, str) and key.startswith(f"{type(self).__qualname__}{{")]
        present = {callback.state_key for callback in trainer_callbacks(trainer)}
        if self.state_key not in states and (unclaimed := [key for key in others if key not in present]):
            rank_zero_warn(
                f"The checkpoint holds the state of {unclaimed[0]}, but this run has {self.state_key}: it starts "
                "afresh. To go on exactly, use the arguments of the run that saved it."
            )


def _plain(value: Any) -> Any:
    """``value`` with every object replaced by a description that is the same in every process (no addresses)."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    detail = value.extra_repr() if isinstance(value, torch.nn.Module) else ""
    return f"{type(value).__qualname__}({detail})"
