"""ScheduleFree: train without a learning-rate schedule, and use the average that stands in its place.

The average is meant to be as good at any moment as weights whose rate was brought down to end there ("The Road Less
Scheduled", Defazio et al. 2024, https://arxiv.org/abs/2405.15682). The steps are those of the package ``schedulefree``,
bit for bit; that the module holds the average whenever it is evaluated, saved or left is seen to here.

The tensors are in :mod:`lightning_accel.optimizers.schedule_free_steps`; the callback decides when they change places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.errors import check_choice, check_int, check_number
from lightning_accel.hooks import Contract, OptimizerTransform
from lightning_accel.hooks.aside import forward_aside
from lightning_accel.hooks.optimizers import find_optimizers, find_schedulers
from lightning_accel.hooks.rates import configured_rates, set_rates
from lightning_accel.hooks.resume import on_resume_end
from lightning_accel.optimizers.batch_norm import batch_norms, find_statistics_, swap_buffers_
from lightning_accel.optimizers.fuse import sparse_parameters
from lightning_accel.optimizers.schedule_free_steps import momentum_of, to_average_, to_training_, use_schedule_free_

__all__ = ["ScheduleFree"]

_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
_FLAT = "it keeps its weights and state flat. Use strategy='accel_ddp' or 'accel_fsdp2'."
_AVERAGED = "the weights that are evaluated are an average already. Remove it."


class ScheduleFree(OptimizerTransform):
    """Make AdamW, Adam, RAdam or SGD schedule-free; validate, test, predict and save with the average.

    Args:
        warmup_steps: Optimizer steps in which the rate rises from 0; RAdam needs none.
        momentum: How near to the average gradients are taken, in (0, 1). ``None``: the module's own momentum or first
            beta; 0.9 where it has none.
        r: Weight the average by the power ``r`` of the step.
        weight_lr_power: And by this power of the largest rate so far, so that a warm-up counts little.
        schedulers: The learning-rate schedulers of the module: ``"refuse"`` raises where there are any, ``"remove"``
            trains at the rate that was configured (the highest one of OneCycleLR and CyclicLR), ``"keep"`` lets them go
            on to multiply the rate, but never to change the momentum.
        batch_norm_batches: Training batches that are run forward, on the side, to find the statistics of batch norm at
            the average each time it is put into the module: those of the training belong to the weights that are
            trained. 0 leaves them; ``None`` does too, and says so where there are any.
        enabled: Whether to do anything; ``False`` gives the plain run.

    Attributes:
        choices: One line an optimizer: what became of it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ScheduleFree(warmup_steps=100)], logger=False, enable_checkpointing=False)
    """

    contract: ClassVar[Contract] = Contract(
        purpose="Train without a learning-rate schedule; validate, save and use an average of the weights.",
        touches=frozenset({"weights", "optimizer"}),
        acts="every optimizer step; in validation and when weights are saved",
        expects="no schedule to choose",
        docs="methods/schedule_free",
        after=frozenset({"GradualPruning"}),
        once=True,
        refuses={
            "FSDPStrategy": _FLAT,
            "DeepSpeedStrategy": _FLAT,
            "ModelParallelStrategy": "it saves an optimizer's state by other rules. Use FullyShardStrategy.",
            "ZeroRedundancyStrategy": "a rank has the state of some weights only, so it can't average the others. Use "
            "strategy='accel_ddp' or 'accel_fsdp2'.",
            "EMA": _AVERAGED,
            "WeightAveraging": _AVERAGED,
            "StochasticWeightAveraging": _AVERAGED,
            "Muon": "a momentum that is orthogonalised has no schedule-free form. Remove one of them.",
            "FusedOptimizer": "schedule-free optimizers have no fused step, and take the multi-tensor one by "
            "themselves. Remove FusedOptimizer.",
        },
        accepts=frozenset({"FullyShardStrategy"}),
    )

    def __init__(
        self,
        warmup_steps: int = 0,
        momentum: float | None = None,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        schedulers: Literal["refuse", "remove", "keep"] = "refuse",
        batch_norm_batches: int | None = None,
        enabled: bool = True,
    ) -> None:
        self.options: dict[str, Any] = {
            "warmup_steps": check_int("warmup_steps", warmup_steps, minimum=0),
            "momentum": None
            if momentum is None
            else check_number("momentum", momentum, 0, 1, open_low=True, open_high=True),
            "r": check_number("r", r, 0, float("inf"), open_high=True),
            "weight_lr_power": check_number("weight_lr_power", weight_lr_power, 0, float("inf"), open_high=True),
        }
        self.schedulers = check_choice("schedulers", schedulers, ("refuse", "remove", "keep"))
        if not isinstance(enabled, bool):
            raise TypeError(f"Expected `enabled` to be a bool, but got {enabled!r}.")
        self.enabled = enabled
        if batch_norm_batches is not None:
            check_int("batch_norm_batches", batch_norm_batches, minimum=0)
        self.batch_norm_batches = batch_norm_batches
        super().__init__(**self.options, schedulers=schedulers, batch_norm_batches=batch_norm_batches, enabled=enabled)
        self.choices: list[str] = []
        self._statistics: dict[str, Tensor] = {}  # of the training, while those of the average are in the module
        self._optimizers: list[Optimizer] = []  # of the fit that is going on
        self._schedulers: list[Any] = []
        self._constraints: list[Callable[[Mapping[str, Tensor]], None]] = []

    @property
    def is_neutral(self) -> bool:
        """Whether it is switched off."""
        return not self.enabled

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``configure_optimizers`` and what saves checkpoints."""
        self.choices, self._statistics = [], {}
        if not self.enabled:
            return
        if self.batch_norm_batches and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "ScheduleFree(batch_norm_batches=...) can't work with manual optimization, where a training step steps "
                "the optimizers too: set it to 0, and use torch.optim.swa_utils.update_bn after the fit."
            )
        assert self.plan is not None
        self._constraints = [callback.constrain for callback in self.plan.callbacks]
        self.on_undo(self._finish)
        super().install(trainer, pl_module)
        on_resume_end(self, trainer, partial(self._begin, pl_module))
        self.patch(trainer, "save_checkpoint", partial(self._save, trainer, pl_module))

    def _configured(self, configured: Any, pl_module: LightningModule) -> Any:
        """Change the optimizers, and see to the schedulers."""
        self._schedulers = find_schedulers(configured)
        names = ", ".join(dict.fromkeys(type(scheduler).__name__ for scheduler in self._schedulers))
        if names and self.schedulers == "refuse":
            raise MisconfigurationException(
                f"ScheduleFree can't work with {names}: it takes the place of a schedule. Leave the scheduler "
                "out of `configure_optimizers`; or set schedulers='remove' to train without it, at the rate that is "
                "configured, or schedulers='keep' to have it change the rate all the same."
            )
        if names and self.schedulers == "remove" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"ScheduleFree(schedulers='remove') can't work with manual optimization, where the module steps "
                f"{names} by itself: leave it out there and in `configure_optimizers`."
            )
        configured = super()._configured(configured, pl_module)
        return find_optimizers(configured) if names and self.schedulers == "remove" else configured

    def transform_optimizer(self, optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Optimizer:
        """Make one optimizer schedule-free, in place, and say so."""
        before = type(optimizer).__name__
        sparse = sparse_parameters(self.module) if self.module is not None else set()
        if any(parameter in sparse for group in optimizer.param_groups for parameter in group["params"]):
            raise MisconfigurationException(
                f"ScheduleFree can't work with sparse gradients, which {before} gets here: make the embeddings with "
                "sparse=False."
            )
        own = [scheduler for scheduler in self._schedulers if scheduler.optimizer is optimizer]
        removed = own and self.schedulers == "remove"
        if removed:
            set_rates(optimizer, configured_rates(optimizer, own))
        try:
            use_schedule_free_(optimizer, **self.options, warn=rank_zero_warn)
        except ValueError as error:
            raise MisconfigurationException(f"ScheduleFree can't work with {before}: {error}") from error
        if removed:
            for group in optimizer.param_groups:
                for key in _OF_SCHEDULERS:
                    group.pop(key, None)
        self._optimizers.append(optimizer)
        rates = ", ".join(dict.fromkeys(f"{group['lr']:g}" for group in optimizer.param_groups))
        momenta = ", ".join(dict.fromkeys(f"{momentum_of(group):g}" for group in optimizer.param_groups))
        choice = f"{type(optimizer).__name__} in the place of {before}: learning rate {rates}, momentum {momenta}"
        if own:
            choice += f"; {type(own[0]).__name__} is {'removed' if removed else 'kept, but for the momentum'}"
        self.choices.append(choice)
        rank_zero_info(f"ScheduleFree: {choice}")
        return optimizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what becomes of batch norm."""
        layers = len(batch_norms(pl_module)) if self.enabled else 0
        if layers and self.batch_norm_batches is None:
            rank_zero_warn(
                f"ScheduleFree: the statistics of {layers} layers of batch norm belong to the weights that are "
                "trained, and the average is evaluated and saved with them. Set `batch_norm_batches`, to 50 say, to "
                "find its own in so many training batches each time, or to 0 to leave it so."
            )
        elif self.enabled and self.batch_norm_batches and not layers:
            rank_zero_info(
                "ScheduleFree: no layer of batch norm is trained, so that `batch_norm_batches` does nothing."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the module."""
        self._enter(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights that are trained back."""
        self._leave(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._enter(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The statistics of the training, where the module has those of the average."""
        return {"statistics": self._statistics} if self._statistics else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until the module is where the strategy wants it."""
        self._statistics = state_dict["statistics"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on without it from what it saved: other optimizers stop at the first step, without a reason."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        states = checkpoint.get("optimizer_states", []) if self.plan is not None and not self.enabled else []
        groups = [group for state in states for group in state.get("param_groups", [])]
        if any("weight_sum" in group for group in groups):
            raise MisconfigurationException(
                "ScheduleFree(enabled=False) can't go on from a checkpoint whose optimizer was schedule-free: enable "
                "it, or begin a fit with the weights of the checkpoint (`load_from_checkpoint`), which are the average."
            )

    def _begin(self, pl_module: LightningModule) -> None:
        """Train at y, when all is restored; schedulers then change the rate alone: x follows from y by the momentum."""
        self._leave(pl_module)
        for scheduler in self._schedulers:
            if getattr(scheduler, "cycle_momentum", False):
                scheduler.cycle_momentum = False

    def _finish(self) -> None:
        """Leave the average in the module, also after an exception."""
        for optimizer in self._optimizers:
            to_average_(optimizer)
        self._optimizers, self._schedulers, self._constraints = [], [], []

    @property
    def _trains(self) -> bool:
        """Whether what is trained is in the module now."""
        return any(group["train_mode"] for optimizer in self._optimizers for group in optimizer.param_groups)

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the module, with its statistics; does nothing where it is there."""
        if not self._trains:
            return
        for optimizer in self._optimizers:
            to_average_(optimizer)
        averages = {name: parameter.data for name, parameter in pl_module.named_parameters()}
        for constrain in self._constraints:
            constrain(averages)
        if self.batch_norm_batches and any(optimizer.state for optimizer in self._optimizers):
            self._statistics = swap_buffers_(pl_module, self._find_statistics(trainer, pl_module))

    def _leave(self, pl_module: LightningModule) -> None:
        """Put back what is trained."""
        for optimizer in self._optimizers:
            to_training_(optimizer)
        swap_buffers_(pl_module, self._statistics)
        self._statistics = {}

    def _find_statistics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """The statistics of batch norm at the weights that are in the module, the same on all ranks."""
        assert self.batch_norm_batches is not None
        with forward_aside(trainer, pl_module, self.batch_norm_batches) as steps:
            found = find_statistics_(batch_norms(pl_module), steps)
        return found if trainer.world_size == 1 else trainer.strategy.broadcast(found)

    def _save(self, trainer: Trainer, pl_module: LightningModule, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the average as the weights; the optimizer's state has what is trained."""
        trains = self._trains
        self._enter(trainer, pl_module)
        try:
            return original(*args, **kwargs)
        finally:
            if trains:
                self._leave(pl_module)
