"""The peak memory of one model under each file of this folder, beside what theory says; resident memory and time too.

python examples/low_memory/measure.py [--rounds 5] [--steps 6] [--sides plain,8-bit] [-- --data.batch_size=2]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in each process

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_accel.cli.lightning_commands import AccelCLI
from lightning_accel.cli.main import main as lightning_accel
from lightning_accel.hooks.memory import LiveBytes
from lightning_accel.report.sizes import PeakMemory, count_parameters, optimizer_state_bytes, tensor_bytes
from lightning_accel.tuning.fake import quiet

FOLDER = "examples/low_memory"
FUSED = ["--config", f"{FOLDER}/fused.yaml"]
LOW_BIT = [*FUSED, "--trainer.callbacks+=lightning_accel.LowBitOptimizer"]
SIDES = {
    "plain": [],
    "fused": FUSED,
    "8-bit": ["--config", f"{FOLDER}/eight_bit.yaml"],
    "4-bit": [*LOW_BIT, "--trainer.callbacks.bits=4"],
    "fp8": [*LOW_BIT, "--trainer.callbacks.bits=fp8"],
    "bf16": [*LOW_BIT, "--trainer.callbacks.bits=bf16"],
    "in backward": ["--config", f"{FOLDER}/in_backward.yaml"],
    "8-bit in backward": ["--config", f"{FOLDER}/eight_bit_in_backward.yaml"],
    "micro-batched": ["--config", f"{FOLDER}/micro_batched.yaml"],
    "all together": ["--config", f"{FOLDER}/all_together.yaml"],
}
"""What is added to plain.yaml. That of 4 bits, fp8 and bf16 is on the command line: it differs in one argument."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Lets glibc give freed memory of large tensors back at once, see docs/guides/low_memory.md."""


class Watch(Callback):
    """Measures a fit, from its first step to its last.

    Args:
        count: Whether to count the bytes of tensors, for which every operation is looked at; else the memory and the
            time of the process are measured.

    Attributes:
        found: What was measured: bytes of the model's parameters, the most bytes above it, bytes of optimizer state a
            parameter, the loss of the last step; and CPU seconds of a step, of those after the second one.
    """

    def __init__(self, count: bool) -> None:
        self.count, self.found = count, {}
        self.resident, self.seconds, self.counting = PeakMemory(), [], contextlib.ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.count:
            data = trainer.train_dataloader.dataset.tensors  # whose views make no new bytes
            self.live = LiveBytes(known=[*pl_module.parameters(), *pl_module.buffers(), *data])
            self.counting.enter_context(self.live)
        self.resident.start(pl_module.device)

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.process_time()  # the machine may be busy with something else

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.began)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = {
            "parameters": tensor_bytes(pl_module.parameters()),
            "peak": self.resident.stop(),
            "state": optimizer_state_bytes(trainer.optimizers) / count_parameters(pl_module),
            "loss": trainer.callback_metrics["train_loss"].item(),
            "seconds": statistics.median(self.seconds[2:] or self.seconds),
        }
        self.counting.close()
        if self.count:
            self.found["peak"] = self.live.peak

    def on_exception(self, *_: Any) -> None:
        self.counting.close()


class WatchedCLI(AccelCLI):
    """Fits with a callback more."""

    def __init__(self, args: list[str], watch: Watch) -> None:
        self.watch = watch
        super().__init__(args, save_config_callback=None)

    def before_fit(self) -> None:
        self.trainer.callbacks.insert(0, self.watch)


def measure(side: str, extra: list[str], count: bool) -> dict[str, float]:
    """Fit one side, and return what `Watch` found."""
    watch = Watch(count)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        WatchedCLI(["fit", "--config", f"{FOLDER}/plain.yaml", *SIDES[side], *extra], watch)
    return watch.found


def predict(side: str, extra: list[str]) -> dict[str, float]:
    """What `lightning-accel plan` says of one side, in sizes of the parameters: all that is there beside them."""
    command = ["plan", "--config", f"{FOLDER}/plain.yaml", "--devices=1", "--device-memory=1TB", "--json=-", "--"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        lightning_accel([*command, *SIDES[side], *extra])
    found = json.loads(printed.getvalue())["strategies"][0]  # one device: no strategy
    found["activations"] += found["working"]
    found["total"] -= found["parameters"]
    return {name: found[name] / found["parameters"] for name in ("state", "gradients", "activations", "total")}


def alone(side: str, extra: list[str], **environment: str) -> dict[str, float]:
    """Measure one side's memory and time in a process of its own."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, side, extra, False).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def count_table(sides: list[str], extra: list[str]) -> Iterator[str]:
    """Theory, and the bytes of tensors, which are the same in any process."""
    yield "| | state | gradients | activations | theory | measured | state, bytes a parameter | loss |"
    yield "| --- |" + " ---: |" * 7
    for side in sides:
        theory, found = predict(side, extra), measure(side, extra, count=True)
        numbers = [*theory.values(), found["peak"] / found["parameters"]]
        cells = [*(f"{number:.2f}" for number in numbers), f"{found['state']:.3f}", f"{found['loss']:.6f}"]
        yield f"| {side} | {' | '.join(cells)} |"


def process_table(sides: list[str], extra: list[str], rounds: int) -> Iterator[str]:
    """Resident memory and CPU time of processes; sides take turns, and times are compared within a round."""
    runs = [{side: alone(side, extra) for side in sides[:: (-1) ** number]} for number in range(rounds)]
    yield "| | resident | the same, `MALLOC_MMAP_THRESHOLD_=65536` | CPU seconds a step | ratio | range |"
    yield "| --- |" + " ---: |" * 5
    for side in sides:
        found = [run[side] for run in runs]
        peaks = [statistics.median(run["peak"] for run in found), alone(side, extra, **GIVE_BACK)["peak"]]
        ratios = [run[side]["seconds"] / run[sides[0]]["seconds"] for run in runs]
        cells = [f"{peak / found[0]['parameters']:.2f}" for peak in peaks]
        cells += [f"{statistics.median(run['seconds'] for run in found):.2f}", f"{statistics.median(ratios):.2f}"]
        yield f"| {side} | {' | '.join(cells)} | {min(ratios):.2f} to {max(ratios):.2f} |"


def main() -> None:
    own, extra = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, extra = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side for the second table; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=6, help="of each run")
    parser.add_argument("--sides", default=",".join(SIDES), help="those after the first are compared with it")
    options = parser.parse_args(own)
    sides, extra = options.sides.split(","), [f"--trainer.max_steps={options.steps}", *extra]
    for line in count_table(sides, extra):
        print(line, flush=True)
    if options.rounds:
        print()
        for line in process_table(sides, extra, options.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
