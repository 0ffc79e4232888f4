"""Two processes: gradients are reduced once a window, and the replicas stay equal. All cases share one launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_accel import GradientAccumulation
from tests.conftest import REPO
from tests.hooks.common import Tiny, fit, samples


class Shard:
    """A rank's five batches: every other one of ten. It has no length."""

    def __init__(self, rank: int) -> None:
        x, y = samples(10).tensors
        self.batches = [[x[n : n + 4], y[n : n + 4]] for n in range(4 * rank, 40, 8)]

    def __iter__(self) -> Any:
        return iter(self.batches)


class SizedShard(Shard):
    def __len__(self) -> int:
        return len(self.batches)


CASES: dict[str, dict[str, Any]] = {
    "constant": {"factor": 3},
    "schedule": {"factor": {0: 1, "0.5fit": 2}, "max_epochs": 2},
    "fraction of a time": {"factor": {"0.5fit": 3}, "max_time": {"seconds": 3600}},
    "unknown length": {"factor": 2, "shard": Shard},
}
WINDOWS = {
    "constant": [3, 2],
    "schedule": [1, 1, 1, 1, 1, 2, 2, 1],
    "fraction of a time": [1, 1, 1, 2],
    "unknown length": [2, 2, 1],
}


class CountReductions(Callback):
    """The number of the batch, from 0, at each all-reduce of gradients."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def reduce(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations as text
            self.batches.append(trainer.fit_loop.total_batch_idx)
            work = dist.all_reduce(bucket.buffer() / 2, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])  # type: ignore[union-attr]

        trainer.model.register_comm_hook(None, reduce)  # type: ignore[union-attr, operator]


def worker(out: Path) -> None:
    """What each rank runs."""
    report: dict[str, Any] = {}
    rank = int(os.environ.get("LOCAL_RANK", 0))
    for name, case in CASES.items():
        options = {"shard": SizedShard, **case}
        module, count = Tiny(), CountReductions()
        callbacks = [GradientAccumulation(options.pop("factor")), count]
        options |= {"data": options.pop("shard")(rank), "strategy": DDPStrategy(process_group_backend="gloo")}
        trainer = fit(module, *callbacks, devices=2, use_distributed_sampler=False, **options)
        weights = [torch.zeros_like(module.layer.weight) for _ in range(2)]
        dist.all_gather(weights, module.layer.weight.detach())
        report[name] = {
            "reduced": count.batches,
            "steps": trainer.global_step,
            "equal": torch.equal(*weights),
            "weight": module.layer.weight.tolist(),
        }
    if rank == 0:
        out.write_text(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("distributed") / "report.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(out)], cwd=REPO, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize("name", CASES)
def test_one_reduction_a_window_and_the_gradient_of_the_global_batch(name: str, report: dict[str, Any]) -> None:
    windows, found = WINDOWS[name], report[name]
    assert found["equal"]
    assert found["steps"] == len(windows)
    assert found["reduced"] == [sum(windows[: number + 1]) - 1 for number in range(len(windows))]
    # by hand: plain steps on the global batches, of two micro-batches a rank each
    reference, (x, y), begin = Tiny(), samples(10).tensors, 0
    for length in windows:
        part = slice(begin, begin + 8 * length)
        reference.zero_grad()
        ((reference.layer(x[part]) - y[part]) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
        begin = (begin + 8 * length) % 40
    torch.testing.assert_close(torch.tensor(found["weight"]), reference.layer.weight.detach(), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
