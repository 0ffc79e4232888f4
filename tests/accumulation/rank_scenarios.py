"""What the tests of accumulation run on several ranks: the same windows under every strategy, and where ranks differ.

python -m tests.accumulation.rank_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.accumulation.noise_scale import NoiseScaleAccumulation
from lightning_accel.durability.exact_resume import ExactResume
from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.zero import ZeROStrategy
from tests.accumulation.noisy import Noisy, noise_loader
from tests.accumulation.text import Batch, Text, adamw, by_tokens, joined, loader, make_batches, one_cycle, up_to
from tests.hooks.common import Tiny, make_trainer, samples, save_at
from tests.strategies.launch import serve

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": FullyShardStrategy,
    **{f"zero{stage}": partial(ZeROStrategy, stage=stage) for stage in (1, 2, 3)},
}
SENTENCES = make_batches([2, 1, 3, 1, 2, 4, 1, 3, 2, 2])  # the first two are what the ranks do first, and so on
IGNORED = make_batches([2, 1], lengths=[0, 0])


class Shard:
    """This rank's batches: every other one. It has no length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches[RANK::WORLD]

    def __iter__(self) -> Any:
        return iter(self.batches)


class SizedShard(Shard):
    def __len__(self) -> int:
        return len(self.batches)


class Steps(Callback):
    """The number of batches, from 1, that were done at each optimizer step."""

    def __init__(self) -> None:
        self.ends: list[int] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.ends.append(trainer.fit_loop.total_batch_idx + 1)


class Communication(Callback):
    """The number of the batch, from 0, at each all-reduce: of gradients, and of anything else."""

    def __init__(self) -> None:
        self.gradients: list[int] = []
        self.others: list[int] = []
        self._original = dist.all_reduce

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def reduce(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations as text
            self.gradients.append(trainer.fit_loop.total_batch_idx)
            work = self._original(bucket.buffer() / WORLD, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])  # type: ignore[union-attr]

        def other(*args: Any, **kwargs: Any) -> Any:
            self.others.append(trainer.fit_loop.total_batch_idx)
            return self._original(*args, **kwargs)

        trainer.model.register_comm_hook(None, reduce)  # type: ignore[union-attr, operator]
        self._patch = mock.patch.object(dist, "all_reduce", other)
        self._patch.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._patch.stop()


def whole(module: LightningModule) -> Tensor:
    """The weights, gathered and as one vector."""
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([part.detach().flatten().float() for part in parts])


def run(
    module: LightningModule, callback: Callback, data: Any, *others: Callback, strategy: str = "ddp", **options: Any
) -> dict[str, Any]:
    """One fit, and what it left: the weights, where steps were made, and what was said."""
    os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD))  # a finished fit removes them
    options = {"devices": WORLD, "strategy": STRATEGIES[strategy](), "use_distributed_sampler": False, **options}
    steps, path = Steps(), options.pop("ckpt_path", None)
    trainer = make_trainer(callback, steps, *others, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, data, ckpt_path=path)
    texts = [str(warning.message) for warning in said if warning.category is UserWarning]
    return {"weights": whole(module), "ends": steps.ends, "said": texts, "steps": trainer.global_step}


def text(callback: Callable[[], Callback], batches: list[Batch] | None = None, **options: Any) -> Callable[[Path], Any]:
    """A fit of the language model on this rank's sentences."""

    def scenario(folder: Path) -> Any:
        configure = options.get("configure")
        module = Text(configure) if configure else Text()
        rest = {key: value for key, value in options.items() if key != "configure"}
        return run(module, callback(), loader(Shard(batches or SENTENCES).batches), **rest)

    return scenario


def tiny(factor: Any, shard: type[Shard] = SizedShard, **options: Any) -> Callable[[Path], Any]:
    """A fit of the regression on this rank's five batches of four."""

    def scenario(folder: Path) -> Any:
        x, y = samples(10).tensors
        data, communication = shard([[x[n : n + 4], y[n : n + 4]] for n in range(0, 40, 4)]), Communication()
        found = run(Tiny(), GradientAccumulation(factor), data, communication, **options)
        return {**found, "reduced": communication.gradients, "others": communication.others}

    return scenario


def communication(callback: Callable[[], Callback]) -> Callable[[Path], Any]:
    """When ranks talk."""

    def scenario(folder: Path) -> Any:
        watch = Communication()
        found = run(Text(), callback(), loader(Shard(SENTENCES).batches), watch)
        return {**found, "reduced": watch.gradients, "others": watch.others}

    return scenario


def resumed(callback: Callable[[], Callback], strategy: str = "ddp") -> Callable[[Path], Any]:
    """A fit, and one that goes on from a checkpoint of it in mid-window."""

    def scenario(folder: Path) -> Any:
        path, data = folder / f"{strategy}.ckpt", loader(Shard(SENTENCES).batches)
        arguments: dict[str, Any] = {"strategy": strategy, "max_epochs": 2}
        save = save_at("on_train_batch_end", path, 1)
        first = run(Text(adamw), callback(), data, ExactResume(), save, **arguments)
        return {
            "whole": first,
            "resumed": run(Text(adamw), callback(), data, ExactResume(), ckpt_path=path, **arguments),
        }

    return scenario


def target(folder: Path) -> Any:
    """Two epochs on a loader that Lightning splits over the ranks, with a checkpoint after the first."""
    data = DataLoader(make_batches([1] * 12), batch_size=1, collate_fn=joined)  # type: ignore[arg-type]
    save = save_at("on_train_epoch_end", folder / "target.ckpt", 0)
    callback = GradientAccumulation(target_batch_size=6)
    return run(Text(one_cycle), callback, data, save, use_distributed_sampler=True, max_epochs=2)


def noise(strategy: str, min_factor: int, max_factor: int) -> Callable[[Path], Any]:
    """The noise scale that both ranks find, and the factor; and the same of a run that goes on inside a window."""

    def one(callbacks: list[Any], folder: Path, **options: Any) -> dict[str, Any]:
        growing = NoiseScaleAccumulation(min_factor, max_factor, every=4, scale_lr="sqrt")
        data = loader_of(list(noise_loader(NOISY_BATCHES, NOISY_SCALE)))
        found = run(Noisy(), growing, data, ExactResume(), *callbacks, strategy=strategy, **options)
        return {**found, "factor": growing.factor, "noise": growing.noise_scale, "measured": growing._measured}

    def scenario(folder: Path) -> Any:
        path = folder / f"noise {strategy} {min_factor}.ckpt"
        whole = one([save_at("on_train_batch_end", path, 20)], folder)
        return {"whole": whole, "resumed": one([], folder, ckpt_path=path)}

    return scenario


def loader_of(batches: list[Any]) -> DataLoader[Any]:
    """This rank's part of these batches, which ExactResume can go back into."""
    return DataLoader(Shard(batches).batches, batch_size=None)  # type: ignore[arg-type]


class Infinite(Text):
    """An infinite loss in one batch of rank 1."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("inf") if (RANK, batch_idx) == (1, 1) else 1.0)


def infinite(folder: Path) -> Any:
    return run(Infinite(), by_tokens(), loader(Shard(SENTENCES).batches))


NOISY_BATCHES, NOISY_SCALE = 78, 12.0
NOISE = {"ddp 1": ("ddp", 1, 8), "ddp 2": ("ddp", 3, 3), "ddp 3": ("ddp", 2, 16), "fsdp2": ("fsdp2", 3, 3)}
TINY: dict[str, dict[str, Any]] = {
    "constant": {"factor": 3},
    "schedule": {"factor": {0: 1, "0.5fit": 2}, "max_epochs": 2},
    "fraction of a time": {"factor": {"0.5fit": 3}, "max_time": {"seconds": 3600}},
    "unknown length": {"factor": 2, "shard": Shard},
}
CLIP = {"gradient_clip_val": 0.1}
# in the first window of two, one batch of one rank has nothing that counts; in the second, no batch of any rank
SOME = [*SENTENCES[:3], IGNORED[1], *IGNORED, *IGNORED, *SENTENCES[4:6]]
SCENARIOS: dict[str, Callable[[Path], Any]] = {
    **{name: tiny(**arguments) for name, arguments in TINY.items()},
    **{f"tokens {name}": text(by_tokens, strategy=name, max_epochs=2) for name in STRATEGIES},
    **{f"clipped {name}": text(by_tokens, strategy=name, **CLIP) for name in STRATEGIES},
    **{f"nothing {name}": text(partial(by_tokens, 2), SOME, strategy=name, configure=adamw) for name in STRATEGIES},
    **{f"target {name}": text(partial(up_to, 40), strategy=name) for name in ("ddp", "fsdp2", "zero2")},
    "factor of one": text(partial(by_tokens, 1)),
    "talk fixed": communication(by_tokens),
    "talk target": communication(partial(up_to, 40)),
    "resumed ddp": resumed(by_tokens),
    "resumed fsdp2": resumed(by_tokens, "fsdp2"),
    "resumed zero2": resumed(by_tokens, "zero2"),
    "resumed target": resumed(partial(up_to, 60)),
    "target": target,
    **{f"noise {name}": noise(*arguments) for name, arguments in NOISE.items()},
    "infinite": infinite,
}


if __name__ == "__main__":
    serve(SCENARIOS)
