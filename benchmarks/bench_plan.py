"""`lightning-accel plan` against what the C allocator hands out on two ranks; its own time and memory at 7B and 70B.

python benchmarks/bench_plan.py [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _timing import environment  # first: it sets the threads before torch is imported

# isort: split
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from examples.language_model.model import GPT  # noqa: E402  # a folder beside this one
from lightning_accel import FullyShardStrategy, ZeROStrategy  # noqa: E402
from lightning_accel.report.sizes import tensor_bytes  # noqa: E402
from lightning_accel.tuning.fake import run_fake_step  # noqa: E402
from lightning_accel.tuning.memory import Settings, Usage, memory_usage  # noqa: E402
from lightning_accel.tuning.plan import measure_model  # noqa: E402

BUCKET = 2**16  # elements, so that buckets are next to nothing and the states can be told from them
BLOCKS = ["Block", "Stage"]
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "accel_zero1": lambda: ZeROStrategy(stage=1, communication=buckets()),
    "accel_zero2": lambda: ZeROStrategy(stage=2, communication=buckets()),
    "accel_zero3": lambda: ZeROStrategy(stage=3, communication=buckets()),
    "accel_fsdp2": lambda: FullyShardStrategy(blocks=BLOCKS),
}
LARGE = {"7B": (4096, 32, 32), "70B": (8192, 86, 64)}  # width, depth, heads


def buckets() -> Any:
    return {"reduce_bucket": BUCKET, "allgather_bucket": BUCKET}


class Plain(LightningModule):
    """What the models below share."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad])


class Stage(nn.Module):
    """Two convolutions with BatchNorm and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.two(torch.relu(self.norm1(self.one(x))))))


class ConvNet(Plain):
    """A residual network on images of 16x16."""

    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.stages = nn.Sequential(*(Stage(width) for _ in range(depth)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(nn.functional.max_pool2d(self.stages(self.stem(x)), 2).mean((2, 3)))
        return y


class Tied(Plain):
    """A frozen encoder, and a decoder whose last layer is the transposed embedding."""

    def __init__(self, width: int = 768, words: int = 4096) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.encoder = nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).requires_grad_(False)
        self.decoder = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.GELU())))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        y: Tensor = self.head(self.decoder(self.encoder(self.embedding(words))))
        return y


MODELS: dict[str, tuple[Callable[[], LightningModule], Callable[[], tuple[Tensor, Tensor]]]] = {
    "GPT": (lambda: GPT(1024, 128, 384, 4, 4), lambda: (words(1024, 4, 128), words(1024, 4, 128))),
    "convolutions, BatchNorm": (ConvNet, lambda: (torch.randn(16, 3, 16, 16), torch.randn(16, 3))),
    "tied and frozen": (Tied, lambda: (words(4096, 512), torch.randn(512, 4096))),
}


def words(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape)


# --------------------------------------------------------------------------------------------------- what a rank has


class _Malloc(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


_mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
_mallinfo.restype = _Malloc


def allocated() -> int:
    """Bytes that the C library has handed out to this process."""
    found = _mallinfo()
    return int(found.hblkhd + found.uordblks)


class Most(TorchDispatchMode):
    """Looks after every operation."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, allocated())
        return out


class Look(Callback):
    """What there is at each moment of the last step."""

    def __init__(self) -> None:
        self.states = self.activations = 0
        self.most, self._start = Most(), 0

    def on_train_start(self, *_: Any) -> None:
        self.most.__enter__()

    def on_train_end(self, *_: Any) -> None:
        self.most.__exit__(None, None, None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.most.bytes = 0
        self._start = allocated() - gradients(pl_module) - gathered(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.activations = allocated() - gradients(pl_module) - gathered(pl_module) - self._start

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.states = allocated()


def gradients(module: LightningModule) -> int:
    """Bytes of gradients where the strategy leaves them with the parameters; DDP's stay in its buckets."""
    if isinstance(module.trainer.strategy, DDPStrategy) and not isinstance(module.trainer.strategy, FullyShardStrategy):
        return 0
    found = (parameter.grad for parameter in module.parameters() if parameter.grad is not None)
    return tensor_bytes(grad.to_local() if isinstance(grad, DTensor) else grad for grad in found)


def gathered(module: LightningModule) -> int:
    """Bytes of parameters that are whole at the moment, which the plan has among what works."""
    return tensor_bytes(parameter for parameter in module.parameters() if not isinstance(parameter, DTensor))


def measured(strategy: str, make: Callable[[], LightningModule], batch: tuple[Tensor, Tensor]) -> dict[str, int]:
    """Bytes of this rank in the third step, above what there was before the module was made."""
    os.environ.update(WORLD_SIZE=os.environ["RANKS"], RANK=os.environ["OWN"], LOCAL_RANK=os.environ["OWN"])
    loader = DataLoader(TensorDataset(*(torch.cat([part] * 6) for part in batch)), len(batch[0]))
    look = Look()
    for _ in range(3):
        gc.collect()
    before = allocated()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy](),
        max_steps=3,
        callbacks=[look],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(make(), loader)
    size = sum(part.numel() * part.element_size() for part in batch)
    return {
        "states": look.states - before - size,
        "activations": look.activations,
        "most": look.most.bytes - before,
    }


def planned(strategy: str, make: Callable[[], LightningModule], batch: tuple[Tensor, Tensor]) -> Usage:
    mode = FakeTensorMode()
    with torch.device("meta"):
        module = make()
    step = run_fake_step(module, batch=[part.to("meta") for part in batch], mode=mode)
    assert not step.failure, step.failure
    model = measure_model(module, step, mode, blocks=BLOCKS)
    return memory_usage(strategy, model, 2, Settings(bucket=BUCKET, bucket_view=True))  # type: ignore[arg-type]


def rank_main(out: Path, names: list[str]) -> None:
    """What each rank runs; rank 0 writes what it found."""
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    os.environ.update(RANKS=os.environ["WORLD_SIZE"], OWN=os.environ["RANK"])
    found: dict[str, dict[str, Any]] = {}
    for strategy in STRATEGIES:  # what is made once in a process
        measured(strategy, lambda: GPT(8, 8, 8, 1, 2), (words(8, 2, 8), words(8, 2, 8)))
    for name in names:
        make, draw = MODELS[name]
        for strategy in STRATEGIES:
            plan, real = planned(strategy, make, draw()), measured(strategy, make, draw())
            size = sum(part.numel() * part.element_size() for part in draw())
            found[f"{name}|{strategy}"] = {
                "states": (real["states"], plan.parameters + plan.gradients + plan.state + plan.master + plan.buffers),
                "activations": (real["activations"], plan.activations - size),  # the batch was there before
                "most": (real["most"], plan.total),
            }
    if os.environ["OWN"] == "0":
        out.write_text(json.dumps(found))


def measure_ranks(names: list[str]) -> dict[str, dict[str, tuple[int, int]]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        # every tensor gets pages of its own, which are gone with it
        common = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        with Path(folder, "log").open("w+") as log:
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "--rank-of", str(out), *names],
                    env={
                        **os.environ,
                        **common,
                        "MASTER_PORT": port,
                        "WORLD_SIZE": "2",
                        "RANK": rank,
                        "LOCAL_RANK": rank,
                    },
                    stdout=log,
                    stderr=log,
                )
                for rank in "01"
            ]
            try:
                if any([rank.wait(timeout=600) for rank in ranks]):
                    raise RuntimeError(f"A rank failed:\n{Path(folder, 'log').read_text()[-3000:]}")
            finally:
                for rank in ranks:
                    rank.kill()
        found: dict[str, dict[str, tuple[int, int]]] = json.loads(out.read_text())
        return found


def plan_large(size: str) -> tuple[float, float, float]:
    """CPU seconds, seconds, and peak MiB of the command at that size."""
    width, depth, heads = LARGE[size]
    arguments = {"vocabulary": 32000, "length": 2048, "width": width, "depth": depth, "heads": heads}
    code = (
        "import resource, sys; from lightning_accel.cli.main import main; status = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    command = [sys.executable, "-c", code, "plan", "--config", "examples/language_model/plain.yaml", "--devices", "64"]
    command += ["--device-memory", "80GiB", *["--input", "1x2048:int64"] * 2, "--"]
    command += [f"--model.init_args.{name}={value}" for name, value in arguments.items()]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, seconds, float(done.stdout.split()[-1])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, to see that it runs")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_main(options.rank_of, options.names)
        return
    print(environment() + "\n")
    found = measure_ranks(list(MODELS)[: 1 if options.quick else None])
    print("| model | strategy | states, MB | plan | activations, MB | plan | most, MB | plan |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    worst = dict.fromkeys(("states", "activations"), 0.0)
    for row, kinds in found.items():
        cells = [f"{real / 1e6:.2f} | {plan / real - 1:+.1%}" for real, plan in kinds.values()]
        print(f"| {row.replace('|', ' | ')} | {' | '.join(cells)} |")
        worst = {kind: max(off, abs(kinds[kind][1] / kinds[kind][0] - 1)) for kind, off in worst.items()}
    print("\nMost off: " + ", ".join(f"{kind} {off:.1%}" for kind, off in worst.items()) + ".\n")
    if not options.quick:
        print("| parameters | CPU seconds | seconds | peak MiB |\n| --- | ---: | ---: | ---: |")
        for size in LARGE:
            used, seconds, peak = plan_large(size)
            print(f"| {size} | {used:.1f} | {seconds:.1f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
