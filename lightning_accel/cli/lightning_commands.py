"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI, where this package's classes have short names."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

import lightning_accel
import lightning_accel.augment
from lightning_accel.cli.recipes import split_recipes
from lightning_accel.cli.usage import UsageError

__all__ = ["AccelCLI", "KeepConfig", "run_lightning"]


class AccelCLI(LightningCLI):
    """A LightningCLI that finds this package's classes by name and the user's modules in the working directory.

    Args:
        args: The command line, from the subcommand on.
        kwargs: Arguments of LightningCLI.
    """

    def __init__(self, args: list[str], **kwargs: Any) -> None:
        for package in (lightning_accel, lightning_accel.augment):
            for name in getattr(package, "__all__", ()):
                getattr(package, name)  # a short name is looked up among the classes that are imported
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        # A launcher of several processes needs sys.argv as it was, so LightningCLI sees both it and `args`.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
        super().__init__(args=args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Keep the first of equal callbacks of this package: two recipes, or a recipe and the user, may ask for one."""
        trainer = (self.config[self.subcommand] if self.subcommand else self.config).trainer
        kept: list[Any] = []
        for spec in trainer.callbacks if isinstance(trainer.callbacks, list) else ():
            if spec in kept and spec.class_path.startswith("lightning_accel."):
                rank_zero_info(f"{spec.class_path} was asked for more than once with the same arguments: one is kept.")
            else:
                kept.append(spec)
        if kept:
            trainer.callbacks = kept


class KeepConfig(SaveConfigCallback):
    """Saves the configuration beside the logs as LightningCLI does, but leaves a file that is there and goes on.

    LightningCLI aborts then, which without a logger is every second run in a folder.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration unless the file is there."""
        path = os.path.join(trainer.log_dir or "", self.config_filename)
        if trainer.strategy.broadcast(os.path.isfile(path)) and not self.already_saved:
            rank_zero_info(f"{path} is there already, so the configuration of this run is not saved.")
            self.already_saved = True
        super().setup(trainer, pl_module, stage)


def run_lightning(command: str, args: list[str]) -> int:
    """Run one of LightningCLI's subcommands; return the exit status.

    Raises:
        UsageError: If a recipe is unknown, or asked for where nothing is trained.
    """
    rest, recipes = split_recipes(args)
    if recipes and command != "fit":
        raise UsageError(f"A recipe changes training, so --recipe goes with fit and compare, not with {command}.")
    AccelCLI(
        [command, *rest, *(part for path in recipes for part in ("--config", path))], save_config_callback=KeepConfig
    )
    return 0
