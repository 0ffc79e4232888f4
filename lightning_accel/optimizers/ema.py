"""EMA: evaluate, and keep in the end, an exponential moving average of the weights.

Averaging the last steps of training removes the noise of large learning rates, much as lowering the rate would (Polyak
and Juditsky 1992, https://doi.org/10.1137/0330046; Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780). The
training itself is not changed: not one bit of its weights depends on the average.

The tensors are in :mod:`lightning_accel.optimizers.averages`; the callback decides when they move and are used.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_accel.errors import check_choice, check_fraction
from lightning_accel.hooks import AccelCallback, Contract, moment
from lightning_accel.hooks.atomic import write_beside
from lightning_accel.optimizers.averages import Averages, warm_decay
from lightning_accel.schedules import Duration

__all__ = ["EMA"]

_FLAT = "it keeps its weights flat, where they can't be told apart."
_TWO = "both would average the weights: remove one of them."
_ROUNDING = 1e-9
_OF_THE_FIT = frozenset({"callbacks", "optimizer_states", "lr_schedulers", "loops"})


class EMA(AccelCallback):
    """Average the weights while they are trained; validate, test and predict with the average.

    Args:
        decay: How much of the average an update keeps, in [0, 1]: it spans about ``1 / (1 - decay)`` updates. 0 is off.
        every: How often the average is updated; an int is in optimizer steps.
        start: When averaging begins; an int is in optimizer steps. Until then the weights themselves are evaluated.
        warmup: Whether early updates use ``(1 + n) / (10 + n)`` where that is less than ``decay``, so that the average
            soon forgets where it began.
        keep: What the module holds after the fit: the ``"average"``, or the ``"trained"`` weights. An exception
            leaves the trained ones.
        device: ``"cpu"`` keeps the averages in main memory; ``None`` beside the weights.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EMA(decay=0.999)], logger=False, enable_checkpointing=False)
    """

    contract: ClassVar[Contract] = Contract(
        purpose="Average the weights while they are trained; validate, test and predict with the average.",
        touches=frozenset({"weights"}),
        acts="after every optimizer step; in validation, test and prediction",
        expects="better metrics at a high learning rate; the weights once more in memory",
        docs="methods/ema",
        after=frozenset({"GradualPruning"}),
        once=True,
        refuses={
            "FSDPStrategy": f"{_FLAT} Use FullyShardStrategy (accel_fsdp2).",
            "DeepSpeedStrategy": "it works with ZeROStrategy alone (accel_zero1, accel_zero2, accel_zero3): use that.",
            "WeightAveraging": _TWO,
            "StochasticWeightAveraging": _TWO,
        },
        accepts=frozenset({"ZeROStrategy"}),
    )

    def __init__(
        self,
        decay: float = 0.999,
        every: str | int | Duration = "1step",
        start: str | int | Duration = 0,
        warmup: bool = True,
        keep: Literal["average", "trained"] = "average",
        device: Literal["cpu"] | None = None,
    ) -> None:
        self.decay = check_fraction("decay", decay)
        self.every = Duration.parse("every", every)
        if self.every.value == 0:
            raise ValueError(f"Expected `every` to be longer than 0, but got {every!r}.")
        self.start = Duration.parse("start", start)
        if not isinstance(warmup, bool):
            raise TypeError(f"Expected `warmup` to be a bool, but got {warmup!r}.")
        self.warmup = warmup
        self.keep = check_choice("keep", keep, ("average", "trained"))
        self.device = check_choice("device", device, ("cpu", None))
        super().__init__(
            decay=self.decay,
            every=str(self.every),
            start=str(self.start),
            warmup=warmup,
            keep=self.keep,
            device=self.device,
        )
        self._reset()

    def _reset(self) -> None:
        self._averages: Averages | None = None  # while the module has a use for them
        self._restored: Mapping[str, Tensor] = {}  # until it has
        self._module: weakref.ref[LightningModule] | None = None  # whose they are, where no checkpoint brought them
        self._num_updates = 0
        self._last_update: float | None = None  # in the unit of `every`
        self._seen_step = 0  # the optimizer steps done when the weights were last looked at

    @property
    def is_neutral(self) -> bool:
        """Whether an update keeps nothing of the average, so that it would always be the weights."""
        return self.decay == 0

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have checkpoints hold the trained weights, also those that are saved while the averages are evaluated."""
        if not trainer.global_step:
            self._reset()
        if self.is_neutral:
            return
        if reason := _out_of_reach(trainer.strategy):
            raise MisconfigurationException(
                f"{type(self).__name__} can't work with {type(trainer.strategy).__name__} where {reason}."
            )
        self.on_undo(self._drop)
        self.patch(trainer, "save_checkpoint", self._save)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights, where the strategy has put them, and take up restored averages."""
        if self.is_neutral:
            return
        self._averages = self._find(pl_module)
        # a checkpoint may have been saved after the last step but before this callback acted on it
        self._advance(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages where an optimizer step was made since, and it is time."""
        self._advance(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave in the module what it is to hold, and say where averaging never began."""
        if self._averages is None:
            return
        if not self._num_updates:
            self.warn_no_effect(f"the fit ended before `start` ('{self.start}').")
        elif self.keep == "average":
            self._constrain(self._averages.values)
            self._averages.enter()
        else:
            self._restored, self._module = self.state_dict()["averages"], weakref.ref(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the averages where the module is left with them: evaluating it needs no others."""
        if self._averages is not None and self._averages.in_place:
            self._reset()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the module."""
        self._enter(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        self._leave()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the module."""
        self._enter(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        self._leave()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the module."""
        self._enter(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the trained weights back."""
        super().on_exception(trainer, pl_module, exception)
        if self.plan is None:  # a fit is undone once every callback has seen the exception
            self._drop()

    def state_dict(self) -> dict[str, Any]:
        """The averages, whole and by name, and where the updates are."""
        if self._averages is None:  # saved before training started, or after it
            averages = dict(self._restored)
        else:
            averages = self._averages.state()
            self._constrain(averages)
        return {
            "averages": averages,
            "num_updates": self._num_updates,
            "last_update": self._last_update,
            "seen_step": self._seen_step,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget other averages; warn where the checkpoint has none to evaluate."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._reset()
        states = checkpoint.get("callbacks")  # none in one of weights only, which are the averages then
        if self.plan is None and not self.is_neutral and states is not None and self.state_key not in states:
            self.warn_no_effect(f"the checkpoint has no state of {self.state_key}.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the averages until the module is where the strategy wants it."""
        self._restored = state_dict["averages"]
        self._num_updates = state_dict["num_updates"]
        self._last_update, self._seen_step = state_dict["last_update"], state_dict["seen_step"]

    @staticmethod
    def export(checkpoint: str | Path, out: str | Path) -> None:
        """Write the averaged weights of a checkpoint on their own, for ``load_from_checkpoint``.

        Args:
            checkpoint: A checkpoint file that was saved in a fit with this callback; what the fit itself goes on from
                (optimizers, loops, the trained weights) is left out.
            out: The file to write.

        Raises:
            ValueError: If ``checkpoint`` is not such a file.
            FileExistsError: If there is something at ``out``.
        """
        path, out = Path(checkpoint), Path(out)
        if not path.is_file():
            what = (
                "a directory: make a file of it, with `lightning-accel consolidate`" if path.is_dir() else "not there"
            )
            raise ValueError(f"Expected `checkpoint` to be a file, but {path} is {what}.")
        if out.exists():
            raise FileExistsError(f"Expected `out` to be free, but there is something at {out}. Remove it.")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        states = [state for key, state in loaded.get("callbacks", {}).items() if str(key).startswith("EMA{")]
        averages = states[0]["averages"] if states else {}
        if not averages:
            raise ValueError(
                f"Expected `checkpoint` to hold averages, but {path} has none: it was saved without EMA, before its "
                "`start`, or after the fit, when the weights are the averages themselves."
            )
        weights = loaded["state_dict"]
        same = {_memory(value): averages[name] for key, value in weights.items() if (name := _plain(key)) in averages}
        loaded["state_dict"] = {key: same.get(_memory(value), value).to(value.dtype) for key, value in weights.items()}
        with write_beside(out) as partial:
            torch.save({key: value for key, value in loaded.items() if key not in _OF_THE_FIT}, partial)

    def _find(self, pl_module: LightningModule) -> Averages:
        averages = Averages(pl_module, None if self.device is None else torch.device(self.device))
        averages.load(self._restored)
        return averages

    def _advance(self, trainer: Trainer) -> None:
        """Update the averages if an optimizer step was made since: weights stay within an accumulation window."""
        if self._averages is None or trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        now = moment(trainer)
        since = None if self._last_update is None else self.every.elapsed(now) - self._last_update
        if not self.start.reached(now) or (since is not None and since < self.every.value - _ROUNDING):
            return
        self._averages.update(warm_decay(self.decay, self._num_updates) if self.warmup else self.decay)
        self._num_updates += 1
        self._last_update = self.every.elapsed(now)

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._averages is None and self._restored and not trainer.sanity_checking:
            if self._module is None or self._module() is pl_module:
                self._averages = self._find(pl_module)
            else:
                self.warn_no_effect("its averages are those of another module.")
        if self._averages is not None:
            self._constrain(self._averages.values)
            self._averages.enter()

    def _leave(self) -> None:
        if self._averages is not None:
            self._averages.leave()
            if self.plan is None:  # not in a fit
                self._averages = None

    def _drop(self) -> None:
        if self._averages is not None:
            self._averages.leave()
        self._averages = None

    def _constrain(self, averages: dict[str, Tensor]) -> None:
        """Hold the averages to what other methods hold the weights to, such as pruned ones to zero."""
        for callback in self.plan.callbacks if self.plan is not None else ():
            callback.constrain(averages)

    def _save(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Save what a fit goes on from: the trained weights; or, where only weights are asked for, the averages."""
        averages = self._averages
        if averages is None:
            return original(*args, **kwargs)
        were_in_place = averages.in_place
        weights_only = kwargs.get("weights_only", args[1] if len(args) > 1 else None)
        if weights_only:
            self._constrain(averages.values)
        (averages.enter if weights_only else averages.leave)()
        try:
            return original(*args, **kwargs)
        finally:
            (averages.enter if were_in_place else averages.leave)()


def _out_of_reach(strategy: Any) -> str:
    """Why the averages can't be put in the place of the weights (DeepSpeed's, at stage 3), with the way out."""
    config = getattr(strategy, "config", None)
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else {}
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "the weights are on a disk between their uses: use `offload_parameters='cpu'` or 'none'"
    if zero.get("zero_hpz_partition_size", 1) > 1:
        return "each node has a second copy of the weights: leave `hpz_partition_size` out"
    return ""


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _memory(value: Any) -> tuple[Any, ...]:
    """What tensors that share their memory have in common."""
    if not isinstance(value, Tensor):
        return (id(value),)
    return (value.data_ptr(), value.shape, value.dtype)
