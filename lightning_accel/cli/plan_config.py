"""From a LightningCLI configuration to a plan: its classes are made, the module on the meta device, and no Trainer."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jsonargparse import Namespace, namespace_to_dict
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.accumulation.micro_batching import MicroBatching
from lightning_accel.cli.lightning_commands import AccelCLI
from lightning_accel.cli.usage import UsageError
from lightning_accel.hooks.optimizers import OptimizerTransform
from lightning_accel.optimizers.in_backward import OptimizerInBackward
from lightning_accel.optimizers.low_bit import LowBitOptimizer
from lightning_accel.tuning.fake import FakeStep, fake_module_, quiet, run_fake_step
from lightning_accel.tuning.memory import Model
from lightning_accel.tuning.plan import Plan, find_precision, make_plan, measure_model, takes_fsdp2
from lightning_accel.tuning.strategy_settings import read_settings

__all__ = ["PlanCLI", "plan_config"]

_KEPT = ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches")
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
_KEEP_WEIGHTS = (
    "EMA",
    "GradualPruning",
    "SAM",
    "ScheduleFree",
    "StochasticWeightAveraging",
    "WeightAveraging",
    "EMAWeightAveraging",
)


class PlanCLI(AccelCLI):
    """Makes the module on the meta device, then the data and callbacks, and no Trainer.

    Args:
        args: The command line, from the subcommand on.
        with_data: Whether the data module is made.

    Attributes:
        real_because: Why the module had to be made on the CPU; empty where it did not.
    """

    def __init__(self, args: list[str], with_data: bool) -> None:
        self.with_data = with_data
        self.mode = FakeTensorMode()
        self.real_because = ""
        super().__init__(args, save_config_callback=None, seed_everything_default=False)

    def instantiate_classes(self) -> None:
        """Make what the plan needs."""
        config = self.config.fit
        trainer = config.trainer
        self.options = {name: trainer[name] for name in _KEPT if trainer.get(name) is not None}
        strategy = trainer.get("strategy")
        try:
            self.precision = find_precision(trainer.get("precision"))
            self.settings = read_settings(namespace_to_dict(strategy) if isinstance(strategy, Namespace) else strategy)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from None
        data, callbacks = config.pop("data", None), trainer.callbacks
        for name in ("logger", "plugins", "profiler", "callbacks"):
            trainer[name] = None
        trainer.strategy = "auto"
        self._make_module((config.get("model") or {}).get("class_path", "the model"))
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

    def _make_module(self, name: str) -> None:
        """On the meta device, or where its ``__init__`` needs values, on the CPU."""
        try:
            with torch.device("meta"):
                self.config_init = self.parser.instantiate_classes(self.config)
        except Exception as error:  # the user's code may fail in any way
            self.real_because = _first_line(error)
            try:
                self.config_init = self.parser.instantiate_classes(self.config)
            except Exception as again:
                raise UsageError(f"{name} can't be made ({_first_line(again)}).") from again
        self.model = self.config_init.fit.model


def _first_line(error: BaseException) -> str:
    """Of the first error: what makes classes of a configuration wraps it in long ones."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
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
    with quiet():
        cli = PlanCLI(args, batch is None and not options.states_only)
    tell("Taking one step that computes nothing")
    step = _step(cli, options, batch)
    tell("Counting optimizer state")
    active = [callback for callback in cli.callbacks if not getattr(callback, "is_neutral", False)]
    in_backward = [callback for callback in active if isinstance(callback, OptimizerInBackward)]
    transforms = tuple(item for item in active if isinstance(item, OptimizerTransform) and item not in in_backward)
    accumulates = cli.options.get("accumulate_grad_batches", 1) > 1 or any(
        isinstance(callback, (GradientAccumulation, MicroBatching)) for callback in active
    )
    if (options.devices * options.nodes) % cli.settings.replicas:
        raise UsageError(f"{cli.settings.replicas} replicas can't share {options.devices * options.nodes} devices.")
    try:
        model = measure_model(
            cli.model,
            step,
            cli.mode,
            precision=cli.precision,
            transforms=transforms,
            blocks=cli.settings.blocks,
            accumulates=accumulates,
            in_backward=bool(in_backward),
        )
    except ValueError as error:
        raise UsageError(f"The optimizer can't be planned: {error}.") from error
    return make_plan(
        model,
        options.devices,
        memory,
        options.nodes,
        options.headroom,
        cli.precision,
        step.batch_size,
        any(isinstance(transform, LowBitOptimizer) for transform in transforms),
        cli.settings,
        tuple(_notes(cli, step.failure, options.states_only, model)),
    )


def _step(cli: PlanCLI, options: argparse.Namespace, batch: Any) -> FakeStep:
    name = type(cli.model).__name__
    try:
        return run_fake_step(
            cli.model,
            cli.datamodule,
            batch,
            mode=cli.mode,
            precision=cli.precision,
            batch_size=options.batch_size,
            most=sum(item.size or 0 for item in cli.callbacks if isinstance(item, MicroBatching)),  # one at most
            states_only=options.states_only,
            callbacks=[callback for callback in cli.callbacks if isinstance(callback, BaseFinetuning)],
            trainer_options=cli.options,
        )
    except Exception as error:  # the user's code may fail in any way
        reason = _first_line(error)
        for method in ("training_step", "configure_optimizers"):
            if f"`{method}" in reason and "define" in reason:
                raise UsageError(f"{name} has no {method}, so that there is nothing to plan.") from error
        raise UsageError(
            f"The step of {name} was not reached ({reason}). If the data is missing, make it ready first, since "
            "`prepare_data` is not called here; or give the shapes of a batch by --input 8x1024:int64; or leave the "
            "activations out by --states-only."
        ) from error


def _notes(cli: PlanCLI, failure: str, states_only: bool, model: Model) -> Iterator[str]:
    if cli.real_because:
        yield (
            f"The module was made on the CPU, with memory, since on the meta device it fails ({cli.real_because}). For "
            "a large one, let its __init__ make what it reads with device='cpu' (torch.linspace(0, 1, 12, "
            "device='cpu')) or in plain Python."
        )
    if failure:
        yield (
            f"The activations are missing: the step can't run without values ({failure}). Leave room for them, or "
            "let the step not read values of tensors (`.item()`, `nonzero`, `if tensor:`)."
        )
    elif states_only:
        yield "The activations are left out, as asked for."
    for low_bit in (callback for callback in cli.callbacks if isinstance(callback, LowBitOptimizer)):
        where = "DDP and FSDP2" if takes_fsdp2(low_bit) else "DDP alone"
        yield f"LowBitOptimizer counts under {where}; leave it out for the other strategies."
    if any(isinstance(callback, MicroBatching) and callback.size is None for callback in cli.callbacks):
        yield (
            "MicroBatching learns its size where memory runs out, which is not known here: the activations are of "
            "whole batches. Give it a `size`, or --batch-size here."
        )
    if model.casts:
        yield (
            "Activations include the low-precision copies of the parameters that autocast keeps until the backward "
            f"pass: {model.casts / 2**30:.2f} GiB."
        )
    if any(isinstance(callback, BaseFinetuning) for callback in cli.callbacks):
        yield "What is frozen at the start is counted as frozen; it needs more once it is trained."
    if ignored := list(_ignored(cli.callbacks)):
        yield f"What callbacks keep themselves is not counted: {', '.join(ignored)}."
    with contextlib.suppress(ValueError):  # of a module that stands in for it without a spec
        if importlib.util.find_spec("deepspeed") is None:
            yield (
                "ZeRO needs deepspeed, which is not installed here: pip install 'lightning-accel[deepspeed]'. Without "
                "it accel_zero1 is DDP whose optimizer state alone is divided, with no master copy."
            )


def _ignored(callbacks: list[Callback]) -> Iterator[str]:
    """Callbacks that keep tensors as large as the weights, or may do so."""
    for callback in callbacks:
        name, module = type(callback).__name__, type(callback).__module__
        known = module.startswith(("lightning.pytorch.", "lightning_accel."))
        if name in _KEEP_WEIGHTS or isinstance(callback, StochasticWeightAveraging) or not known:
            yield name
