"""The process of one run of a comparison: LightningCLI's ``fit`` with a meter, and a JSON file of what it measured.

Started by :mod:`lightning_accel.cli.runner` as ``python -m lightning_accel.cli.run_one JOB.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lightning_accel.cli.lightning_commands import AccelCLI
from lightning_accel.report.meters import Meter
from lightning_accel.report.record import Run
from lightning_accel.report.sizes import describe_environment

__all__ = ["MeteredCLI", "describe_data", "main", "source_digests"]


class MeteredCLI(AccelCLI):
    """Measures ``fit``.

    Args:
        args: The command line, from the subcommand on.
        meter: What measures.
        kwargs: Arguments of LightningCLI.
    """

    def __init__(self, args: list[str], meter: Meter, **kwargs: Any) -> None:
        self.meter = meter
        super().__init__(args, save_config_callback=None, **kwargs)

    def before_fit(self) -> None:
        """Attach the meter and start its clock."""
        self.trainer.callbacks.insert(0, self.meter)  # type: ignore[attr-defined]  # Trainer sets it in a connector
        self.meter.begin(self.trainer.strategy.root_device)

    def after_fit(self) -> None:
        """Stop the clock."""
        self.meter.end()


def source_digests(folder: Path) -> dict[str, str]:
    """Return a digest of the source of each imported module that lies in ``folder``, by its path within."""
    found = {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.suffix == ".py" and path.is_relative_to(folder) and "site-packages" not in path.parts:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return dict(sorted(found.items()))


def describe_data(datamodule: LightningDataModule | None) -> str:
    """Return what a data module says of itself, on one short line; the empty string where it says nothing."""
    if datamodule is None or type(datamodule).__str__ is LightningDataModule.__str__:
        return ""  # Lightning's own text makes every loader again
    text = ""
    with contextlib.suppress(Exception):  # somebody else's __str__ is no reason to lose a run
        text = " ".join(str(datamodule).split())
    return text if len(text) <= 200 else text[:199] + "…"


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Run the job whose file is the only argument."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    progress, result = Path(job["progress"]), Path(job["result"])

    def tell(fraction: float | None) -> None:
        with contextlib.suppress(OSError):  # a progress bar that stands still is no reason to stop a run
            _write(progress, "" if fraction is None else f"{fraction:.4f}")

    meter = Meter(tell)
    cli = MeteredCLI(job["args"], meter, trainer_defaults={"default_root_dir": job["root"]})
    if cli.trainer.is_global_zero:
        measured = {**meter.measured, "environment": describe_environment(), "sources": source_digests(Path.cwd())}
        run = Run(job["side"], job["seed"], "finished", data=describe_data(cli.datamodule), **measured)
        _write(result, json.dumps(run.to_dict(), allow_nan=False))


if __name__ == "__main__":
    main()
