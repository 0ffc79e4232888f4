"""The only code that touches the Trainer's internals."""

from lightning_accel.hooks.batch import BatchTransform, batch_generator
from lightning_accel.hooks.callback import TOUCHABLE, AccelCallback, Contract, trainer_callbacks
from lightning_accel.hooks.clock import fit_length, moment
from lightning_accel.hooks.optimizers import OptimizerTransform, parameter_names, replace_optimizers
from lightning_accel.hooks.plan import Plan, check_conflicts, derive_order
from lightning_accel.hooks.window import AccumulationWindow, count_steps
from lightning_accel.schedules import FitLength, Moment

__all__ = [
    "TOUCHABLE",
    "AccelCallback",
    "AccumulationWindow",
    "BatchTransform",
    "Contract",
    "FitLength",
    "Moment",
    "OptimizerTransform",
    "Plan",
    "batch_generator",
    "check_conflicts",
    "count_steps",
    "derive_order",
    "fit_length",
    "moment",
    "parameter_names",
    "replace_optimizers",
    "trainer_callbacks",
]
