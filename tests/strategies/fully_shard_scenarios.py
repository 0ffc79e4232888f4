"""What the tests of FullyShardStrategy run on two ranks: the same fit under DDP and under it, and what is refused.

python -m tests.strategies.fully_shard_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.augment.label_smoothing import LabelSmoothing
from lightning_accel.cli.lightning_commands import AccelCLI
from lightning_accel.errors import NoEffectWarning
from lightning_accel.optimizers.fused import FusedOptimizer
from lightning_accel.optimizers.low_bit import LowBitOptimizer
from lightning_accel.pruning.gradual import GradualPruning
from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.sharding import units
from tests.strategies.fully_shard_fits import (
    RANK,
    WORLD,
    Gan,
    Net,
    SaveAt,
    data,
    fit,
    make_trainer,
    restore_environment,
    results,
    shards,
)
from tests.strategies.launch import serve

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
    # SGD where gradients are clipped or summed: Adam steps as far whatever they are multiplied with
    "scalar": partial(both, module=partial(Net, "sgd", extra="temperature"), gradient_clip_val=0.05),
    "scalar accumulated": partial(  # and a norm that is never reached
        both, module=partial(Net, "sgd", extra="temperature"), accumulate_grad_batches=2, gradient_clip_val=9.0
    ),
    "at the root": partial(both, module=partial(Net, "sgd", extra="scale"), gradient_clip_val=0.05),
    "compiled blocks": partial(both, module=partial(Net, extra="compiled"), max_epochs=1),
    "other seeds": partial(both, module=partial(Net, extra="batchnorm"), seed=1 + RANK),
    "inference mode": inference_mode,
    "no blocks": partial(both, partial(FullyShardStrategy, blocks=10**9)),
    "kept after forward": partial(both, partial(shards, reshard_after_forward=False)),
    "offload": partial(both, partial(shards, offload=True), module=partial(Net, "sgd"), gradient_clip_val=0.05),
    "replicas": partial(both, partial(shards, replicas=2), module=partial(Net, "sgd"), gradient_clip_val=0.05),
    "gan": gan,
    "gan without toggling": partial(gan, module=partial(Gan, toggled=False)),
    "gan without blocks": partial(gan, partial(FullyShardStrategy, blocks=10**9)),
    **{
        name: partial(both, module=partial(Net, name), limit_train_batches=3, max_epochs=1)
        for name in ("adagrad", "rmsprop", "nadam", "radam", "adamax", "adadelta", "adamw foreach", "adamw fused")
    },
    "param_dtype": partial(both, partial(shards, param_dtype="bfloat16"), precision="bf16-mixed"),
    "reduce_dtype": partial(both, partial(shards, reduce_dtype="bfloat16"), accumulate_grad_batches=2),
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
        "compiled": message(lambda: fit(shards(), module=lambda: torch.compile(Net(), backend="eager"))),
        "16-mixed": message(lambda: fit(shards(), precision="16-mixed")),
        "sync_batchnorm": message(
            lambda: fit(shards(), module=partial(Net, extra="batchnorm"), sync_batchnorm=True, num_sanity_val_steps=0)
        ),
        "param_dtype": message(lambda: fit(shards(param_dtype="bfloat16"))),
        "LowBitOptimizer": message(
            lambda: fit(shards(), callbacks=lambda: [LowBitOptimizer(backend="bitsandbytes", min_size=64)])
        ),
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


class Messages(Callback):
    """Counts the collectives in each batch's step."""

    def __init__(self) -> None:
        self.counts: list[dict[str, int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._mode = CommDebugMode()
        self._mode.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self._mode.__exit__(None, None, None)
        self.counts.append({str(name): count for name, count in self._mode.get_comm_counts().items()})


def window(folder: Path) -> list[dict[str, int]]:
    """What travels in the batches of two windows."""
    watch = Messages()
    fit(shards(), callbacks=lambda: [watch], accumulate_grad_batches=2, limit_train_batches=4, max_epochs=1)
    return watch.counts


YAML = """
seed_everything: 1
trainer:
  strategy: {strategy}
  accelerator: cpu
  devices: {world}
  max_epochs: 2
  num_sanity_val_steps: 1
  use_distributed_sampler: false
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
model: tests.strategies.fully_shard_fits.Net
data: tests.strategies.fully_shard_fits.Data
"""
BY_PATTERNS = r"{class_path: FullyShardStrategy, init_args: {blocks: ['blocks\.\d+', stem], param_dtype: null}}"


def from_yaml(folder: Path) -> dict[str, Any]:
    """A fit of our command by the name of a strategy, by its class and patterns, and by `ddp`."""
    found = {}
    for name, strategy in {"ddp": "ddp", "name": "accel_fsdp2_offload", "class": BY_PATTERNS}.items():
        restore_environment()
        file = folder / f"{name}.{RANK}.yaml"
        file.write_text(YAML.format(strategy=strategy, world=WORLD, folder=folder))
        cli = AccelCLI(["fit", "--config", str(file)], save_config_callback=None)
        found[name] = results(cli.model)
        if name != "ddp":
            made = cli.trainer.strategy
            found[name] |= {"offload": made.offload, "units": len(units(vars(cli.model)["_fully_sharded_root"]))}
    return found


OTHERS: dict[str, Callable[[Path], Any]] = {
    "errors": errors,
    "effects": effects,
    "methods": methods,
    "window": window,
    "yaml": from_yaml,
}


def _same(name: str, folder: Path) -> Any:
    return SAME[name]()


if __name__ == "__main__":
    serve({**{name: partial(_same, name) for name in SAME}, **OTHERS})
