"""Deliberately wrong methods, one or more for each check, which that check must flag."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_accel.hooks import AccelCallback, BatchTransform, Contract, OptimizerTransform

WRONG = Contract(
    purpose="Be wrong.",
    touches=frozenset({"gradients"}),
    acts="when it should not",
    expects="a red test",
    docs="guides/conformance",
)


class Noise(BatchTransform):
    """Right: noise on the input from the generator it is given."""

    contract = WRONG

    def transform_batch(self, batch: Any, generator: torch.Generator) -> Any:
        x, y = batch
        return x + 0.1 * torch.randn(x.shape, generator=generator).to(x), y


class HiddenCounter(AccelCallback):
    """Counts steps but does not save the count."""

    contract = WRONG

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.count += 1
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 + 0.01 * self.count)


class HiddenRandom(AccelCallback):
    """Draws noise from a generator of its own that is not saved."""

    contract = WRONG

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.01 * torch.randn(parameter.grad.shape, generator=self.generator))


class HiddenScale(BatchTransform):
    """Scales the input by a count of batches that it does not save."""

    contract = WRONG

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def transform_batch(self, batch: Any, generator: torch.Generator) -> Any:
        x, y = batch
        self.count += 1
        return x * (1 + 0.1 * self.count), y


class NotNeutral(AccelCallback):
    """At strength 0 still moves the weights by a last bit."""

    contract = WRONG

    @property
    def is_neutral(self) -> bool:
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).mul_(1 + 1e-6)


class NeutralDraw(AccelCallback):
    """At strength 0 draws from the global random state, so that everything after it differs."""

    contract = WRONG

    @property
    def is_neutral(self) -> bool:
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.rand(1)


class UnsaidNeutral(AccelCallback):
    """Does nothing, and does not say so."""

    contract = WRONG


class PerRank(AccelCallback):
    """Moves each rank's weights another way."""

    contract = WRONG

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).add_(1e-3 * trainer.global_rank)


class PerWorldSize(AccelCallback):
    """Equal on all ranks, but another for another number of them."""

    contract = WRONG

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(trainer.world_size)


class Copied(torch.optim.Optimizer):
    """Another optimizer over the same parameters."""

    def __init__(self, other: torch.optim.Optimizer) -> None:
        groups = [{key: value for key, value in group.items() if key != "initial_lr"} for group in other.param_groups]
        self.other = type(other)(groups, lr=other.defaults["lr"])
        super().__init__(groups, other.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)
        return loss


class LostScheduler(AccelCallback):
    """Replaces the optimizer and leaves the scheduler with the old one."""

    contract = WRONG

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.strategy.optimizers:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # or torch itself would warn
        trainer.strategy.optimizers = [Copied(optimizer) for optimizer in trainer.strategy.optimizers]


class LostRate(OptimizerTransform):
    """Replaces the optimizer by one that really steps with a rate of its own."""

    contract = WRONG

    def transform_optimizer(self, optimizer: torch.optim.Optimizer, names: Any) -> torch.optim.Optimizer:
        original = optimizer.step

        def step(closure: Any = None) -> Any:
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            result = original(closure)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            return result

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        optimizer.step = step  # type: ignore[method-assign]
        return optimizer


class LostCount(AccelCallback):
    """Makes half of the steps, and lets the schedules count them all."""

    contract = WRONG

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        loop._accumulated_batches_reached = lambda: loop.batch_progress.current.ready % 2 == 0
        self.on_undo(lambda: delattr(loop, "_accumulated_batches_reached"))


class EveryMicroBatch(AccelCallback):
    """Steps the optimizer after each micro-batch."""

    contract = WRONG

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop._should_accumulate():
            trainer.optimizers[0].step()


class PerMicroBatch(AccelCallback):
    """Changes weights in every micro-batch, as if each made a step."""

    contract = WRONG

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).mul_(0.99)


class ModuleHook(AccelCallback):
    """Wraps the module's batch hook, whoever owns it."""

    contract = WRONG

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def after(original: Any, batch: Any, dataloader_idx: int) -> Any:
            x, y = original(batch, dataloader_idx)
            return (x * 0.5, y) if trainer.training else (x, y)

        self.patch(pl_module, "on_after_batch_transfer", after)


class InsteadOfHook(AccelCallback):
    """Takes the datamodule's hook out, and the module's not."""

    contract = WRONG

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None:
            self.patch(datamodule, "on_after_batch_transfer", lambda original, batch, dataloader_idx: batch)


class Anywhere(AccelCallback):
    """Breaks under manual optimization, and does not refuse it."""

    contract = WRONG

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise RuntimeError("list index out of range")


class RefusesAll(AccelCallback):
    """Refuses what it could do, in no words."""

    contract = WRONG

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError("no")


class OnlyUncompiled(AccelCallback):
    """Acts on a module whose steps are not compiled, and silently does nothing on one whose are."""

    contract = WRONG

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if pl_module._compiler_ctx is None:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)


class WrongType(AccelCallback):
    """Says that it takes a string, and wants a number."""

    contract = WRONG

    def __init__(self, rate: str = "") -> None:
        super().__init__(rate=rate)


class OtherInYAML(AccelCallback):
    """Does another thing where the Trainer was made by LightningCLI."""

    contract = WRONG

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if any("SaveConfig" in type(other).__name__ for other in trainer.callbacks):
            return
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class LeavesPatch(Callback):
    """Patches the module and the Trainer, and never takes it back."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        step = pl_module.training_step

        def training_step(*args: Any) -> Any:
            return step(*args)

        pl_module.training_step = training_step  # type: ignore[method-assign]


class LeavesPatchOnError(Callback):
    """Takes its patch back at a good end only."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        step = pl_module.training_step
        pl_module.training_step = lambda *args: step(*args)  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del pl_module.training_step


class LeavesSetting(Callback):
    """Leaves a setting of the Trainer changed."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.accumulate_grad_batches = 2


class LeavesHook(Callback):
    """Leaves a hook on a layer."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        next(pl_module.children()).register_forward_hook(lambda *_: None)


class StopsForGood(Callback):
    """Ends a second fit before it began."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.limit_train_batches = 0


class OnlyOnce(AccelCallback):
    """Carries state from one fit into the next."""

    contract = WRONG

    def __init__(self) -> None:
        super().__init__()
        self.strength = 1.0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.strength *= 0.9
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.strength)


class Mutates(AccelCallback):
    """Empties the list it was given."""

    contract = WRONG

    def __init__(self, amounts: list[int] | None = None) -> None:
        super().__init__()
        if amounts:
            amounts.clear()


class MutatesLater(AccelCallback):
    """Uses up the list it was given."""

    contract = WRONG

    def __init__(self, amounts: list[int] | None = None) -> None:
        super().__init__()
        self.amounts = amounts or []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.amounts.pop()


class AcceptsAll(AccelCallback):
    """Checks nothing."""

    contract = WRONG

    def __init__(self, amount: Any = 0) -> None:
        super().__init__(amount=amount)


class Mumbles(AccelCallback):
    """Refuses without saying what it expected."""

    contract = WRONG

    def __init__(self, amount: Any = 0) -> None:
        super().__init__(amount=amount)
        if isinstance(amount, str):
            raise KeyError(amount)
        if amount == 2:
            raise ValueError("bad amount")
