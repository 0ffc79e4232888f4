from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import FusedOptimizer
from lightning_accel.errors import NoEffectWarning
from lightning_accel.optimizers.fuse import sparse_parameters, use_fused_
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from tests.optimizers.toy import MAKE, digits, model, train, weights

FUSED = {"AdamW", "Adam", "Adam L2", "Adam amsgrad", "Adam maximize", "SGD", "SGD nesterov", "SGD dampening", "Adagrad"}


@pytest.mark.parametrize("name", MAKE)
def test_the_same_run_up_to_rounding(name: str) -> None:
    plain, fused = model(), model()
    optimizer = MAKE[name](fused.parameters())
    change = "fused" if name in FUSED else "foreach"
    assert use_fused_(optimizer) == [(change, "")]
    assert optimizer.param_groups[0][change] is True
    expected, got = train(plain, MAKE[name](plain.parameters()), 20), train(fused, optimizer, 20)
    assert got == pytest.approx(expected, rel=1e-3)


def test_fused_kernels_really_run() -> None:
    module = model()
    optimizer = MAKE["AdamW"](module.parameters())
    use_fused_(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(module, optimizer, 1)
    assert any("_fused_adamw_" in event.key for event in profile.key_averages())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), "fused already"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "differentiable"),
        (lambda p: torch.optim.LBFGS(p), "no fused step"),
        (lambda p: torch.optim.SparseAdam(list(p)), "no fused step"),
        (lambda p: torch.optim.RMSprop(p, foreach=False), "`foreach` was set to False"),
        (lambda p: torch.optim.RMSprop(p, lr=torch.tensor(0.1)), "by itself"),
        (lambda p: quantize_optimizer_(torch.optim.AdamW(p)), "no fused step"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {"step": lambda self: None})(p), "Mine has no fused step"),
    ],
)
def test_what_cannot_be_fused_is_left_alone(make: Any, reason: str) -> None:
    optimizer = make(model().parameters())
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    ((change, why),) = use_fused_(optimizer)
    assert change == "" and reason in why
    assert groups == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def test_a_subclass_that_keeps_torchs_step_is_fused() -> None:
    assert use_fused_(type("Mine", (torch.optim.AdamW,), {})(model().parameters())) == [("fused", "")]


def test_large_parameters_on_the_cpu_do_not_get_the_multi_tensor_step() -> None:
    ((change, reason),) = use_fused_(torch.optim.RMSprop([nn.Parameter(torch.zeros(200, 200))]))
    assert change == "" and "slower for large parameters" in reason


def test_complex_parameters_are_not_fused() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    assert use_fused_(torch.optim.AdamW([weight])) == [("foreach", "")]


def test_each_group_is_decided_alone_and_later_groups_follow() -> None:
    words, layer = nn.Embedding(4, 4, sparse=True), nn.Linear(4, 4)
    optimizer = torch.optim.SGD([{"params": words.parameters()}, {"params": layer.parameters()}], momentum=0.9)
    result = use_fused_(optimizer, sparse_parameters(nn.ModuleList([words, layer])))
    assert result == [("", "its gradients are sparse"), ("fused", "")]
    layer(words(torch.tensor([1]))).sum().backward()
    optimizer.step()
    optimizer = MAKE["AdamW"](layer.parameters())
    use_fused_(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert optimizer.param_groups[1]["fused"] is True


@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
def test_a_checkpoint_of_a_plain_run_does_not_switch_it_off(name: str) -> None:
    module = model()
    plain = MAKE[name](module.parameters())
    train(module, plain, 3)
    optimizer = MAKE[name](module.parameters())
    use_fused_(optimizer)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups[0]["fused"] is True
    copies = copy.deepcopy((module, plain))
    assert train(module, optimizer, 3, start=3) == pytest.approx(train(*copies, 3, start=3), rel=1e-4)


def test_gradients_and_moments_of_another_layout_are_stepped_right() -> None:
    """torch's fused kernels read parameter, gradient and moments as one line of memory, whatever their layouts."""
    reference = nn.Conv2d(4, 8, 3)
    layer = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    plain, fused = torch.optim.AdamW(reference.parameters(), lr=0.1), torch.optim.AdamW(layer.parameters(), lr=0.1)
    use_fused_(fused)
    for step in range(3):
        for module in (reference, layer):
            for parameter in module.parameters():
                torch.manual_seed(step)
                parameter.grad = torch.randn(parameter.shape)
        plain.step()
        fused.step()
        if step == 1:
            fused.load_state_dict(copy.deepcopy(plain.state_dict()))  # with contiguous moments
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer.weight, reference.weight, atol=1e-5)


class Net(LightningModule):
    def __init__(self, make: Any, parts: int = 1, sparse: bool = False) -> None:
        super().__init__()
        self.net, self.make, self.parts = model(), make, parts
        self.words = nn.Embedding(4, 4, sparse=True) if sparse else None
        self.automatic_optimization = parts == 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> list[Optimizer]:
        if self.parts == 1:
            return [self.make(self.parameters())]
        return [self.make(self.net[0].parameters()), self.make(self.net[2].parameters())]


def fit(net: Net, *callbacks: Any, loader: type = DataLoader, resume: str | None = None, **arguments: Any) -> Trainer:
    images, labels = digits()
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "callbacks": list(callbacks)}
    trainer = Trainer(**{**options, **arguments})
    trainer.fit(net, loader(TensorDataset(images[:96], labels[:96]), batch_size=16), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("parts", [1, 2])
def test_in_a_fit_every_optimizer_is_fused(parts: int) -> None:
    callback, net, plain = FusedOptimizer(), Net(MAKE["AdamW"], parts), Net(MAKE["AdamW"], parts)
    trainer = fit(net, callback, **({"gradient_clip_val": 1.0} if parts == 1 else {}))
    fit(plain, **({"gradient_clip_val": 1.0} if parts == 1 else {}))
    assert callback.choices == ["AdamW: fused"] * parts
    assert all(optimizer.param_groups[0]["fused"] for optimizer in trainer.optimizers)
    assert torch.allclose(weights(net), weights(plain), atol=1e-5)


def test_switched_off_it_is_the_plain_run() -> None:
    callback, net, plain = FusedOptimizer(enabled=False), Net(MAKE["AdamW"]), Net(MAKE["AdamW"])
    trainer = fit(net, callback)
    fit(plain)
    assert callback.is_neutral and not FusedOptimizer().is_neutral
    assert torch.equal(weights(net), weights(plain))
    assert trainer.optimizers[0].param_groups[0]["fused"] is None


def test_no_effect_is_told() -> None:
    with pytest.warns(NoEffectWarning, match="FusedOptimizer has no effect: AdamW: it is fused already"):
        fit(Net(lambda p: torch.optim.AdamW(p, fused=True)), FusedOptimizer())
    with pytest.warns(NoEffectWarning, match="sparse"):
        fit(Net(lambda p: torch.optim.SGD(p, 0.1), sparse=True), FusedOptimizer())


def test_arguments() -> None:
    with pytest.raises(TypeError, match="Expected `enabled` to be a bool, but got 1"):
        FusedOptimizer(enabled=1)  # type: ignore[arg-type]
