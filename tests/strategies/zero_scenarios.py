"""What the tests of ZeROStrategy run on two ranks: the same fit under DDP and under ZeRO, and what must be equal."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.augment.batch_augmentation import BatchAugmentation
from lightning_accel.augment.label_smoothing import LabelSmoothing
from lightning_accel.augment.mixup import MixUp
from lightning_accel.optimizers.fused import FusedOptimizer
from lightning_accel.optimizers.low_bit import LowBitOptimizer
from lightning_accel.pruning.gradual import GradualPruning
from lightning_accel.strategies.zero import ZeROStrategy
from tests.strategies.launch import serve

LINEAR = nn.functional.linear
RANKS = int(os.environ.get("WORLD_SIZE", "1"))  # Lightning takes it away after the first fit


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points and their classes, from a seed."""

    def __init__(self, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, 6, generator=generator)
        self.y = torch.randint(0, 3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Toy(LightningModule):
    """Two layers and what must not disturb: BatchNorm's averages, a tied weight, a frozen layer."""

    def __init__(self, configure: Callable[[LightningModule], Any]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 3))
        self.configure = configure

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Tied(Toy):
    """An embedding whose weight is also the output layer's."""

    def __init__(self, configure: Callable[[LightningModule], Any]) -> None:
        super().__init__(configure)
        self.inner = nn.Linear(6, 5)
        self.table = nn.Embedding(3, 5)
        self.out = nn.Linear(5, 3, bias=False)
        self.out.weight = self.table.weight
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, 0] > 0).long()
        return self.out(torch.tanh(self.inner(x)) + self.table(ids))  # type: ignore[no-any-return]


class Frozen(Toy):
    """A frozen layer in the optimizer, another in a group of its own, and trainable parameters in no group."""

    def __init__(self, configure: Callable[[LightningModule], Any]) -> None:
        super().__init__(configure)
        self.frozen = nn.Linear(6, 6)
        self.alone = nn.Linear(6, 6)
        self.outside = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.alone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.outside(self.alone(self.frozen(x))))  # type: ignore[no-any-return]


class Manual(Toy):
    """Two backwards in one step, a step every second batch, and clipping by hand."""

    def __init__(self, configure: Callable[[LightningModule], Any]) -> None:
        super().__init__(configure)
        self.automatic_optimization = False
        self.net[1] = nn.Identity()  # under manual optimization DDP leaves the averages of each rank as they are

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.manual_backward(loss)
        other = self(x).square().mean()
        self.manual_backward(other)
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.5, "norm" if batch_idx % 4 == 1 else "value")
            optimizer.step()
            optimizer.zero_grad()
        return loss + other


class Branches(Toy):
    """A branch that only some batches use: its parameters have no gradient in the others."""

    def __init__(self, configure: Callable[[LightningModule], Any]) -> None:
        super().__init__(configure)
        self.branch = nn.Linear(6, 6)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss((self.branch(x) if batch_idx % 2 else x, y))


class Discards(Manual):
    """Gradients thrown away without a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        self.manual_backward(loss := self.loss(batch))
        if batch_idx % 3 == 2:
            optimizer.step()
        if batch_idx % 3 != 1:
            optimizer.zero_grad()
        return loss


class NoGradientIsZero(Callback):
    """What ZeRO does with a parameter that a window does not use; torch passes over it, without momentum and decay."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not isinstance(trainer.strategy, ZeROStrategy):
            for parameter in pl_module.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Stream(IterableDataset[Any]):
    """A dataset whose length nobody knows."""

    def __iter__(self) -> Iterator[Any]:
        data = Points()
        return (data[index] for index in range(torch.distributed.get_rank(), 32, RANKS))


class ClipsItself(Toy):
    """Its own clipping, by another amount at every step."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(optimizer, 0.05 + 0.05 * (self.global_step % 3), "norm")


class Unfreeze(Callback):
    """Unfreeze layers in mid-run, as the caller would by hand."""

    def __init__(self, plan: dict[int, str]) -> None:
        self.plan = plan

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (name := self.plan.get(trainer.fit_loop.total_batch_idx)) is not None:
            pl_module.get_submodule(name).requires_grad_(True)


class Freeze(Callback):
    """Freeze a layer in mid-run."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            pl_module.net[0].requires_grad_(False)


class Late(Toy):
    def __init__(self, configure: Callable[[LightningModule], Any]) -> None:
        super().__init__(configure)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.net[1] = nn.Identity()  # behind it a bias has no gradient but noise, which Adam makes large
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.second(self.first(x)))  # type: ignore[no-any-return]


class Recorder(Callback):
    """The losses, the rates, the validation's losses, and the weights at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.validation: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation.append(float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with gathered(pl_module):
            self.weights = {name: value.detach().clone().float() for name, value in pl_module.named_parameters()}


def gathered(module: nn.Module) -> Any:
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def strategy(name: str, find_unused_parameters: bool = False, **options: Any) -> Any:
    """Plain DDP, or a stage with everything split at stage 3."""
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=find_unused_parameters)
    return ZeROStrategy(stage=int(name), stage3={"persistence_threshold": 0} if name == "3" else None, **options)


def trainer_for(strategy: Any, folder: Path, callbacks: Any = (), **options: Any) -> Trainer:
    return Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=RANKS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{"max_epochs": 2, **options},
    )


def fit(
    strategy: Any, module: LightningModule, folder: Path, callbacks: Any = (), data: Any = Points, **options: Any
) -> dict[str, Any]:
    """What a fit of two epochs of eight batches a rank gave."""
    recorder = Recorder()
    trainer = trainer_for(strategy, folder, [*callbacks, recorder], **options)
    trainer.fit(module, DataLoader(data(), batch_size=2), DataLoader(Points(), batch_size=8))
    found = {name: getattr(recorder, name) for name in ("losses", "rates", "validation", "weights")}
    found["logged"] = [float(value) for value in trainer.callback_metrics.values()]
    found["after"] = {name: value.detach().clone().float() for name, value in module.named_parameters()}
    return {**found, "step": trainer.global_step}


def compare(
    make: Callable[[], LightningModule],
    callbacks: Callable[[], list[Callback]] = list,
    strategy_options: dict[str, Any] | None = None,
    names: tuple[str, ...] = ("ddp", "1", "2", "3"),
    **options: Any,
) -> Callable[[Path], Any]:
    """The same fit under DDP, then at each stage."""

    def scenario(folder: Path) -> Any:
        found = {}
        for name in names:
            seed_everything(1)
            module = make()
            found[name] = fit(strategy(name, **(strategy_options or {})), module, folder, callbacks(), **options)
        return found

    return scenario


class Lion(torch.optim.Optimizer):
    """Lion (https://arxiv.org/abs/2302.06675), which torch has not."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_((average * first + parameter.grad * (1 - first)).sign(), alpha=-group["lr"])
                average.mul_(second).add_(parameter.grad, alpha=1 - second)
        return loss


class Kernel(torch.optim.AdamW):
    """One that owns something outside of Python, which its end destroys, as DeepSpeedCPUAdam does."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.alive = [True]

    def __del__(self) -> None:
        self.alive[0] = False

    def step(self, closure: Any = None) -> Any:
        assert self.alive[0], "destroyed before its end"
        return super().step(closure)


def sgd(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def adamw(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def lion(module: nn.Module) -> Any:
    return Lion(module.parameters(), lr=0.01)


def two_groups(module: Any) -> Any:
    return torch.optim.AdamW(
        [
            {"params": [module.net[0].weight, module.net[3].weight], "weight_decay": 0.5},
            {"params": [*module.net[1].parameters(), module.net[0].bias, module.net[3].bias], "lr": 0.01},
        ],
        lr=0.05,
    )


def frozen_groups(module: Any) -> Any:
    trained = [*module.net.parameters(), *module.frozen.parameters()]
    optimizer = torch.optim.AdamW([{"params": list(module.alone.parameters())}, {"params": trained}], lr=0.05)
    return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 0.5**s, lambda s: 0.9**s])]


def kernel(folder: Path) -> Any:
    """An optimizer that must live as long as the engine, beside the same one under DDP without that."""
    plain = compare(lambda: Toy(adamw), names=("ddp",))(folder)
    return {**plain, **compare(lambda: Toy(lambda module: Kernel(module.parameters(), lr=0.05)), names=("1",))(folder)}


def schedule(kind: str) -> Callable[[LightningModule], Any]:
    """SGD with a schedule, stepped as the conformance suite steps it."""

    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        schedulers = torch.optim.lr_scheduler
        if kind == "plateau":
            plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        if kind == "two":
            return [optimizer], [
                {"scheduler": schedulers.StepLR(optimizer, 1, gamma=0.5), "interval": "epoch"},
                {"scheduler": schedulers.LambdaLR(optimizer, lambda s: 0.9**s), "interval": "step"},
            ]
        made = {
            "lambda": lambda: schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
            "one_cycle": lambda: schedulers.OneCycleLR(optimizer, 0.5, module.trainer.estimated_stepping_batches),
            "sequential": lambda: schedulers.SequentialLR(
                optimizer,
                [schedulers.ConstantLR(optimizer, 0.1, 3), schedulers.ExponentialLR(optimizer, 0.9)],
                milestones=[3],
            ),
        }[kind]()
        return [optimizer], [{"scheduler": made, "interval": "step"}]

    return configure


def raised(function: Callable[[], Any]) -> str:
    """The message of what it raised."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def simple_fit(module: LightningModule, folder: Path, strategy: Any = None, callbacks: Any = (), **options: Any) -> str:
    """The message of what a fit raised."""
    strategy = strategy or ZeROStrategy(stage=2)
    return raised(lambda: fit(strategy, module, folder, callbacks, **options))


def evaluation(folder: Path) -> Any:
    """Validate, test and predict before and after a fit in one Trainer, at each stage; and the module is left whole."""
    found: dict[str, Any] = {}
    for name in ("ddp", "1", "2", "3"):
        seed_everything(1)
        module = Toy(adamw)
        seen: list[int] = []
        module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        trainer = trainer_for(strategy(name), folder)
        loader = DataLoader(Points(), batch_size=8)
        before = trainer.validate(module, loader, verbose=False)[0]["val_loss"]
        trainer.fit(module, loader, loader)
        after = trainer.validate(module, loader, verbose=False)[0]["val_loss"]
        calls = len(seen)
        predictions = torch.cat(trainer.predict(module, loader))
        called = len(seen) > calls
        x, _ = next(iter(DataLoader(Points(), batch_size=32)))
        with torch.no_grad():
            itself = module.eval().net(x).sum()
        hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
        extra = [
            key for part in (*module.modules(), *module.parameters()) for key in vars(part) if key.startswith("ds_")
        ]
        found[name] = {
            "values": torch.tensor([before, after, float(itself)]),
            "predictions": predictions,
            "left": [hooks, *sorted(extra), int(called), int(nn.functional.linear is LINEAR)],
        }
    return found


def second_trainer(folder: Path) -> Any:
    """Fit again after the process group was destroyed, and once more beside DDP."""
    losses = []
    for name in ("2", "3", "ddp", "3", "1"):
        seed_everything(1)
        losses.append(fit(strategy(name), Toy(adamw), folder)["losses"])
        torch.distributed.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return losses


def later(name: str, folder: Path) -> Any:
    """Two layers that are unfrozen in mid-run, against the same fit in plain torch."""
    seed_everything(1)
    module = Late(lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1))
    if name != "plain":
        plan = strategy(name, trained_later=["^first", "^second"])
        own = lambda: Subset(Points(), range(int(os.environ["RANK"]), 32, 2))  # noqa: E731
        unfreeze = Unfreeze({4: "second", 9: "first"})
        return fit(plan, module, folder, [unfreeze], data=own, use_distributed_sampler=False)
    optimizer = module.configure_optimizers()
    data, losses = Points(), []
    for batch in range(16):
        if batch in (4, 9):
            module.get_submodule({4: "second", 9: "first"}[batch]).requires_grad_(True)
        place = batch % 8 * 4
        # BatchNorm sees the samples of its own rank only
        parts = [(data.x[place + rank : place + 4 : 2], data.y[place + rank : place + 4 : 2]) for rank in (0, 1)]
        each = [nn.functional.cross_entropy(module(x), y) for x, y in parts]
        optimizer.zero_grad()
        (sum(each) / 2).backward()
        optimizer.step()
        losses.append(float(each[0]))
    return {"losses": losses, "weights": {name: value.detach() for name, value in module.named_parameters()}}


def trained_later(folder: Path) -> Any:
    return {name: later(name, folder) for name in ("plain", "1", "2", "3")}


class WrongOnOne(Toy):
    """Another module on rank 1."""

    def __init__(self, kind: str) -> None:
        super().__init__(adamw)
        if int(os.environ["RANK"]) == 1:
            if kind == "shape":
                self.net[3] = nn.Linear(10, 3, bias=False)
            else:
                self.more = nn.Linear(2, 2)


class Two(Toy):
    """A GAN has two optimizers."""

    def __init__(self) -> None:
        super().__init__(lambda m: [torch.optim.SGD(m.net[i].parameters(), 0.1) for i in (0, 3)])
        self.automatic_optimization = False


class SkipsOnOne(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Infinite(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (float("inf") if batch_idx == 1 else 1.0)


def refused(folder: Path) -> Any:
    """What must be refused, with its message."""
    none = lambda module: None  # noqa: E731
    lbfgs = lambda module: torch.optim.LBFGS(module.parameters())  # noqa: E731
    compiled = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    offload: Any = {"offload_optimizer": "cpu", "config": compiled}
    os.environ["CXX"] = "no-such-compiler"
    path, os.environ["PATH"] = os.environ["PATH"], "/nowhere"
    extensions = os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    no_compiler = simple_fit(Toy(adamw), folder, ZeROStrategy(stage=2, **offload))
    os.environ["PATH"] = path
    lock = Path(extensions) / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (0, 0))
    os.utime(lock.parent, (0, 0))
    return {
        "no_compiler": no_compiler,
        "lock": simple_fit(Toy(adamw), folder, ZeROStrategy(stage=2, **offload)),
        "shape": simple_fit(WrongOnOne("shape"), folder),
        "more": simple_fit(WrongOnOne("more"), folder),
        "several": simple_fit(Two(), folder),
        "none": simple_fit(Toy(none), folder),
        "lbfgs": simple_fit(Toy(lbfgs), folder),
        "skips": simple_fit(SkipsOnOne(adamw), folder),
        "float16": simple_fit(Toy(adamw), folder, precision="16-mixed"),
        "unfrozen": simple_fit(Late(adamw), folder, callbacks=[Unfreeze({3: "first"})]),
        "pruning": simple_fit(Toy(adamw), folder, ZeROStrategy(stage=3), [GradualPruning(0.5)]),
        "low_bit": simple_fit(Toy(adamw), folder, callbacks=[LowBitOptimizer()]),
        "pattern": simple_fit(Late(adamw), folder, ZeROStrategy(stage=2, trained_later=["thrid"])),
        "quantized": simple_fit(Toy(adamw), folder, ZeROStrategy(stage=3, zero_plus_plus={"quantized_weights": True})),
        "frozen_later": simple_fit(Toy(adamw), folder, callbacks=[Freeze()]),
        "zenflow": simple_fit(
            Toy(adamw), folder, ZeROStrategy(offload_optimizer="cpu", zenflow={}), accumulate_grad_batches=2
        ),
        "precision_plugin": simple_fit(Toy(adamw), folder, plugins=[MixedPrecision("bf16-mixed", "cpu")]),
        "after": simple_fit(Toy(adamw), folder),
    }


def infinite(folder: Path) -> Any:
    """A step that DeepSpeed leaves out, because of its gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fit(ZeROStrategy(stage=2), Infinite(adamw), folder, max_epochs=1)
    said = [str(warning.message) for warning in caught if "DeepSpeed skipped" in str(warning.message)]
    return {"said": len(said), "finite": all(bool(value.isfinite().all()) for value in found["weights"].values())}


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "sgd": compare(lambda: Toy(sgd)),
    "adamw": compare(lambda: Toy(two_groups)),
    "lion": compare(lambda: Toy(lion)),
    "accumulation": compare(lambda: Toy(sgd), accumulate_grad_batches=3),
    "changing_factor": compare(lambda: Toy(sgd), lambda: [GradientAccumulation({0: 1, "5batch": 3, "1epoch": 2})]),
    "clip_norm": compare(lambda: Toy(sgd), gradient_clip_val=0.05, accumulate_grad_batches=2),
    "clip_value": compare(lambda: Toy(sgd), gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "clips_itself": compare(lambda: ClipsItself(sgd)),
    "lambda": compare(lambda: Toy(schedule("lambda"))),
    "one_cycle": compare(lambda: Toy(schedule("one_cycle"))),
    "plateau": compare(lambda: Toy(schedule("plateau"))),
    "sequential": compare(lambda: Toy(schedule("sequential"))),
    "two_schedulers": compare(lambda: Toy(schedule("two"))),
    "tied": compare(lambda: Tied(adamw)),
    "frozen": compare(lambda: Frozen(frozen_groups)),
    "branches": compare(
        lambda: Branches(sgd), lambda: [NoGradientIsZero()], {"find_unused_parameters": True}, accumulate_grad_batches=2
    ),
    "branches_offload": compare(
        lambda: Branches(sgd),
        lambda: [NoGradientIsZero()],
        {"find_unused_parameters": True, "offload_optimizer": "cpu"},
        accumulate_grad_batches=2,
    ),
    "manual": compare(lambda: Manual(sgd)),
    "discards": compare(lambda: Discards(sgd)),
    "bf16-mixed": compare(lambda: Toy(sgd), precision="bf16-mixed"),
    "bf16-true": compare(lambda: Toy(sgd), names=("1", "2", "3"), precision="bf16-true"),
    "offload": compare(lambda: Toy(adamw), strategy_options={"offload_optimizer": "cpu"}),
    "pruning": compare(lambda: Toy(adamw), lambda: [GradualPruning(0.5, 2, 12, 2)], names=("ddp", "1", "2")),
    "pruning_lion": compare(lambda: Toy(lion), lambda: [GradualPruning(0.5, 2, 12, 2)], names=("ddp", "1", "2")),
    "kernel": kernel,
    "fused": compare(lambda: Tied(adamw), lambda: [FusedOptimizer()]),
    "unknown_length": compare(lambda: Toy(sgd), lambda: [GradientAccumulation(3)], data=Stream, gradient_clip_val=0.3),
    "evaluation": evaluation,
    "second_trainer": second_trainer,
    "trained_later": trained_later,
    "refused": refused,
    "infinite": infinite,
    "augmentation": compare(lambda: Toy(adamw), lambda: [BatchAugmentation([MixUp(0.3)], seed=1), LabelSmoothing(0.1)]),
}

if __name__ == "__main__":
    serve(SCENARIOS)
