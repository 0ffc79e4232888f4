"""From a LightningCLI configuration to a plan: its classes are made, the module on the meta device, and no Trainer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.cli.lightning_commands import AccelCLI
from lightning_accel.cli.usage import UsageError
from lightning_accel.optimizers.low_bit import LowBitOptimizer
from lightning_accel.tuning.fake import fake_module_, quiet, run_fake_step
from lightning_accel.tuning.plan import Plan, find_precision, make_plan, measure_model

__all__ = ["PlanCLI", "plan_config"]

_KEPT = ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches")
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


class PlanCLI(AccelCLI):
    """Makes the module on the meta device, then the data and callbacks, and no Trainer.

    Args:
        args: The command line, from the subcommand on.
        with_data: Whether the data module is made.
    """

    def __init__(self, args: list[str], with_data: bool) -> None:
        self.with_data = with_data
        self.mode = FakeTensorMode()
        super().__init__(args, save_config_callback=None, seed_everything_default=False)

    def instantiate_classes(self) -> None:
        """Make what the plan needs."""
        config = self.config.fit
        trainer = config.trainer
        self.options = {name: trainer[name] for name in _KEPT if trainer.get(name) is not None}
        try:
            self.precision = find_precision(trainer.get("precision"))
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.strategy = trainer.get("strategy")
        data, callbacks = config.pop("data", None), trainer.callbacks
        for name in ("logger", "plugins", "profiler", "callbacks"):
            trainer[name] = None
        trainer.strategy = "auto"
        try:
            with torch.device("meta"):
                self.config_init = self.parser.instantiate_classes(self.config)
        except Exception as error:  # the user's code may fail in any way
            name = (config.get("model") or {}).get("class_path", "the model")
            raise UsageError(
                f"{name} can't be made on the meta device ({_first_line(error)}). If its __init__ reads values of "
                "tensors, make those with device='cpu' (torch.linspace(0, 1, 12, device='cpu')) or in plain Python."
            ) from error
        self.model = self.config_init.fit.model
        fake_module_(self.model, self.mode, _DTYPES.get(self.precision))
        self._add_configure_optimizers_method_to_model(self.subcommand)
        config.pop("model")
        trainer.callbacks = callbacks
        if self.with_data:
            config["data"] = data
        made = self.parser.instantiate_classes(self.config).fit
        self.datamodule = made.get("data")
        self.callbacks: list[Callback] = list(made.trainer.callbacks or [])
        self.subcommand = None  # and nothing is run


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def plan_config(
    options: argparse.Namespace, extra: list[str], memory: int, batch: Any, tell: Callable[[str], Any]
) -> Plan:
    """Make the plan of a configuration.

    Args:
        options: The parsed arguments of the command.
        extra: Arguments for the configuration.
        memory: Bytes of a device.
        batch: What to measure with; None for the configuration's own.
        tell: Told what is done.

    Raises:
        UsageError: If it can't be planned.
    """
    args = ["fit", *(part for path in options.config for part in ("--config", path)), *extra]
    with_data = batch is None and not options.states_only
    with quiet():
        cli = PlanCLI(args, with_data)
    low_bit = next((callback for callback in cli.callbacks if isinstance(callback, LowBitOptimizer)), None)
    tell("Taking one step that computes nothing")
    try:
        step = run_fake_step(
            cli.model,
            cli.datamodule,
            batch,
            mode=cli.mode,
            precision=cli.precision,
            batch_size=options.batch_size,
            states_only=options.states_only,
            callbacks=[callback for callback in cli.callbacks if isinstance(callback, BaseFinetuning)],
            trainer_options=cli.options,
        )
    except Exception as error:  # the user's code may fail in any way
        raise UsageError(
            f"The step of {type(cli.model).__name__} was not reached ({_first_line(error)}). Give the shapes of a "
            "batch by --input 8x1024:int64, or leave the activations out by --states-only."
        ) from error
    tell("Counting optimizer state")
    model = measure_model(cli.model, step, cli.mode, cli.precision, low_bit)
    return make_plan(
        model,
        options.devices,
        memory,
        options.nodes,
        options.headroom,
        cli.precision,
        step.batch_size,
        low_bit is not None,
        tuple(_notes(cli, step.failure, options.states_only, low_bit, model.casts)),
    )


def _notes(cli: PlanCLI, failure: str, states_only: bool, low_bit: LowBitOptimizer | None, casts: int) -> list[str]:
    notes = []
    if failure:
        notes.append(
            f"The activations are missing: the step can't run without values ({failure}). Leave room for them, or "
            "let the step not read values of tensors (`.item()`, `nonzero`, `if tensor:`)."
        )
    elif states_only:
        notes.append("The activations are left out, as asked for.")
    if low_bit is not None:
        notes.append("LowBitOptimizer counts under DDP alone; leave it out for the strategies that shard.")
    if casts:
        notes.append(
            "Activations include the low-precision copies of the parameters that autocast keeps until the backward "
            f"pass: {casts / 2**30:.2f} GiB."
        )
    if any(isinstance(callback, BaseFinetuning) for callback in cli.callbacks):
        notes.append("What is frozen at the start is counted as frozen; it needs more once it is trained.")
    ignored = [
        type(callback).__name__
        for callback in cli.callbacks
        if not isinstance(callback, (LowBitOptimizer, BaseFinetuning, GradientAccumulation))
    ]
    if ignored:
        notes.append(f"What callbacks keep themselves is not counted: {', '.join(ignored)}.")
    return notes
