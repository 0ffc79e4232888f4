"""What the tests of FullyShardStrategy run on two ranks: the same fit under DDP and under it, checkpoints, resumes.

python -m tests.strategies.fully_shard_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.augment.label_smoothing import LabelSmoothing
from lightning_accel.durability.exact_resume import ExactResume
from lightning_accel.errors import NoEffectWarning
from lightning_accel.optimizers.fused import FusedOptimizer
from lightning_accel.optimizers.low_bit import LowBitOptimizer
from lightning_accel.pruning.gradual import GradualPruning
from lightning_accel.report.sizes import tensor_bytes
from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.sharded_state import shard_state_dict
from tests.strategies.launch import serve

BATCHES = 7  # an odd number: the last window of two is short
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Block(nn.Module):
    """A residual layer, as a transformer has them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Net(LightningModule):
    """A stem, three blocks and a head, that the step calls one by one: its own forward never runs in training.

    Args:
        optimizer: ``"sgd"``, ``"adamw"``, ``"adam fused"``, ``"adamw foreach"``, ``"adafactor"`` ...
        scheduler: A name of a scheduler, or nothing.
        extra: ``"batchnorm"``, ``"tied"``, ``"tied blocks"``, ``"frozen"``, ``"temperature"`` or nothing.
    """

    def __init__(self, optimizer: str = "adamw", scheduler: str = "", extra: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.BatchNorm1d(16) if extra == "batchnorm" else nn.Identity()
        self.head = nn.Linear(16, 8)
        self.temperature = nn.Parameter(torch.tensor(1.5)) if extra == "temperature" else 1.0
        if extra == "tied":
            self.head.weight = nn.Parameter(self.stem.weight.detach().clone().t().contiguous())
            self.again = nn.Linear(16, 8)
            self.again.weight = self.head.weight
        if extra == "tied blocks":
            self.blocks[2].inner[0].weight = self.blocks[0].inner[0].weight
        if extra == "frozen":
            for layer in (self.stem, self.blocks[0].inner[0], self.blocks[1]):
                layer.requires_grad_(False)
        self.losses: list[float] = []
        self.evaluated: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y = self.head(self.norm(x)) * self.temperature
        return y + self.again(x) if self.hparams["extra"] == "tied" else y

    def compute_loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden)) * self.temperature
        if self.hparams["extra"] == "tied":
            logits = logits + self.again(hidden)
        return F.cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.compute_loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.evaluated.append(loss.item())
        self.log("val_loss", loss, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        name, _, kind = self.hparams["optimizer"].partition(" ")
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.1}]
        classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            "adamw": partial(torch.optim.AdamW, lr=3e-3),
            "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
            "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
            "nadam": partial(torch.optim.NAdam, lr=3e-3),
            "adafactor": partial(torch.optim.Adafactor, lr=3e-3),
            "adadelta": torch.optim.Adadelta,
            "radam": torch.optim.RAdam,
            "adamax": torch.optim.Adamax,
        }
        optimizer = classes[name](groups, **({kind: True} if kind else {}))
        scheduler = self.hparams["scheduler"]
        if not scheduler:
            return optimizer
        if scheduler == "LambdaLR":
            return [optimizer], [{"scheduler": lr_scheduler.LambdaLR(optimizer, _decay), "interval": "step"}]
        if scheduler == "OneCycleLR":
            steps = int(self.trainer.estimated_stepping_batches)
            one = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.01, 0.02], total_steps=steps)
            return [optimizer], [{"scheduler": one, "interval": "step"}]
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def _decay(step: int) -> float:
    return 1 / (1 + step)


class Gan(LightningModule):
    """Two optimizers, toggled, with layers outside of all blocks; or clipped and accumulated by hand."""

    def __init__(self, toggled: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggled = toggled
        self.generator = nn.Sequential(nn.Linear(8, 16), Block(), nn.Linear(16, 8))
        self.critic = nn.Sequential(nn.Linear(8, 16), Block(), nn.Linear(16, 1))
        self.losses: list[float] = []
        self.evaluated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        first, second = self.optimizers()  # type: ignore[misc]
        if self.toggled:
            self.toggle_optimizer(first)
        loss = F.softplus(-self.critic(self.generator(x))).mean()
        self.manual_backward(loss)
        self.clip_gradients(first, 0.1, "norm")
        first.step()
        first.zero_grad()
        if self.toggled:
            self.untoggle_optimizer(first)
            self.toggle_optimizer(second)
        self.losses.append(loss.item())
        fake = self.generator(x).detach()
        loss = F.softplus(self.critic(fake)).mean()
        self.manual_backward(loss)
        real = F.softplus(-self.critic(x)).mean()
        self.manual_backward(real)
        self.losses.append((loss + real).item())
        if batch_idx % 2:
            second.step()
            second.zero_grad()
        if self.toggled:
            self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.AdamW(self.generator.parameters(), lr=3e-3),
            torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.9),
        )


def data(count: int = 2 * 4 * BATCHES, workers: int = 0, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 8, generator=generator)
    samples = TensorDataset(x, x.argmax(1))
    sampler = DistributedSampler(samples, WORLD, RANK, shuffle=shuffle)
    return DataLoader(samples, 4 * 2 // WORLD, sampler=sampler, num_workers=workers)


def make_trainer(strategy: Any, callbacks: Sequence[Callback] = (), **arguments: Any) -> Trainer:
    os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD))  # a finished fit removes them
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": WORLD,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("ModelCheckpoint" in type(item).__name__ for item in callbacks),
        "num_sanity_val_steps": 1,
        "use_distributed_sampler": False,
        "barebones": False,
    }
    return Trainer(strategy=strategy, callbacks=list(callbacks), **{**settings, **arguments})


def shards(**arguments: Any) -> FullyShardStrategy:
    """The strategy with each block of the toy on its own."""
    return FullyShardStrategy(**{"blocks": ["Block"], **arguments})


def weights(module: LightningModule) -> dict[str, Tensor]:
    """Whole and plain."""
    state = module.state_dict()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).float().clone()
        for name, value in state.items()
    }


def fit(
    strategy: Any,
    module: Callable[[], Any] = Net,
    callbacks: Callable[[], Sequence[Callback]] = tuple,
    ckpt_path: Path | None = None,
    seed: int = 1,
    **arguments: Any,
) -> tuple[Trainer, Any, dict[str, Any]]:
    """One fit from a seed, and what it gave."""
    torch.manual_seed(seed)
    made = module()
    trainer = make_trainer(strategy, callbacks(), **arguments)
    trainer.fit(made, data(), data(16), ckpt_path=ckpt_path)
    return trainer, made, results(made)


def results(module: Any) -> dict[str, Any]:
    """What a fit gave."""
    return {
        "losses": module.losses,
        "evaluated": module.evaluated,
        "weights": weights(module),
        "steps": module.trainer.global_step,
        "rates": [group["lr"] for optimizer in module.trainer.optimizers for group in optimizer.param_groups],
    }


_under_ddp: dict[str, dict[str, Any]] = {}


def both(strategy: Callable[[], Any] = shards, ddp: str = "ddp", **arguments: Any) -> dict[str, Any]:
    """The fit under DDP and under the strategy."""
    key = repr((ddp, sorted(arguments.items())))  # several scenarios have the same
    if key not in _under_ddp:
        _under_ddp[key] = fit(ddp, **arguments)[2]
    return {"ddp": _under_ddp[key], "sharded": fit(strategy(), **arguments)[2]}


gan = partial(both, ddp="ddp_find_unused_parameters_true", module=Gan)


def inference_mode() -> dict[str, Any]:
    """Validate before training, under inference mode as everywhere except under gloo."""
    torch.manual_seed(1)
    module = Net()
    with mock.patch("lightning.pytorch.loops.utilities._distributed_is_initialized", return_value=False):
        make_trainer(shards()).validate(module, data(16), verbose=False)
        make_trainer(shards()).fit(module, data(), data(16))
    torch.manual_seed(1)
    plain = Net()
    make_trainer("ddp").validate(plain, data(16), verbose=False)
    make_trainer("ddp").fit(plain, data(), data(16))
    return {name: results(made) for name, made in (("ddp", plain), ("sharded", module))}


SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "sgd": partial(both, module=partial(Net, "sgd")),
    "adamw": both,
    "accumulated": partial(both, module=partial(Net, "sgd"), accumulate_grad_batches=2),
    "clipped by norm": partial(both, module=partial(Net, "sgd"), gradient_clip_val=0.05),
    "clipped by value": partial(
        both, module=partial(Net, "sgd"), gradient_clip_val=0.01, gradient_clip_algorithm="value"
    ),
    "LambdaLR": partial(both, module=partial(Net, "sgd", "LambdaLR")),
    "OneCycleLR": partial(both, module=partial(Net, "adamw", "OneCycleLR")),
    "ReduceLROnPlateau": partial(both, module=partial(Net, "sgd", "ReduceLROnPlateau")),
    "bf16-mixed": partial(both, precision="bf16-mixed"),
    "bf16-true": partial(both, precision="bf16-true"),
    "batch norm": partial(both, module=partial(Net, extra="batchnorm")),
    "tied": partial(both, module=partial(Net, extra="tied")),
    "tied blocks": partial(both, module=partial(Net, extra="tied blocks")),
    "frozen": partial(both, module=partial(Net, extra="frozen")),
    "scalar": partial(both, module=partial(Net, extra="temperature"), gradient_clip_val=0.05),
    "scalar accumulated": partial(both, module=partial(Net, extra="temperature"), accumulate_grad_batches=2),
    "other seeds": partial(both, module=partial(Net, extra="batchnorm"), seed=1 + RANK),
    "inference mode": inference_mode,
    "no blocks": partial(both, partial(FullyShardStrategy, blocks=10**9)),
    "kept after forward": partial(both, partial(shards, reshard_after_forward=False)),
    "offload": partial(both, partial(shards, offload=True), gradient_clip_val=0.05),
    "replicas": partial(both, partial(shards, replicas=2)),
    "gan": gan,
    "gan without toggling": partial(gan, module=partial(Gan, toggled=False)),
    "gan without blocks": partial(gan, partial(FullyShardStrategy, blocks=10**9)),
    **{
        name: partial(both, module=partial(Net, name), limit_train_batches=3, max_epochs=1)
        for name in ("adagrad", "rmsprop", "nadam", "radam", "adamax", "adadelta", "adamw foreach", "adamw fused")
    },
    "param_dtype": partial(both, partial(shards, param_dtype="bfloat16"), precision="bf16-mixed"),
    "reduce_dtype": partial(both, partial(shards, reduce_dtype="bfloat16"), accumulate_grad_batches=2),
    "adamw foreach": partial(both, module=partial(Net, "adamw foreach")),
    "adamw fused": partial(both, module=partial(Net, "adamw fused")),
}


# ------------------------------------------------------------------------------------------------------ checkpoints


def optimizer_state(trainer: Trainer) -> list[Any]:
    """Of every optimizer, whole and plain, by parameter number."""
    return [
        {
            index: {
                name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in entries.items()
            }
            for index, entries in optimizer.state_dict()["state"].items()
        }
        for optimizer in trainer.optimizers
    ]


class SaveAt(Callback):
    """Saves after a number of batches; after 0 at the end of the first epoch."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.batches == 0 == trainer.current_epoch:
            trainer.save_checkpoint(self.path)


def resumed(
    folder: Path,
    name: str,
    strategy: Callable[[], Any] = shards,
    again: Callable[[], Any] | None = None,
    methods: Callable[[], list[Callback]] = lambda: [ExactResume()],
    at: int = 4,
    **arguments: Any,
) -> dict[str, Any]:
    """A fit that saves on its way, and one that goes on from there with other weights and random numbers."""
    path = folder / name
    trainer, _, plain = fit(strategy(), callbacks=lambda: [*methods(), SaveAt(path, at)], **arguments)
    states = optimizer_state(trainer)
    trainer, _, result = fit((again or strategy)(), callbacks=methods, ckpt_path=path, seed=77, **arguments)
    return {"plain": plain, "resumed": result, "states": [states, optimizer_state(trainer)], "at": at}


one_file = partial(shards, save_distributed_checkpoint=False)


def elsewhere(folder: Path, name: str) -> dict[str, Any]:
    """Go on, on another number of ranks, from what :func:`resumed` saved; the whole batch is the same."""
    return fit(shards(), ckpt_path=folder / name, seed=78, module=partial(Net, "adamw", "LambdaLR"))[2]


def evaluated(folder: Path) -> dict[str, Any]:
    """Evaluate a module from its checkpoint, with one that was made anew and with the same Trainer."""
    path = folder / "evaluated"
    trainer, module, result = fit(shards(), callbacks=lambda: [SaveAt(path, 2 * BATCHES)])
    same = [trainer.validate(module, data(16), verbose=False)[0]["val_loss"]]
    same.append(trainer.test(module, data(16), ckpt_path=path, verbose=False)[0]["val_loss"])
    torch.manual_seed(55)
    other = Net()
    trainer = make_trainer(shards())
    same.append(trainer.validate(other, data(16), ckpt_path=path, verbose=False)[0]["val_loss"])
    trainer = make_trainer(shards(blocks=["Block", "stem"]))
    same.append(trainer.test(Net(), data(16), ckpt_path=path, verbose=False)[0]["val_loss"])
    predicted = [
        torch.cat(make_trainer(strategy).predict(fresh, data(16), ckpt_path=where))  # type: ignore[arg-type]
        for strategy, fresh, where in ((shards(), Net(), path), (shards(), module, None))
    ]
    return {"same": same, "predicted": predicted, "weights": weights(other), "trained": result["weights"]}


def checkpoints(folder: Path) -> dict[str, Any]:
    """What a ModelCheckpoint leaves on the disk."""
    saving = ModelCheckpoint(folder / "top", save_top_k=2, monitor="val_loss", mode="min", every_n_train_steps=2)
    fit(shards(), callbacks=lambda: [saving], val_check_interval=2)
    left = sorted(path.name for path in (folder / "top").iterdir())
    best = Net()
    make_trainer(shards()).validate(best, data(16), ckpt_path=saving.best_model_path, verbose=False)
    return {"left": left, "kept": sorted(Path(path).name for path in saving.best_k_models), "best": best.evaluated}


def second_fit(folder: Path) -> dict[str, Any]:
    """The same module again, in a second Trainer; and a fit after one that an exception ended in the middle."""
    _, module, _ = fit(shards(), max_epochs=1)
    trainer = make_trainer(shards())
    trainer.fit(module, data(), data(16))
    _, ddp, _ = fit("ddp", max_epochs=1)
    make_trainer("ddp").fit(ddp, data(), data(16))
    return {"sharded": [module.losses, weights(module)], "ddp": [ddp.losses, weights(ddp)]}


class Stops(Callback):
    """Raises in the middle of a forward, in the second batch of a window."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.handle = pl_module.blocks[1].norm.register_forward_hook(self.stop)

    def stop(self, *_: Any) -> None:
        self.handle.remove()
        raise ValueError("stopped")


def after_an_exception(folder: Path) -> dict[str, Any]:
    """A fit of a module in which another one stopped, from the weights that it began with."""
    torch.manual_seed(1)
    module = Net("sgd")
    before = weights(module)
    with contextlib.suppress(ValueError):
        make_trainer(shards(), [Stops()], accumulate_grad_batches=2).fit(module, data(), data(16))
    module.load_state_dict(shard_state_dict(before, module))
    module.losses.clear()
    make_trainer(shards(), accumulate_grad_batches=2).fit(module, data(), data(16))
    plain = fit("ddp", module=partial(Net, "sgd"), accumulate_grad_batches=2)[2]
    return {"ddp": plain["losses"], "sharded": module.losses}


def uneven(folder: Path) -> dict[str, Any]:
    """Predict what does not divide by the ranks: 13 samples, so that rank 0 has a batch more."""
    torch.manual_seed(1)
    module, x = Net(), torch.randn(13, 8)
    trainer = make_trainer(shards(), use_distributed_sampler=True)
    batches = trainer.predict(module, DataLoader(TensorDataset(x), 2))
    assert batches is not None
    torch.manual_seed(1)
    expected = Net()(x[RANK::WORLD]).detach()
    return {"batches": len(batches), "difference": (torch.cat(batches) - expected).abs().max()}  # type: ignore[arg-type]


CHECKPOINTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "in an epoch": partial(resumed, name="in_an_epoch", module=partial(Net, "adamw", "LambdaLR")),
    "between epochs": partial(
        resumed, name="between_epochs", module=partial(Net, "adamw", "LambdaLR"), methods=list, at=0
    ),
    "in a window": partial(resumed, name="in_a_window", module=partial(Net, "sgd"), at=3, accumulate_grad_batches=2),
    "in a window of ours": partial(
        resumed,
        name="in_a_window_of_ours",
        at=9,
        methods=lambda: [ExactResume(), GradientAccumulation({0: 2, 1: 3})],
    ),
    "scalar in a window": partial(
        resumed, name="scalar", module=partial(Net, extra="temperature"), at=3, accumulate_grad_batches=2
    ),
    "bf16 in a window": partial(
        resumed,
        name="bf16",
        strategy=partial(shards, param_dtype="bfloat16", reduce_dtype="float32"),
        at=3,
        accumulate_grad_batches=2,
        precision="bf16-mixed",
    ),
    "gan in a window": partial(resumed, name="gan", module=Gan, at=3),
    "batch norm in an epoch": partial(resumed, name="batch_norm", module=partial(Net, extra="batchnorm")),
    "one file": partial(resumed, name="one.ckpt", strategy=one_file),
    "from ddp": partial(resumed, name="ddp.ckpt", strategy=lambda: "ddp", again=shards),
    "to ddp": partial(resumed, name="to_ddp.ckpt", strategy=one_file, again=lambda: "ddp"),
    "evaluated": evaluated,
    "checkpoints": checkpoints,
    "second fit": second_fit,
    "uneven": uneven,
    "after an exception": after_an_exception,
}


# ------------------------------------------------------------------------------------------------------------ errors


def message(function: Callable[[], Any]) -> str:
    """Of the error that it must raise, with its type."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


class Meta(Net):
    """Built on the meta device."""

    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__()


class Sharded(Net):
    """Shards itself, as Lightning's ModelParallelStrategy asks for."""

    def configure_model(self) -> None:
        fully_shard(self.stem, mesh=init_device_mesh("cpu", (WORLD,)))


class TwoDtypes(Net):
    """One layer is in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.head.double()


class ByRank(Net):
    """Another module on another rank."""

    def __init__(self) -> None:
        super().__init__()
        if RANK:
            self.head = nn.Linear(16, 9)


def errors(folder: Path) -> dict[str, str]:
    """What is refused, on every rank."""
    path = folder / "to_be_damaged"
    fit(shards(), callbacks=lambda: [SaveAt(path, 2)], max_epochs=1)
    trainer, _, _ = fit(shards(), max_epochs=1)
    trainer.save_checkpoint(folder / "weights_only", weights_only=True)
    blocked = folder / "a_file"
    blocked.write_text("in the way")
    found = {
        "no room": message(lambda: trainer.save_checkpoint(blocked / "checkpoint")),
        "weights only": message(lambda: fit(shards(), ckpt_path=folder / "weights_only")),
        "other module": message(lambda: fit(shards(), module=Gan, ckpt_path=path)),
        "not a checkpoint": message(lambda: fit(shards(), ckpt_path=folder)),
        "different": message(lambda: fit(shards(), module=ByRank)),
        "meta": message(lambda: fit(shards(), module=Meta)),
        "sharded": message(lambda: fit(shards(), module=Sharded)),
        "dtypes": message(lambda: fit(shards(), module=TwoDtypes)),
        "adafactor": message(lambda: fit(shards(), module=partial(Net, "adafactor"))),
        "replicas": message(lambda: fit(shards(replicas=3))),
        "param_dtype": message(lambda: fit(shards(param_dtype="bfloat16"))),
        "LowBitOptimizer": message(lambda: fit(shards(), callbacks=lambda: [LowBitOptimizer()])),
        "GradualPruning": message(lambda: fit(shards(), callbacks=lambda: [GradualPruning()])),
    }
    if RANK == 0:
        file = max(path.glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    trainer.strategy.barrier()
    found["changed"] = message(lambda: fit(shards(), ckpt_path=path))
    trainer.strategy.barrier()
    if RANK == 0:
        file.write_bytes(content[:100])
    trainer.strategy.barrier()
    found["truncated"] = message(lambda: fit(shards(), ckpt_path=path))
    return found


def effects(folder: Path) -> dict[str, Any]:
    """Warnings of what has no effect, and what a whole stack of methods gives."""
    caught: dict[str, Any] = {}
    for name, blocks in {"auto": "auto", "unknown": ["Block", "Missing"], "tied": ["Block"]}.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            module = partial(Net, extra="tied blocks") if name == "tied" else Net
            fit(FullyShardStrategy(blocks=blocks), module=module, max_steps=1)
        caught[name] = [str(item.message) for item in seen if issubclass(item.category, NoEffectWarning)]
    _, module, _ = fit(shards(), max_steps=1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make_trainer(shards(offload=True), max_steps=1).fit(module, data())
    caught["again"] = [str(item.message) for item in seen if "earlier Trainer" in str(item.message)]
    return caught


def methods(folder: Path) -> dict[str, Any]:
    """LabelSmoothing, GradientAccumulation and FusedOptimizer beside DDP."""

    def stack() -> list[Callback]:
        return [LabelSmoothing(0.1), GradientAccumulation({0: 2, 1: 3}), FusedOptimizer()]

    return both(callbacks=stack)


class Held(Callback):
    """Bytes that this rank holds when the optimizer steps, and after it."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.bytes["gradients"] = _local_bytes(parameter.grad for parameter in pl_module.parameters())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.bytes["parameters"] = _local_bytes(pl_module.parameters())
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self.bytes["optimizer"] = _local_bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))


def _local_bytes(tensors: Any) -> int:
    return tensor_bytes(tensor.to_local() for tensor in tensors)  # gradients reduced together share their memory


def held(folder: Path) -> dict[str, Any]:
    """What a rank holds, and how many parameters there are."""
    found = {}
    for precision in ("32-true", "bf16-true"):
        watch = Held()
        fit(shards(), callbacks=lambda watch=watch: [watch], max_steps=2, precision=precision)  # type: ignore[misc]
        found[precision] = watch.bytes
    return {**found, "parameters": sum(parameter.numel() for parameter in Net().parameters())}


OTHERS: dict[str, Callable[[Path], Any]] = {
    "errors": errors,
    "effects": effects,
    "methods": methods,
    "held": held,
    "from two": partial(elsewhere, name="../two/between_epochs"),
    "from one": partial(elsewhere, name="../one/between_epochs"),
}


def _by_name(folder: Path, name: str) -> Any:
    return SAME[name]() if name in SAME else {**CHECKPOINTS, **OTHERS}[name](folder)


if __name__ == "__main__":
    serve({name: partial(lambda name, folder: _by_name(folder, name), name) for name in [*SAME, *CHECKPOINTS, *OTHERS]})
