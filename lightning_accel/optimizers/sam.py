"""SAM: step along the gradient from a little uphill, so that training ends in flat minima, which generalise better.

The gradient g of a step is used to climb, to the weights nearby where the loss is highest to first order,
w + rho g / |g|. The gradient there is the one that the optimizer steps with, from w. Foret et al. 2021,
"Sharpness-Aware Minimization for Efficiently Improving Generalization", https://arxiv.org/abs/2010.01412.

Adaptive (ASAM): nearby is measured relative to the size of each weight, so that scaling a layer up and the next one
down changes nothing: w + rho T^2 g / |T g| with T = |w| + eta. Kwon et al. 2021, https://arxiv.org/abs/2102.11600.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.errors import check_number
from lightning_accel.hooks import AccelCallback, Contract, moment, parameter_names
from lightning_accel.hooks.gradients import part_of_square, squared_norm
from lightning_accel.hooks.second_pass import SecondPass
from lightning_accel.hooks.weights import sum_over_ranks
from lightning_accel.optimizers.low_bit_plan import local_part
from lightning_accel.schedules import Duration

__all__ = ["SAM", "perturb_", "restore_"]


@torch.no_grad()
def perturb_(
    parameters: Sequence[Tensor],
    rho: float,
    adaptive: Collection[Tensor] = (),
    eta: float = 0.01,
    square: Callable[[Iterable[Tensor]], Tensor] = squared_norm,
) -> bool:
    """Climb: move parameters by ``rho`` along their gradients, in place.

    Args:
        parameters: Those with a gradient; one norm is taken over all of them, in float32 at least.
        rho: How far.
        adaptive: Those of them for which distance is relative to the size of each weight, as a set.
        eta: What is added to that size.
        square: From one tensor a parameter to the sum of the squares of all numbers in them, over all ranks.

    Returns:
        Whether they have moved: not where the gradient's norm is infinite or NaN.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> before = [w.detach().clone()]
        >>> perturb_([w], rho=1.0), w
        (True, tensor([0.6000, 0.8000], requires_grad=True))
        >>> restore_([w], before)
    """
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    directions = [
        _size(parameter, eta).mul_(gradient) if parameter in adaptive else gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    norm = math.sqrt(float(square(directions)))
    if not math.isfinite(norm):
        return False
    for parameter, direction in zip(parameters, directions, strict=True):
        if parameter in adaptive:
            direction.mul_(_size(parameter, eta))
    torch._foreach_add_(_local(parameters), _local(directions), alpha=rho / (norm + 1e-12))
    return True


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local_part(tensor) for tensor in tensors]


def _size(parameter: Tensor, eta: float) -> Tensor:
    return parameter.abs().add_(eta)


@torch.no_grad()
def restore_(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Put parameters back, bit for bit, to where copies say that they were before :func:`perturb_`."""
    torch._foreach_copy_(_local(parameters), _local(before))


class SAM(AccelCallback):
    """Step along the gradient from a little uphill: sharpness-aware minimization, at the price of a second pass.

    The batches of a step go through ``training_step`` and its backward a second time, at the perturbed weights and with
    the same random draws; that gradient is clipped and used by the module's own optimizer. What is logged, metrics
    and running statistics are those of the first pass.

    Args:
        rho: How far to climb, as the norm of the perturbation of all weights together; 0 is off. ``None``: 0.05, or 0.5
            where ``adaptive``, as in the papers.
        adaptive: Whether the perturbation is relative to the size of each weight (ASAM). Parameters without "weight" in
            their names, such as biases, are then perturbed as by SAM, as in its authors' code.
        eta: What is added to that size, where ``adaptive``.
        every: In every how many optimizer steps: those whose number, from 0, is a multiple of it. The others are plain.
        start: When it begins; an int is in optimizer steps.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SAM(rho=0.05)], logger=False, enable_checkpointing=False)
    """

    contract: ClassVar[Contract] = Contract(
        purpose="Step along the gradient from a little uphill (sharpness-aware minimization).",
        touches=frozenset({"gradients"}),
        acts="every optimizer step, or every `every` of them, from `start` on",
        expects="flatter minima, which may generalise better; up to twice the time",
        docs="methods/sam",
        reads=frozenset({"weights"}),
        once=True,
        manual_optimization="there the module itself decides when to go backward and to step. Make the second pass in "
        "`training_step`, with `perturb_` and `restore_`, or set `automatic_optimization = True`.",
        refuses={
            "DeepSpeedStrategy": "its engine reduces and splits gradients inside the backward, so that weights can't "
            "be moved along them. Use strategy='ddp' or FullyShardStrategy (accel_fsdp2).",
            "FSDPStrategy": "it keeps gradients flat, where parameters can't be told apart. Use FullyShardStrategy "
            "(accel_fsdp2).",
            "NoiseScaleAccumulation": "it measures noise between the gradient of one batch and that of the window, "
            "which is then from other weights. Use GradientAccumulation.",
        },
    )

    def __init__(
        self,
        rho: float | None = None,
        adaptive: bool = False,
        eta: float = 0.01,
        every: str | int | Duration = 1,
        start: str | int | Duration = 0,
    ) -> None:
        if not isinstance(adaptive, bool):
            raise TypeError(f"Expected `adaptive` to be a bool, but got {adaptive!r}.")
        if rho is None:
            rho = 0.5 if adaptive else 0.05
        self.rho = check_number("rho", rho, 0, math.inf, open_high=True)
        self.adaptive = adaptive
        self.eta = check_number("eta", eta, 0, math.inf, open_high=True)
        self.every = Duration.parse("every", every)
        if self.every.unit != "step" or self.every.value < 1:
            raise ValueError(f"Expected `every` to be a number of optimizer steps of at least 1, but got {every!r}.")
        self.start = Duration.parse("start", start)
        super().__init__(rho=self.rho, adaptive=adaptive, eta=self.eta, every=str(self.every), start=str(self.start))
        self._forget()

    def _forget(self) -> None:
        self._second_pass: SecondPass | None = None
        self._restored: dict[str, Any] = {}
        self._adaptive: set[Tensor] = set()
        self._away: tuple[list[Tensor], list[Tensor]] | None = None  # what may be moved now, and where it was
        self._waits = False  # whether `start` was not reached so far
        self._said = False

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is to be perturbed."""
        return self.rho == 0

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part in the closures of optimizer steps."""
        self._forget()
        if not self.is_neutral:
            self._second_pass = SecondPass(
                self, trainer, pl_module, lambda: self._is_due(trainer), partial(self._climb, trainer, pl_module)
            )
            self.patch(trainer, "save_checkpoint", self._save)
            self.on_undo(self._forget)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the optimizer, and take up the window that a checkpoint was saved in."""
        if self._second_pass is None:
            return
        self._second_pass.check_optimizer()
        self._second_pass.load_state_dict(self._restored)
        self._restored = {}
        names = parameter_names(pl_module)
        if self.adaptive:
            self._adaptive = {item for item, name in names.items() if "weight" in name and not name.endswith("bias")}
        if narrow := {str(item.dtype) for item in names if item.requires_grad and item.element_size() < 4}:
            rank_zero_warn(
                f"{type(self).__name__} moves each weight by little, which is rounded away in parameters of "
                f"{', '.join(sorted(narrow))}, the more of them there are: keep them in float32, with "
                "precision='bf16-mixed' or '16-mixed'."
            )

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether the next optimizer step has a second pass."""
        if trainer.global_step % self.every.value:
            return False
        self._waits = self.start.value > 0 and not self.start.reached(moment(trainer))
        return not self._waits

    def _climb(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, second_pass: Callable[[], None]
    ) -> None:
        """Make the second pass at the perturbed weights."""
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None
        ]
        self._hold_gradients(pl_module)
        square: Callable[[Iterable[Tensor]], Tensor] = squared_norm
        if any(hasattr(parameter, "placements") for parameter in parameters):  # sharded
            square = partial(_square_over_ranks, trainer)
        before = [parameter.detach().clone() for parameter in parameters]
        self._away = parameters, before
        try:
            if perturb_(parameters, self.rho, self._adaptive, self.eta, square):
                second_pass()
            else:
                self._say_not_finite(trainer)
        finally:
            restore_(parameters, before)
            self._away = None

    def _hold_gradients(self, pl_module: LightningModule) -> None:
        """Leave where it is what other methods hold, such as pruned weights, and refuse gradients that are sparse."""
        names = parameter_names(pl_module)
        gradients = {name: item.grad for item, name in names.items() if item.grad is not None}
        if sparse := [name for name, gradient in gradients.items() if gradient.is_sparse]:
            raise MisconfigurationException(
                f"{type(self).__name__} can't work with sparse gradients, but that of {sparse[0]!r} is: make its layer "
                "with sparse=False."
            )
        for callback in self.plan.callbacks if self.plan is not None else ():
            callback.constrain(gradients)

    def _say_not_finite(self, trainer: Trainer) -> None:
        if not self._said and getattr(trainer.precision_plugin, "scaler", None) is None:  # it finds its scale so
            self._said = True
            rank_zero_warn(
                f"The gradient of step {trainer.global_step} holds inf or NaN: {type(self).__name__} makes no second "
                "pass, and leaves it as it is. This is said once."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where it never began."""
        if self._waits:
            self.warn_no_effect(f"the fit ended before `start` ('{self.start}').")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the batches of an open window until training starts."""
        self._restored = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the batches of an open window, which are needed once more."""
        if self._second_pass is None:
            return
        if state := self._restored or self._second_pass.state_dict():
            checkpoint.setdefault("callbacks", {})[self.state_key] = state

    def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Save the weights where they belong, also in the middle of a second pass (a scheduler's signal, a hook)."""
        if self._away is None:
            return original(*args, **kwargs)
        parameters, before = self._away
        values = [local_part(parameter).data for parameter in parameters]  # autograd is to notice nothing
        moved = [value.clone() for value in values]
        restore_(values, before)
        try:
            return original(*args, **kwargs)
        finally:
            restore_(values, moved)


def _square_over_ranks(trainer: Trainer, gradients: Iterable[Tensor]) -> Tensor:
    return sum_over_ranks(trainer, part_of_square(gradients, trainer.world_size))
