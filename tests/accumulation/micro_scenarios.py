"""What the tests of MicroBatching run on two ranks.

python -m tests.accumulation.micro_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.accumulation.micro_batching import MicroBatching
from lightning_accel.durability.exact_resume import ExactResume
from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.zero import ZeROStrategy
from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy
from tests.accumulation.micro import WIDTH, Net, Shortage, Watch, samples
from tests.accumulation.text import Text, adamw, make_batches
from tests.hooks.common import make_trainer, save_at
from tests.strategies.launch import serve

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STRATEGIES: dict[str, Callable[..., Any]] = {
    "ddp": partial(DDPStrategy, process_group_backend="gloo"),
    "unused": partial(DDPStrategy, process_group_backend="gloo", find_unused_parameters=True),
    "fsdp2": FullyShardStrategy,
    "redundancy": partial(ZeroRedundancyStrategy, process_group_backend="gloo"),
    **{f"zero{stage}": partial(ZeROStrategy, stage=stage) for stage in (1, 2, 3)},
}
SIZES = {"even": ([8, 8, 8, 5], [8, 8, 8, 5]), "uneven": ([8, 5, 8, 3], [3, 8, 6, 7])}


def data(sizes: str = "even") -> DataLoader[Any]:
    """This rank's batches, of these numbers of samples; their samples are numbered within the rank."""
    own = SIZES[sizes][RANK]
    x, y = samples(sum(own), seed=RANK)
    return DataLoader(list(zip(x.split(own), y.split(own), strict=True)), batch_size=None)  # type: ignore[arg-type]


def fit(module: Any, *callbacks: Callback, loader: Any = None, strategy: str = "ddp", **options: Any) -> dict[str, Any]:
    """One fit, and what it left."""
    os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD))  # a finished fit removes them
    seed_everything(3 + RANK, verbose=False)
    options = {"devices": WORLD, "strategy": STRATEGIES[strategy](), "use_distributed_sampler": False, **options}
    path = options.pop("ckpt_path", None)
    trainer = make_trainer(*callbacks, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, data() if loader is None else loader, ckpt_path=path)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return {
        "weights": torch.cat([part.detach().flatten().float() for part in whole]),
        "buffers": {name: value.clone() for name, value in module.named_buffers()},
        "said": [str(warning.message) for warning in said if warning.category is UserWarning],
        "random": torch.rand(2),
        "gradients": sum(p.grad is not None for p in module.parameters()),
        **({} if not hasattr(module, "seen") else {"seen": sorted(module.seen["samples"])}),
    }


def watched(module: Any, callback: Callback | None, sizes: Any = None, **options: Any) -> dict[str, Any]:
    watch = Watch(sizes)
    others = options.pop("others", ())
    found = fit(module, *([] if callback is None else [callback]), *others, watch, **options)
    return {**found, "sizes": watch.sizes, "losses": watch.losses, "logged": watch.logged, "epoch": watch.epoch}


def short(shortage: dict[str, Any], ranks: tuple[int, ...] = (0, 1), **options: Any) -> Callable[[Path], Any]:
    """A run whose memory runs out, and one that is split in the same way from the start."""

    def scenario(folder: Path) -> Any:
        def make() -> MicroBatching:
            return MicroBatching("auto", **options.get("arguments", {}))

        fit_options = {name: value for name, value in options.items() if name not in ("arguments", "sizes")}
        fit_options["loader"] = data(options.get("sizes", "even"))
        own = Shortage(**shortage) if RANK in ranks else None
        found = watched(Net(own), make(), **fit_options)
        same = watched(Net(), make(), found["sizes"], **fit_options)
        return {"short": found, "same": same, "raised": 0 if own is None else own.raised}

    return scenario


class Odd(Net):
    """Parts of it are used on one rank, by some samples, or by nobody; it has running averages and an embedding."""

    def __init__(self, sparse: bool = False, used: str = "rank") -> None:
        super().__init__(dropout=0.0)
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.norm = nn.BatchNorm1d(WIDTH)
            self.embed = nn.Embedding(10, 6, sparse=sparse)
            self.mine, self.nobodys = nn.Linear(6, 6), nn.Linear(6, 6)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.norm(x))) + self.embed((x[:, 0].abs() * 3).long().clamp(max=9))
        if self.used == "rank" and RANK == 0:
            h = h + self.mine(h)
        return self.head(h)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Everything(Odd):
    """All of it is used everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.norm(x))) + self.embed((x[:, 0].abs() * 3).long().clamp(max=9))
        return self.head(h + self.mine(h) + self.nobodys(h))  # type: ignore[no-any-return]


def against_ddp(make: Callable[[], Any], strategy: str = "ddp", **options: Any) -> Callable[[Path], Any]:
    """Plain DDP, and MicroBatching whose memory never runs out; both with whole batches, and in micro-batches."""

    def scenario(folder: Path) -> Any:
        plain = watched(make(), None, strategy=strategy, **options)
        auto = watched(make(), MicroBatching("auto"), strategy=strategy, **options)
        fixed = watched(make(), MicroBatching(3), strategy=strategy, **options)
        small = watched(make(), MicroBatching("auto"), [3] * 12, strategy=strategy, **options)
        return {"plain": plain, "auto": auto, "fixed": fixed, "small": small}

    return scenario


class Synced(Net):
    """Logs values of all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        self.log("mean", outputs["loss"], on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
        return outputs


def synced(folder: Path) -> Any:
    """Ranks with unequal numbers of micro-batches, of which one is made again."""
    found = {}
    for name, callback in {"plain": None, "fixed": MicroBatching(3), "auto": MicroBatching("auto")}.items():
        shortage = Shortage(3) if name == "auto" and RANK == 1 else None
        module, means = Synced(shortage, dropout=0.0), Means()
        found[name] = watched(module, callback, others=[means], loader=data("uneven")) | {"means": means.found}
    return found


class Means(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["mean_step"]))

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["mean_epoch"]))


def raised(make: Callable[[], Any], callback: Callable[[], Callback], **options: Any) -> Callable[[Path], Any]:
    """The error that ends a run."""

    def scenario(folder: Path) -> Any:
        try:
            fit(make(), callback(), **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    return scenario


def strategy(name: str) -> Callable[[Path], Any]:
    """Micro-batches of unequal batches, alone and in windows, and whole batches under DDP."""

    def scenario(folder: Path) -> Any:
        options: dict[str, Any] = {"strategy": name, "loader": data("uneven"), "max_epochs": 2}
        return {
            "plain": watched(Net(dropout=0.0), None, **options | {"strategy": "ddp"}),
            "fixed": watched(Net(dropout=0.0), MicroBatching(3), **options),
            "window": watched(Net(dropout=0.0), MicroBatching(3), accumulate_grad_batches=2, **options),
            "plain window": watched(Net(dropout=0.0), None, accumulate_grad_batches=2, **options | {"strategy": "ddp"}),
        }

    return scenario


# the first rank's second batch has nothing that counts, and of the third batch a micro-batch has nothing
WORDS = make_batches([4, 4, 4, 4] if RANK == 0 else [4, 3, 5, 4], seed=RANK)
if RANK == 0:
    WORDS[1]["labels"].fill_(-100)
    WORDS[2]["labels"][:2] = -100


def by_tokens(strategy: str, size: int | str, window: int) -> Callable[[Path], Any]:
    """Micro-batches that weigh by tokens, alone or in windows that do too, against whole batches."""

    def scenario(folder: Path) -> Any:
        weigh: dict[str, Any] = {"weight_by": "tokens", "count_key": "labels"}
        windows = [GradientAccumulation(window, **weigh)] if window else []
        sizes = [Sizes(2)] if size == "auto" else []
        loader = DataLoader(WORDS, batch_size=None)  # type: ignore[arg-type]
        options: dict[str, Any] = {"loader": loader, "strategy": strategy}
        plain = fit(Text(adamw), *windows, **options)
        windows = [GradientAccumulation(window, **weigh)] if window else []
        return {"plain": plain, "split": fit(Text(adamw), MicroBatching(size, **weigh), *windows, *sizes, **options)}  # type: ignore[arg-type]

    return scenario


class Sizes(Callback):
    """Sets the size from the start."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        (own,) = (callback for callback in trainer.callbacks if isinstance(callback, MicroBatching))
        own._attempts.sizes.size = self.size  # type: ignore[union-attr]


def resumed(folder: Path) -> Any:
    """A run whose memory ran out, and one that goes on from the middle of its window."""
    path, options = folder / "micro.ckpt", {"accumulate_grad_batches": 3, "max_epochs": 2}

    def one(*others: Callback, **more: Any) -> dict[str, Any]:
        micro = MicroBatching("auto", grow_after=2)
        net = Net(Shortage(3, batches=(0, 3)) if RANK == 1 else None)
        return watched(net, micro, others=[ExactResume(), *others], **options, **more)

    whole = one(save_at("on_train_batch_end", path, 1))
    return {"whole": whole, "resumed": one(ckpt_path=path)}


def budget(folder: Path) -> Any:
    """Memory that is really counted, of which one rank has less."""
    own = MicroBatching("auto", memory_budget=100_000 if RANK == 0 else 700)
    found = watched(Net(), own, others=[])
    return {"short": found, "same": watched(Net(), MicroBatching("auto"), found["sizes"])}


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.SyncBatchNorm(6)


SHORT: dict[str, Callable[[Path], Any]] = {
    "one rank": short({"samples": 3}, ranks=(1,)),
    "both": short({"samples": 3}),
    "in the backward": short({"samples": 3, "backward": True}, ranks=(0,)),
    "the last backward": short({"samples": 2, "backward": True, "last": True}, ranks=(1,)),
    "in mid-window": short({"samples": 3, "batches": (1, 2)}, ranks=(1,), accumulate_grad_batches=3, max_epochs=2),
    "redundancy": short({"samples": 3}, ranks=(1,), strategy="redundancy", max_epochs=2),
    "uneven": short({"samples": 2}, ranks=(1,), sizes="uneven", max_epochs=2),
    "grows": short({"samples": 4}, ranks=(0,), arguments={"grow_after": 1}, max_epochs=3),
}
PLAIN: dict[str, Callable[[Path], Any]] = {
    "all used": against_ddp(Everything, max_epochs=2),
    "all used in windows": against_ddp(Everything, accumulate_grad_batches=3, max_epochs=2),
    "unused on one rank": against_ddp(Odd, "unused"),
    "sparse": against_ddp(partial(Odd, sparse=True), "unused"),
}
WINDOWS = [("ddp", 2, 0), ("ddp", "auto", 0), ("ddp", 2, 2), ("ddp", "auto", 2), ("fsdp2", 2, 2), ("zero2", 2, 2)]
SCENARIOS: dict[str, Callable[[Path], Any]] = {
    **SHORT,
    **PLAIN,
    "synced": synced,
    "budget": budget,
    "resumed": resumed,
    "a single sample": raised(lambda: Net(Shortage(0) if RANK == 1 else None), lambda: MicroBatching("auto")),
    "sync batch norm": raised(Normed, lambda: MicroBatching("auto")),
    "too few samples": raised(Net, lambda: MicroBatching(1), strategy="fsdp2", loader=data("uneven")),
    **{f"strategy {name}": strategy(name) for name in STRATEGIES if name != "unused"},
    **{f"tokens {strategy} {size} {window}": by_tokens(strategy, size, window) for strategy, size, window in WINDOWS},
}


if __name__ == "__main__":
    serve(SCENARIOS)
