"""``lightning-accel compare``: run plain and accelerated side by side, and write the receipt."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import re
import shlex
import signal
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_accel.cli.recipes import recipe_path
from lightning_accel.cli.runner import Job, execute, warm_up
from lightning_accel.cli.terminal import make_console
from lightning_accel.cli.usage import UsageError, suggest
from lightning_accel.report.receipt import Receipt, choose_metric, make_receipt
from lightning_accel.report.record import ACCELERATED, PLAIN, SIDES, Run, Side
from lightning_accel.report.statistics import Direction
from lightning_accel.report.store import StorageError, read_runs, write_receipt, write_run, write_text
from lightning_accel.report.text import format_number, render_terminal

__all__ = ["parse_seeds", "parse_target", "run_compare", "run_order"]

_DIRECTIONS: dict[str, Direction] = {"min": "lower", "max": "higher"}
_EPILOG = """\
The accelerated side is the plain one with every --with file read after the --config files, as if they were more
--config arguments of `lightning-accel fit`: a later file wins, and `callbacks+:` appends. So --with can be a whole
configuration or only what is added. Each --recipe then appends its callbacks. What follows a lone -- goes to both
sides: `-- --trainer.max_epochs=3`.

Every run is a process of its own, plain and accelerated in turn, and is kept in OUT/runs as soon as it is done. Ctrl-C
stops, and makes the receipt of what is there; the same command with the same --out goes on from there.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="lightning-accel compare",
        description="Run plain and accelerated side by side, and write the receipt of what was gained and lost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="YAML", help="the plain run; may be repeated")
    add("--with", action="append", default=[], metavar="YAML", dest="overlays", help="what is added; may be repeated")
    add("--recipe", action="append", default=[], metavar="NAME", help="a recipe that is added; may be repeated")
    add("--seeds", default="3", metavar="N", help="how many seeds a side, or which: 3 means 0,1,2 (default: 3)")
    add("--metric", default="", metavar="NAME", help="the metric to compare (default: chosen among what is logged)")
    add("--mode", choices=("min", "max"), help="whether the metric should fall or rise (default: by its name)")
    add(
        "--target",
        metavar="NAME=VALUE",
        help="the value whose reaching is timed, as in val_acc=0.9 (default: what the weaker side reaches on average)",
    )
    add("--out", metavar="OUT", help="folder of the results (default: a new one in receipts/)")
    return parser


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that ``text`` asks for: "3" is [0, 1, 2], "5,7" is [5, 7].

    Raises:
        UsageError: If it asks for none, for one twice, or for something else.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    seeds = list(range(numbers[0])) if len(numbers) == 1 else numbers
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UsageError(
            f"Expected --seeds to be a number of seeds, or different seeds such as 1,2,3, but got {text!r}."
        )
    return seeds


def parse_target(text: str) -> tuple[str, float, Direction | None]:
    """Return the metric, value and, where >= or <= tells it, the better direction of a target such as "val_acc=0.9".

    Raises:
        UsageError: If it is not of that form.
    """
    found = re.fullmatch(r"\s*([^=<>]+?)\s*(>=|<=|=)\s*([^=]+)", text)
    with contextlib.suppress(ValueError):
        if found:
            direction: dict[str, Direction] = {">=": "higher", "<=": "lower"}
            return found[1], float(found[3]), direction.get(found[2])
    raise UsageError(f"Expected --target to be like val_acc=0.9 or val_loss<=0.3, but got {text!r}.")


def run_order(seeds: list[int]) -> list[tuple[Side, int]]:
    """Return the runs in order: seed by seed, and each seed starts with the other side (ABBA), against drifts."""
    return [(side, seed) for index, seed in enumerate(seeds) for side in SIDES[:: -1 if index % 2 else 1]]


def run_compare(argv: list[str]) -> int:
    """Run the comparison; return the exit status.

    Raises:
        UsageError: If an argument is wrong.
    """
    own, extra = argv, []
    if "--" in argv:
        split = argv.index("--")
        own, extra = argv[:split], argv[split + 1 :]
    options = make_parser().parse_args(own)
    comparison = Comparison(options, extra, shlex.join(["lightning-accel", "compare", *argv]), make_console())
    try:
        return comparison.run()
    except StorageError as error:
        comparison.console.print(f"[bold red]{escape(str(error))}[/]")
        return 1


class Comparison:
    """One ``compare``: its runs, and what becomes of them.

    Args:
        options: The parsed arguments.
        extra: Arguments for both sides.
        command: What to type to repeat it.
        console: Where to print.

    Raises:
        UsageError: If an argument is wrong.
    """

    def __init__(self, options: argparse.Namespace, extra: list[str], command: str, console: Console) -> None:
        self.command, self.console = command, console
        self.seeds = parse_seeds(options.seeds)
        self.metric: str = options.metric
        self.better: Direction | None = _DIRECTIONS.get(options.mode)
        self.target: float | None = None
        if options.target:
            name, self.target, direction = parse_target(options.target)
            if self.metric not in ("", name):
                raise UsageError(f"--metric is {self.metric}, but --target is one of {name}: leave one of them out.")
            self.metric, self.better = name, direction or self.better
        if not options.overlays and not options.recipe:
            raise UsageError("There is nothing to compare with: give the accelerated side by --with or by --recipe.")
        recipes = [str(recipe_path(name)) for name in options.recipe]
        for path in (*options.config, *options.overlays):
            if not Path(path).is_file():
                raise UsageError(f"There is no configuration file {path}.")
        self.texts = {
            path: Path(path).read_text(encoding="utf-8") for path in (*options.config, *options.overlays, *recipes)
        }
        plain = _config_args(options.config)
        self.args: dict[Side, list[str]] = {
            PLAIN: ["fit", *plain, *extra],
            ACCELERATED: ["fit", *plain, *_config_args(options.overlays), *extra, *_config_args(recipes)],
        }
        added = [*options.overlays, *(f"recipe {name}" for name in options.recipe)]
        base = " + ".join([*options.config, *([shlex.join(extra)] if extra else [])])
        self.sides: dict[str, str] = {PLAIN: base, ACCELERATED: " + ".join([base, *added])}
        self.out = Path(options.out or f"receipts/{datetime.now():%Y%m%d-%H%M%S}").absolute()
        self.runs: dict[tuple[Side, int], Run] = {}

    def run(self) -> int:
        """Make the runs that are missing, then the receipt; return the exit status."""
        self._open()
        status, notes = 0, []
        try:
            with _terminable():
                status = self._run_all()
        except KeyboardInterrupt:
            status = 130
            notes.append("Stopped before all runs were done.")
            self.console.print("[yellow]Stopped. The runs that are done are kept.[/]")
        except StorageError as error:
            status = 1
            notes.append("Stopped because a result could not be written.")
            self.console.print(
                f"[bold red]{escape(str(error))}[/] Stopped; the runs before it are kept in {self.out / 'runs'}."
            )
        return self._report(notes) or status

    def _open(self) -> None:
        """Make the folder, or take over the runs of the same comparison that are there already."""
        versions = {name: _version(name) for name in ("lightning-accel", "lightning", "torch")}
        described = {"args": self.args, "configs": self.texts, "versions": versions}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        mark = self.out / "comparison.json"
        if mark.exists():
            found: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))
            if found.get("digest") != digest:
                raise UsageError(
                    f"{self.out} holds another comparison, or other settings or versions of it: choose another --out."
                )
        elif self.out.exists() and any(self.out.iterdir()):
            raise UsageError(f"{self.out} is not empty, and holds no comparison: choose another --out.")
        try:
            (self.out / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"Could not make {self.out}: {error.strerror or error}. Choose another --out."
            ) from error
        write_text(mark, json.dumps({"digest": digest, "command": self.command, **described}, indent=1) + "\n")
        try:
            kept = read_runs(self.out / "runs")
        except ValueError as error:
            raise UsageError(str(error)) from None
        for run in kept:
            if run.status == "finished" and run.seed in self.seeds:
                if changed := _changed_sources(run):
                    raise UsageError(
                        f"{changed} has changed since {run.name} in {self.out} was run: choose another --out."
                    )
                self.runs[run.side, run.seed] = run
        if self.runs:
            self.console.print(f"Going on from {len(self.runs)} runs in {self.out}.")

    def _run_all(self) -> int:
        order = run_order(self.seeds)
        status = 0
        for run in self.runs.values():
            self._check_metric(run)
        with _progress(self.console) as bar:
            task = bar.add_task("getting ready", total=len(order))
            if not self.runs:
                warm_up()
            for done, (side, seed) in enumerate(order):
                if (side, seed) in self.runs:
                    bar.update(task, completed=done + 1)
                    continue
                bar.update(task, completed=done, description=f"run {done + 1} of {len(order)}: {side}, seed {seed}")

                def advance(fraction: float, done: int = done) -> None:
                    bar.update(task, completed=done + 0.99 * fraction)

                run = execute(Job(side, seed, self.args[side], self.out / "runs"), advance)
                self.runs[side, seed] = run
                write_run(self.out / "runs", run)
                if run.status == "failed":
                    status = 1
                    self.console.print(f"[bold red]{run.name} failed.[/] The end of its log:\n{escape(run.error)}")
                    if not any(other.side == side and other.status == "finished" for other in self.runs.values()):
                        self.console.print(f"Stopped: the {side} side has not worked once.")
                        break
                else:
                    self._check_metric(run)
                    self._tell(run)
            else:
                bar.update(task, completed=len(order), description="done")
        return status

    def _check_metric(self, run: Run) -> None:
        if self.metric and self.metric not in run.metrics:
            raise UsageError(f"{run.name} did not log {self.metric!r}.{suggest(self.metric, sorted(run.metrics))}")

    def _tell(self, run: Run) -> None:
        metric = self.metric or choose_metric([run])
        value = f", {metric} {format_number(run.metrics[metric], 'metric')}" if metric else ""
        self.console.print(f"{run.side:>11}, seed {run.seed}: {format_number(run.seconds_fit, 'seconds')}{value}")

    def _report(self, notes: list[str]) -> int:
        """Print and write the receipt of the runs that are done; return 1 if it could not be written."""
        runs = [self.runs[key] for key in run_order(self.seeds) if key in self.runs]
        if not any(run.status == "finished" for run in runs):
            self.console.print("No run finished, so there is no receipt.")
            return 0
        receipt = make_receipt(
            runs,
            metric=self.metric,
            better=self.better,
            target=self.target,
            command=self.command,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            sides=self.sides,
            configs=self.texts,
            notes=notes,
        )
        self.console.print(render_terminal(receipt))
        return self._write(receipt)

    def _write(self, receipt: Receipt) -> int:
        try:
            paths = write_receipt(self.out, receipt)
        except StorageError as error:
            again = "Free some space and give the same command with the same --out to write it again."
            self.console.print(f"[bold red]{escape(str(error))}[/] The runs are kept in {self.out / 'runs'}. {again}")
            return 1
        for kind in ("json", "md", "html"):
            self.console.print(f"{kind:>4}: {paths[kind]}", soft_wrap=True)
        return 0


def _config_args(paths: list[str]) -> list[str]:
    return [part for path in paths for part in ("--config", path)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _changed_sources(run: Run) -> str:
    """Return the first source file that is no longer what it was when ``run`` was made, or the empty string."""
    for path, digest in run.sources.items():
        file = Path(path)
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest()[:16] != digest:
            return path
    return ""


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, so that the run in progress never outlives this process."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
