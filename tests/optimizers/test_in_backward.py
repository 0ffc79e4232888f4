"""Steps inside the backward pass are those of the plain run, bit for bit, and the gradients never exist all at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.checkpoint import checkpoint

from lightning_accel import (
    EMA,
    ExactResume,
    FusedOptimizer,
    GradientClipping,
    GradualPruning,
    LearningRateFinder,
    LowBitOptimizer,
    MicroBatching,
    Muon,
    OptimizerInBackward,
)
from lightning_accel.hooks import AccelCallback, Contract
from lightning_accel.hooks.memory import LiveBytes
from lightning_accel.optimizers.bitsandbytes_state import use_bitsandbytes_
from lightning_accel.optimizers.in_backward import Arrivals, InBackwardStep, step_in_backward_
from lightning_accel.optimizers.muon import use_muon_
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from tests.conformance.compare import assert_equal
from tests.conformance.toy import Digits, Run, assert_same_training, run, train_loader
from tests.optimizers.toy import MAKE, WITHOUT_MOMENTS, digits, model, weights

Make = Callable[[Any], Optimizer]
ALL: dict[str, Make] = {**MAKE, **{f"{name} without moments": make for name, make in WITHOUT_MOMENTS.items()}}


def train(module: nn.Module, optimizer: Optimizer, steps: int, start: int = 0, scheduler: Any = None) -> list[float]:
    """Train by closures, on batches that depend on the step alone; return the losses."""
    images, labels = digits()
    losses = []
    for step in range(start, start + steps):
        index = torch.randint(len(images), (32,), generator=torch.Generator().manual_seed(step))

        def closure(index: Tensor = index) -> Any:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(images[index]), labels[index])
            (-loss if optimizer.param_groups[0].get("maximize") else loss).backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
        if scheduler is not None:
            scheduler.step()
    return losses


def assert_same(
    make: Make, prepare: Callable[[Optimizer], Any] = lambda _: None, build: Callable[[], nn.Module] = model
) -> None:
    plain, ours = build(), build()
    first, second = make(list(plain.parameters())), make(list(ours.parameters()))
    for optimizer in (first, second):
        prepare(optimizer)
    assert step_in_backward_(second) is second
    assert train(ours, second, 4) == train(plain, first, 4)
    assert_equal(weights(ours), weights(plain), "weights")
    assert_equal(by_number(second.state_dict()), by_number(first.state_dict()), "the optimizer's state")
    assert all(parameter.grad is None for parameter in ours.parameters())


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": {str(number): state["state"][number] for number in sorted(state["state"])}}


@pytest.mark.parametrize("name", ALL)
def test_bit_for_bit_the_step_of_any_optimizer(name: str) -> None:
    assert_same(ALL[name])


@pytest.mark.parametrize("option", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_the_implementation_that_was_chosen(option: dict[str, bool]) -> None:
    assert_same(lambda p: torch.optim.AdamW([{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:]}], **option))


@pytest.mark.parametrize(
    "prepare",
    [
        *(partial(quantize_optimizer_, min_size=256, bits=bits) for bits in (8, 4, "fp8", "bf16")),
        partial(use_bitsandbytes_, min_size=256),
        lambda optimizer: use_muon_(optimizer, [optimizer.param_groups[0]["params"][2]]),
    ],
    ids=["8", "4", "fp8", "bf16", "bitsandbytes", "Muon"],
)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_other_state_and_steps(name: str, prepare: Callable[[Optimizer], Any]) -> None:
    assert_same(MAKE[name], prepare)


def test_weights_that_are_rounded_at_random() -> None:
    images, _ = digits()
    assert_same(MAKE["AdamW"], partial(quantize_optimizer_, min_size=256, seed=3), partial(Cast, images.dtype))


class Cast(nn.Module):
    """A model in bfloat16 for inputs and losses in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = model().bfloat16(), dtype

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.bfloat16()).to(self.dtype)
        return result


def test_one_gradient_at_a_time() -> None:
    counts: dict[bool, int] = {}
    peaks: dict[bool, float] = {}
    for inside in (False, True):
        module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
        parameters = list(module.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        most = 0

        def look(_: Any, parameters: list[nn.Parameter] = parameters) -> None:
            nonlocal most
            most = max(most, sum(parameter.grad is not None for parameter in parameters))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(look)  # before the step's own
        if inside:
            step_in_backward_(optimizer)
        with LiveBytes(known=parameters) as live:
            optimizer.step(lambda module=module: module(torch.ones(1, 64)).sum().backward())  # type: ignore[misc]
        counts[inside], peaks[inside] = most, live.peak / parameters[0].nbytes
    assert counts == {False: 8, True: 1}
    assert peaks[False] > 8 and peaks[True] < 2.2, peaks


def test_rates_and_momentum_of_each_group_at_each_step() -> None:
    losses = []
    for inside in (False, True):
        module = model()
        first, *rest = module.parameters()
        optimizer = torch.optim.SGD([{"params": [first]}, {"params": rest, "weight_decay": 0.1}], lr=0.1, momentum=0.9)
        scheduler = OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=6)
        if inside:
            step_in_backward_(optimizer)
        losses.append(train(module, optimizer, 5, scheduler=scheduler))
        assert optimizer.param_groups[0]["momentum"] != 0.9
    assert losses[0] == losses[1]


def test_hooks_of_the_optimizer_run_once_a_step() -> None:
    module = model()
    optimizer = step_in_backward_(torch.optim.AdamW(module.parameters()))
    seen: list[Any] = []
    before = weights(module).clone()
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.equal(weights(module), before)))
    optimizer.register_step_post_hook(lambda *_: seen.append(torch.equal(weights(module), before)))
    train(module, optimizer, 1)
    assert seen == [True, False] and type(optimizer).__name__ == "AdamW"


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_is_loaded_from_and_by_the_plain_optimizer(inside: bool) -> None:
    whole, resumed = model(), model()
    first, second = (MAKE["AdamW"](module.parameters()) for module in (whole, resumed))
    step_in_backward_(first if inside else second)
    train(whole, first, 3)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares what it loads
    assert train(whole, first, 3, start=3) == train(resumed, second, 3, start=3)
    assert_equal(weights(resumed), weights(whole), "weights")


class Shared(nn.Module):
    """A layer used twice, a weight in two layers, and one that is never used."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.tied, self.unused = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.tied.weight = self.layer.weight
        self.head = nn.Linear(64, 10)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in (self.layer, self.tied, self.layer):
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
            x = x.tanh()
        result: Tensor = self.head(x)
        return result


@pytest.mark.parametrize("reentrant", [None, False])
def test_shared_weights_and_checkpointed_activations(reentrant: bool | None) -> None:
    assert_same(MAKE["AdamW"], build=partial(Shared, reentrant))


def test_reentrant_checkpoints_work_where_a_layer_is_used_once() -> None:
    class Once(Shared):
        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = checkpoint(self.layer, x.requires_grad_(), use_reentrant=True)
            result: Tensor = self.head(hidden)
            return result

    assert_same(MAKE["AdamW"], build=Once)


def test_a_gradient_that_arrives_twice_is_an_error() -> None:
    module = Shared(reentrant=True)
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizer = step_in_backward_(MAKE["AdamW"](module.parameters()), Arrivals(names=names))
    with pytest.raises(RuntimeError, match=r"gradient of layer\.\w+ arrived twice in one step.*use_reentrant=False"):
        train(module, optimizer, 1)
    again = nn.Linear(64, 10)
    optimizer = step_in_backward_(MAKE["AdamW"](again.parameters()))

    def closure() -> None:
        loss = again(torch.ones(2, 64)).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    with pytest.raises(RuntimeError, match="Make one backward pass of several"):
        optimizer.step(closure)  # type: ignore[arg-type]
    assert not any(parameter._post_accumulate_grad_hooks for parameter in again.parameters())  # type: ignore[attr-defined]


def test_a_backward_pass_outside_of_a_step_trains_nothing() -> None:
    plain, ours = model(), model()
    first, second = MAKE["AdamW"](plain.parameters()), step_in_backward_(MAKE["AdamW"](ours.parameters()))
    for module, optimizer in ((plain, first), (ours, second)):
        before = weights(module).clone()
        module(torch.ones(2, 64)).sum().backward()
        assert_equal(weights(module), before, "before the step")
        optimizer.step()  # what is left has its step here
        assert not torch.equal(weights(module), before)
    assert_equal(weights(ours), weights(plain), "weights")


def test_not_a_number_is_stepped_as_in_the_plain_run() -> None:
    found = []
    for inside in (False, True):
        module = model()
        optimizer = MAKE["AdamW"](module.parameters())
        if inside:
            step_in_backward_(optimizer)
        module[0].bias.register_hook(lambda gradient: gradient * float("nan"))
        train(module, optimizer, 1)
        found.append(weights(module))
    assert found[0].isnan().any() and not found[0].isnan().all()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prepare", [lambda _: None, partial(use_bitsandbytes_, min_size=1)], ids=["fused", "8 bit"])
def test_a_value_that_is_needed_after_its_step_is_an_error(prepare: Callable[[Optimizer], Any]) -> None:
    late, early = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))
    optimizer = torch.optim.AdamW([late, early], fused=True)
    prepare(optimizer)
    step_in_backward_(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.step(lambda: (torch.randn(4, 16) @ early @ late.detach() @ late).sum().backward())  # type: ignore[arg-type, return-value]


def test_a_copy_steps_by_itself() -> None:
    module = model()
    optimizer = step_in_backward_(MAKE["AdamW"](module.parameters()), Arrivals(change=print))
    other, theirs = copy.deepcopy((module, optimizer))
    before = weights(module).clone()
    train(other, theirs, 1)
    assert_equal(weights(module), before, "the original")
    assert not torch.equal(weights(other), before)


# ------------------------------------------------------------------------------------------------------ the callback


def same(callbacks: Callable[[], list[Callback]] = list, **arguments: Any) -> Run:
    """A run with the callback; the one without is the same."""
    ours = run([*callbacks(), OptimizerInBackward()], **arguments)
    assert_same_training(ours, run(callbacks(), **arguments), "in backward")
    optimizer = ours.trainer.optimizers[0]
    assert not isinstance(optimizer, InBackwardStep)  # it is as it was
    return ours


def pruning() -> GradualPruning:
    return GradualPruning(0.8, start=1, end=20, every=2)


SAME: dict[str, Callable[[], Any]] = {
    "FusedOptimizer": lambda: same(lambda: [FusedOptimizer()]),
    "LowBitOptimizer": lambda: same(lambda: [LowBitOptimizer(min_size=512), FusedOptimizer()]),
    "bitsandbytes": lambda: same(lambda: [LowBitOptimizer(min_size=256, backend="bitsandbytes")]),
    "Muon": lambda: same(lambda: [Muon(exclude=["again"])]),
    "GradualPruning": lambda: same(lambda: [pruning()]),
    "EMA": lambda: same(lambda: [EMA(decay=0.9)]),
    "LearningRateFinder": lambda: same(lambda: [LearningRateFinder(num_steps=10)]),
    "by value": lambda: same(lambda: [GradientClipping(0.001, by="value")]),
    "by unit": lambda: same(lambda: [GradientClipping(0.002, by="adaptive", exclude=["head"])]),
    "by the Trainer": lambda: same(gradient_clip_val=0.001, gradient_clip_algorithm="value"),
    "bf16-mixed": lambda: same(precision="bf16-mixed"),
    "shared": lambda: same(module=partial(Digits, shared=True)),
    "frozen": lambda: same(module=partial(Digits, frozen=True)),
    "some steps": lambda: same(module=SomeSteps),
    "no loss": lambda: same(module=NoLoss),
    "unfrozen": lambda: same(lambda: [Unfreeze()], module=Thawing),
    "validation with a backward pass": lambda: same(module=Attacked),
    "everything": lambda: same(
        lambda: [pruning(), GradientClipping(0.01, by="adaptive"), LowBitOptimizer(min_size=512), EMA(decay=0.9)]
    ),
}
QUICK = {"LowBitOptimizer", "GradualPruning", "by value", "by unit", "some steps"}


class SomeSteps(Digits):
    """Runs the closure by itself in some batches, as Lightning's documentation has it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if batch_idx % 3 != 1:
            optimizer.step(closure=closure)
        else:
            closure()


class NoLoss(Digits):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": torch.zeros(())} if batch_idx == 4 else super().training_step(batch, batch_idx)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:
            loss.backward()


class Thawing(Digits):
    def configure_optimizers(self) -> Any:
        self.conv.requires_grad_(False)
        return self.configured(list(self.parameters()))


class Unfreeze(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            pl_module.conv.requires_grad_(True)


class Attacked(Digits):
    """Goes backward in validation, to the inputs, and leaves gradients of the weights behind."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            self(x).sum().backward()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in SAME])
def test_the_fit_is_the_one_without(name: str) -> None:
    SAME[name]()


def test_a_checkpoint_goes_on_without_it_and_the_reverse(tmp_path: Path) -> None:
    saves = {tmp_path / "half.ckpt": ("train batch end", 4)}
    arguments: dict[str, Any] = {"max_epochs": 1, "train": partial(train_loader, False), "limit_val_batches": 0}
    regular = partial(Digits, regular=False)
    for callbacks in ([], [OptimizerInBackward()]):
        whole = run([ExactResume(), *callbacks], regular, saves=saves, **arguments)
        others = [] if callbacks else [OptimizerInBackward()]
        resumed = run([ExactResume(), *others], regular, ckpt_path=tmp_path / "half.ckpt", **arguments)
        assert_equal(resumed.weights, whole.weights, "resumed")


class Clips(Digits):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        pass


class Quasi(Digits):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Reshapes(AccelCallback):
    contract = Contract("", frozenset({"gradients"}), "", "", "")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "norm": (
        lambda: {"callbacks": [GradientClipping(1.0)]},
        r"clipping by the norm of all.*GradientClipping\(by='adaptive'\)",
    ),
    "Trainer": (lambda: {"gradient_clip_val": 1.0}, "clipping by the norm of all gradients"),
    "own clipping": (lambda: {"module": Clips}, "`configure_gradient_clipping` of Clips, .*and clip with Gradient"),
    "scaler": (
        lambda: {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
        "precision='16-mixed': its scaler looks at all gradients.*Use 'bf16-mixed'",
    ),
    "optimizer": (lambda: {"module": Quasi}, "LBFGS: .*through all parameters at once.*Use another optimizer"),
    "method": (lambda: {"callbacks": [Reshapes()]}, "Reshapes: it changes the gradients of a step together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_gradients_is_refused(name: str) -> None:
    arguments, reason = REFUSED[name]
    given = arguments()
    with pytest.raises(MisconfigurationException, match=f"OptimizerInBackward can't work with {reason}"):
        run([*given.pop("callbacks", []), OptimizerInBackward()], **given)


def test_micro_batches_are_refused_from_either_side() -> None:
    with pytest.raises(MisconfigurationException, match="with MicroBatching: a step is made of the gradient of one"):
        run([OptimizerInBackward(), MicroBatching(2)])
    with pytest.raises(MisconfigurationException, match="with OptimizerInBackward: it steps inside the backward"):
        run([MicroBatching(2), OptimizerInBackward()])


def test_who_looks_for_gradients_is_named() -> None:
    class Logs(Digits):
        def on_after_backward(self) -> None:
            pass

    class Norms(Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            pass

    match = "Logs.on_after_backward and Norms.on_before_optimizer_step will find no gradients"
    with pytest.warns(UserWarning, match=match):
        run([Norms(), OptimizerInBackward()], Logs, max_epochs=1, limit_val_batches=0)
