"""Sharded checkpoints: time and memory of a save, of going on at another number of ranks, and of consolidation.

python benchmarks/bench_sharded_checkpoints.py [--quick] [--parameters MILLIONS]

Each is done in new processes on this machine (gloo). Memory is what a rank's peak lies above what it held before: all
of its resident memory, and the part that is not files mapped into it, which the system takes back as it likes.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _timing import environment  # first: it sets the threads before torch is imported

# isort: split
import torch
from _ranks import RANK, RANKS, launch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.zero import ZeROStrategy

WIDTH, ROUNDS = 1024, 3


class Layers(LightningModule):
    """Square layers, each used once: a step costs next to nothing."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


@contextmanager
def measured(found: dict[str, Any]) -> Iterator[None]:
    """Seconds and CPU seconds, the least of several times; and how far the peak of memory lies above what is held."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    resident = status("VmRSS")
    anonymous = peak = status("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, began_cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        found["seconds"] = min(found.get("seconds", float("inf")), time.perf_counter() - began)
        found["cpu"] = min(found.get("cpu", float("inf")), time.process_time() - began_cpu)
        done.set()
        watcher.join()
        peaks = {"anonymous": max(peak, status("RssAnon")) - anonymous, "resident": status("VmHWM") - resident}
        found.update({kind: max(found.get(kind, 0), value) for kind, value in peaks.items()})


def make_strategy(name: str) -> Any:
    if name == "plain":
        return "auto"
    return FullyShardStrategy(["Linear"]) if name == "fsdp2" else ZeROStrategy(stage=int(name[-1]))


class Save(Callback):
    """Saves after the last step."""

    def __init__(self, path: Path, found: dict[str, Any]) -> None:
        self.path, self.found = path, found

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        for _ in range(ROUNDS):
            with measured(self.found):
                trainer.save_checkpoint(self.path)


class Load(Callback):
    """Measures from the moment when Lightning opens the checkpoint to the first step."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        load = trainer.strategy.load_checkpoint

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.watch = measured(self.found)
            self.watch.__enter__()
            return load(*args, **kwargs)

        trainer.strategy.load_checkpoint = watched  # type: ignore[method-assign]

    def on_train_start(self, *_: Any) -> None:
        self.watch.__exit__(None, None, None)


def run(name: str, layers: int, steps: int, callback: Callback, resume: Path | None = None) -> None:
    trainer = Trainer(
        accelerator="cpu",
        strategy=make_strategy(name),
        devices=RANKS,
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Layers(layers), DataLoader(torch.randn(4, WIDTH), 1), ckpt_path=resume)


def rank_main(task: str, name: str, layers: int, path: Path, out: Path) -> None:
    """What each rank runs; rank 0 writes what it found."""
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}
    if task == "save":
        run(name, layers, 1, Save(path, found))
    elif task == "resume":
        run(name, layers, 2, Load(found), resume=path)
    else:
        from lightning_accel.strategies.consolidate import consolidate_checkpoint

        for _ in range(ROUNDS):
            with measured(found):
                consolidate_checkpoint(path, path.with_name(f"{path.stem}-out.{name}"), overwrite=True)
    if RANK == 0:
        out.write_text(json.dumps(found))


def bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parameters", type=int, default=100, help="millions")
    parser.add_argument("--rank-of", type=Path)
    parser.add_argument("--task")
    parser.add_argument("--name")
    parser.add_argument("--path", type=Path)
    arguments = parser.parse_args()
    layers = 2 if arguments.quick else max(1, arguments.parameters * 10**6 // (WIDTH * WIDTH + WIDTH))
    if arguments.rank_of:
        rank_main(arguments.task, arguments.name, layers, arguments.path, arguments.rank_of)
        return
    weights = layers * (WIDTH * WIDTH + WIDTH) * 4
    print(environment(), f"Weights: {weights / 1e6:,.0f} MB.")
    print("| | | GB | s/GB | CPU s/GB | peak memory, of the weights | without mapped files |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with TemporaryDirectory(dir=Path.cwd()) as folder:

        def measure(task: str, name: str, path: Path, ranks: int, label: str) -> None:
            options = ["--task", task, "--name", name, "--path", str(path)]
            options += ["--parameters", str(arguments.parameters)] + ["--quick"] * arguments.quick
            found = launch(__file__, ranks, Path(folder) / f"{task}-{name}.json", *options)
            size = bytes_of(path) / 1e9
            numbers = [found["seconds"] / size, found["cpu"] / size, found["resident"] / weights]
            numbers.append(found["anonymous"] / weights)
            row = [path.stem, label, *(f"{number:.2f}" for number in (size, *numbers))]
            print(f"| {' | '.join(row)} |", flush=True)

        for name in ("plain", "zero2", "zero3", "fsdp2"):
            path = Path(folder) / f"{name}.ckpt"
            ranks = 1 if name == "plain" else 2
            measure("save", name, path, ranks, f"save, {ranks} rank(s)")
            measure("resume", name, path, 1, "go on, 1 rank")
            if name != "plain":
                measure("consolidate", "ckpt", path, 1, "consolidate to .ckpt")
                measure("consolidate", "safetensors", path, 1, "consolidate to .safetensors")


if __name__ == "__main__":
    main()
