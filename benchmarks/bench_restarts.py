"""Kill ranks at random moments under ``torchrun --max-restarts``, and see how the run comes back and how it ends.

Every run trains a small module with dropout, batch norm, a schedule and accumulation on two ranks, saves every two
steps, and has AutoResume and ExactResume: stock DDP too, so that only the strategy differs. A kill is a SIGKILL from
outside to a random rank, at a random step and a random moment in it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _timing import environment

REPO = Path(__file__).resolve().parent.parent
LIMIT = 240.0  # seconds for a step that never comes


@dataclass
class Outcome:
    """What became of the kills of one run."""

    kills: int = 0
    first: int = 0
    seconds: list[float] = field(default_factory=list)
    same: bool = False


def places(folder: Path) -> list[tuple[int, int, int, float]]:
    """Of each rank: its process, its step, in which start, and when it wrote so."""
    found = []
    for rank in (0, 1):
        try:
            pid, step, start, when = (folder / f"at.{rank}").read_text().split()
        except FileNotFoundError:
            return []
        found.append((int(pid), int(step), int(start), float(when)))
    return found


def kill_at_random(strategy: str, kills: int, draw: random.Random, folder: Path) -> Outcome:
    """Run once, with so many kills; then once more in the same processes, whole, to compare."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={4 * kills}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command.append(f"--master-port={free.getsockname()[1]}")
    command += ["-m", "tests.strategies.restart_scenarios"]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "STEPS": str(12 * kills + 10)}
    result = Outcome()
    with (folder / f"{strategy}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(folder), f"{strategy},whole {strategy}"],
            env={**os.environ, **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            for number in range(kills):
                at = wait_for(process, folder / strategy, step=12 * number + draw.randint(3, 10))
                if not at:
                    break
                time.sleep(draw.uniform(0, 0.05))
                os.kill(at[draw.randrange(2)][0], signal.SIGKILL)
                killed, result.kills = time.time(), result.kills + 1
                again = wait_for(process, folder / strategy, after=at[0][2])
                if not again:
                    break
                result.first += again[0][2] == at[0][2] + 1
                result.seconds.append(max(when for *_, when in again) - killed)
            process.wait(LIMIT)
        finally:
            process.kill()
            process.wait()
    try:
        ended, whole = (torch.load(folder / f"{name}{strategy}.pt", weights_only=True) for name in ("", "whole "))
    except FileNotFoundError:
        return result
    result.same = all(torch.equal(ended["weights"][name], value) for name, value in whole["weights"].items())
    return result


def wait_for(process: Any, folder: Path, step: int = 0, after: int = -1) -> list[tuple[int, int, int, float]]:
    """Wait until both ranks are in one start, after that one, and at that step; nothing where the run ended."""
    for _ in itertools.takewhile(lambda began: time.time() - began < LIMIT, itertools.repeat(time.time())):
        at = places(folder)
        if at and at[0][2] == at[1][2] > after and min(place[1] for place in at) >= step:
            return at
        if process.poll() is not None:
            break
        time.sleep(0.005)
    return []


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=7, help="of each strategy")
    parser.add_argument("--stock", type=int, default=5, help="of Lightning's own DDP")
    parser.add_argument("--strategies", default="accel_ddp,zero2,fsdp2", help="separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(environment())
    print("\n| strategy | kills | back at the first restart | seconds (median) | longest | same weights |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for name in [*options.strategies.split(","), "ddp"]:
        draw = random.Random(f"{options.seed} {name}")
        kills = options.stock if name == "ddp" else options.kills
        if kills == 0:
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = kill_at_random(name, kills, draw, Path(folder))
        seconds = f"{statistics.median(outcome.seconds):.1f}" if outcome.seconds else "-"
        longest = f"{max(outcome.seconds):.1f}" if outcome.seconds else "-"
        first = f"{outcome.first} of {outcome.kills}"
        row = ["stock ddp" if name == "ddp" else name, outcome.kills, first, seconds, longest]
        print(f"| {' | '.join(map(str, row))} | {'yes' if outcome.same else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
