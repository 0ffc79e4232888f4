"""The same YAML on two machines, and a cable that is pulled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.compare import assert_equal
from tests.conformance.processes import wait
from tests.strategies.launch import free_port
from tests.strategies.machines import Machines, two_machines
from tests.strategies.two_machine_scenarios import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CONFIG = """
seed_everything: 1
model: tests.cli.tiny.Tiny
data: tests.cli.tiny.TinyData
trainer:
  accelerator: cpu
  devices: 1
  num_nodes: 2
  strategy: accel_ddp
  max_epochs: 3
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, filename: end}
"""


@pytest.fixture
def machines() -> Iterator[Machines]:
    with two_machines() as machines:
        yield machines


def begin(prefix: list[str], *command: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights(folder: Path) -> Any:
    return torch.load(folder / "checkpoints" / "end.ckpt", weights_only=True)


def test_the_same_yaml_ends_with_the_weights_of_one_machine(machines: Machines, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(CONFIG)
    fit = ("lightning_accel", "fit", "--config", "config.yaml")
    torchrun = ("torch.distributed.run", "--nproc-per-node=1", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test")
    endpoint = f"--rdzv-endpoint={machines.addresses[0]}:{free_port()}"
    launchers = []
    for number, prefix in enumerate(machines.prefixes):
        # machines that a name service knows do without the last two
        own = (
            f"--node-rank={number}",
            f"--local-addr={machines.addresses[number]}",
            f"--rdzv-conf=is_host={1 - number}",
        )
        launchers.append(begin(prefix, *torchrun, endpoint, *own, "-m", *fit, folder=tmp_path / "two"))
    wait(launchers, 300)
    one = ("--trainer.devices=2", "--trainer.num_nodes=1")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, **common} for rank in ("0", "1")]
    wait([begin([], *fit, *one, folder=tmp_path / "one", **rank) for rank in ranks], 300)
    one_machine, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert two["global_step"] == one_machine["global_step"] == 6
    assert_equal(two["state_dict"], one_machine["state_dict"], "two machines against one")


def test_a_pulled_cable_is_an_error_on_both_machines(machines: Machines, tmp_path: Path) -> None:
    names = ["accel_ddp", "zero2"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": machines.addresses[0], "MASTER_PORT": str(free_port())}
    module = "tests.strategies.two_machine_scenarios"
    ranks = [
        begin(
            prefix, module, str(tmp_path), *names, folder=tmp_path, RANK=rank, NODE_RANK=rank, LOCAL_RANK="0", **common
        )
        for prefix, rank in zip(machines.prefixes, "01", strict=True)
    ]
    try:
        for name in names:
            folder = tmp_path / name
            waited_for(lambda folder=folder: all(step_of(folder, rank) > 3 for rank in (0, 1)), ranks, 120)
            began = time.time()
            pull(machines, folder)
            ends = [folder / f"{name}.{rank}.pt" for rank in (0, 1)]
            waited_for(lambda ends=ends: ends[0].exists(), ranks, TIMEOUT + 60)
            if not machines.spaces:
                plug(machines, folder)
            waited_for(lambda ends=ends: ends[1].exists(), ranks, TIMEOUT + 60)
            time.sleep(0.1)  # the file may just be being written
            for rank, end in enumerate(ends):
                said = torch.load(end, weights_only=True)
                if machines.spaces or rank == 0:
                    other = f"rank {1 - rank} on machine-{1 - rank}" if machines.spaces else "a rank"
                    assert f"Lost contact with {other}: no answer for {TIMEOUT} s. The network is down" in said["error"]
                    assert said["at"] - began < TIMEOUT + 30
            if machines.spaces:
                plug(machines, folder)
            (folder / "repaired").touch()
        wait(ranks, 60)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def step_of(folder: Path, rank: int) -> int:
    try:
        return int((folder / f"at.{rank}").read_text().split()[1])
    except (FileNotFoundError, IndexError):
        return -1


def pull(machines: Machines, folder: Path) -> None:
    """Pull the cable; without one, stop rank 1, which is as silent."""
    if machines.spaces:
        machines.set_cable("down")
    else:
        os.kill(int((folder / "at.1").read_text().split()[0]), signal.SIGSTOP)


def plug(machines: Machines, folder: Path) -> None:
    if machines.spaces:
        machines.set_cable("up")
    else:
        os.kill(int((folder / "at.1").read_text().split()[0]), signal.SIGCONT)


def waited_for(what: Any, ranks: list[subprocess.Popen[str]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        for process in ranks:
            assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
