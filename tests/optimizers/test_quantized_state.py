from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from lightning_accel.errors import NoEffectWarning
from lightning_accel.optimizers.fuse import use_fused_
from lightning_accel.optimizers.layouts import plain_state_dict
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from tests.forking import python
from tests.optimizers.toy import MAKE, final, model, train, weights

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.97**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.01, total_steps=30, cycle_momentum={"betas", "momentum"} & set(o.defaults) != set()
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[5]
    ),
}


def low_bit(name: str, module: nn.Module, **arguments: Any) -> Optimizer:
    return quantize_optimizer_(MAKE[name](module.parameters()), **{"min_size": 512, **arguments})


def codes(optimizer: Optimizer) -> list[Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, dict)]
    return [moment["codes"] for moment in moments]


@pytest.mark.parametrize("name", MAKE)
def test_trains_as_well_as_with_32_bits(name: str) -> None:
    plain, quantized = model(), model()
    optimizer = low_bit(name, quantized)
    expected, got = train(plain, MAKE[name](plain.parameters()), 150), train(quantized, optimizer, 150)
    assert final(expected) < 0.9 * expected[0], "the test itself does not train"
    assert final(got) == pytest.approx(final(expected), rel=0.08)
    assert got != expected and codes(optimizer)


@pytest.mark.parametrize("name", MAKE)
def test_the_first_step_is_that_of_the_optimizer_itself(name: str) -> None:
    plain, quantized = model(), model()
    optimizer = MAKE[name](plain.parameters())
    if isinstance(optimizer, torch.optim.Adam):  # and AdamW: low-bit state is stepped by torch's fused kernel
        (group,) = optimizer.param_groups
        small = [parameter for parameter in group["params"] if parameter.numel() < 512]
        group["params"] = [parameter for parameter in group["params"] if parameter.numel() >= 512]
        group["fused"] = True
        optimizer.add_param_group({"params": small, "fused": False})  # whose last bits may be others
    train(plain, optimizer, 1)
    train(quantized, low_bit(name, quantized), 1)
    assert torch.equal(weights(plain), weights(quantized))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", MAKE)
def test_schedulers_made_before_and_after_step_the_optimizer(name: str, scheduler: str) -> None:
    rates = {}
    for made in ("plain", "before", "after"):
        module = model()
        optimizer = MAKE[name](module.parameters())
        schedule = SCHEDULERS[scheduler](optimizer) if made != "after" else None
        if made != "plain":
            quantize_optimizer_(optimizer, min_size=512)
        schedule = schedule or SCHEDULERS[scheduler](optimizer)
        rates[made] = []
        for step in range(12):
            train(module, optimizer, 1, step, schedule)
            rates[made].append(optimizer.param_groups[0]["lr"])
        assert not torch.equal(weights(module), weights(model()))
        assert bool(codes(optimizer)) == (made != "plain")
    # a plateau of the loss depends on the loss
    if scheduler != "ReduceLROnPlateau":
        assert rates["before"] == rates["after"] == rates["plain"]


def test_a_scheduler_that_steps_first_still_warns() -> None:
    module = model()
    optimizer = MAKE["AdamW"](module.parameters())
    schedule = SCHEDULERS["LambdaLR"](optimizer)
    quantize_optimizer_(optimizer)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        schedule.step()


def test_it_is_the_same_object_of_the_same_class_with_its_hooks_and_groups() -> None:
    module = model()
    optimizer = torch.optim.AdamW([{"params": module[0].parameters(), "lr": 0.5}, {"params": module[2].parameters()}])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    groups = optimizer.param_groups
    assert quantize_optimizer_(optimizer, min_size=512) is optimizer
    assert isinstance(optimizer, torch.optim.AdamW) and type(optimizer).__name__ == "AdamW"
    train(module, optimizer, 2)
    assert calls == ["pre", "post"] * 2
    assert optimizer.param_groups is groups
    assert [len(group["params"]) for group in groups] == [2, 2] and groups[0]["lr"] == 0.5


def test_what_is_small_or_kept_has_32_bits_and_what_is_frozen_or_unused_has_no_state() -> None:
    module = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)])
    module[2].requires_grad_(False)
    optimizer = low_bit("AdamW", module, keep=[module[1].weight])
    module[1](module[0](torch.ones(1, 64))).sum().backward()
    optimizer.step()
    assert set(optimizer.state) == {module[0].weight, module[0].bias, module[1].weight, module[1].bias}
    assert isinstance(optimizer.state[module[0].weight]["exp_avg"], dict)
    for parameter in (module[0].bias, module[1].weight, module[1].bias):
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32


def test_the_state_of_adam_takes_two_bytes_and_a_scale() -> None:
    module = nn.Linear(1024, 256, bias=False)
    optimizer = quantize_optimizer_(torch.optim.Adam(module.parameters()))
    module(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    moments = [value for value in optimizer.state[module.weight].values() if isinstance(value, dict)]
    size = sum(tensor.nbytes for moment in moments for tensor in moment.values())
    assert size / module.weight.numel() == pytest.approx(2.03, abs=0.01)


def test_tied_parameters_empty_groups_and_groups_added_later() -> None:
    module = model()
    optimizer = torch.optim.AdamW([{"params": []}, {"params": [*module.parameters()]}])
    quantize_optimizer_(optimizer, min_size=512)
    shared = nn.Linear(64, 64, bias=False)
    optimizer.add_param_group({"params": list(shared.parameters())})
    shared(shared(torch.ones(1, 64))).sum().backward()
    optimizer.step()
    assert len(codes(optimizer)) == 2


def test_resume_is_exact_in_a_new_process(tmp_path: Path) -> None:
    script = """
import sys, torch
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from tests.optimizers.toy import MAKE, model, train, weights
for name in MAKE:
    module = model(1)
    optimizer = quantize_optimizer_(MAKE[name](module.parameters()), min_size=512)
    saved = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(module, optimizer, 3, start=4)
    assert torch.equal(weights(module), saved["weights"]), name
    for before, after in zip(saved["state"].values(), optimizer.state_dict()["state"].values()):
        for key, value in before.items():
            if isinstance(value, dict):
                assert all(torch.equal(after[key][part], value[part]) for part in value), (name, key)
                assert after[key]["codes"].dtype == value["codes"].dtype
            else:
                assert torch.equal(after[key], value), (name, key)
print("done", end="")
"""
    for name in MAKE:
        module = model()
        optimizer = low_bit(name, module)
        train(module, optimizer, 4)
        saved = copy.deepcopy({"model": module.state_dict(), "optimizer": optimizer.state_dict()})
        train(module, optimizer, 3, start=4)
        after = {"weights": weights(module), "state": optimizer.state_dict()["state"]}
        torch.save({**saved, **after}, tmp_path / f"{name}.pt")
    done = subprocess.run([python(), "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done", done.stderr


@pytest.mark.parametrize("name", MAKE)
def test_a_32_bit_checkpoint_is_converted_and_said(name: str) -> None:
    module, said = model(), []
    plain = MAKE[name](module.parameters())
    train(module, plain, 20)
    saved = copy.deepcopy(plain.state_dict())
    optimizer = low_bit(name, module, say=said.append)
    optimizer.load_state_dict(saved)
    assert len(said) == 1 and "8 bits" in said[0]
    for key, exact in saved["state"][0].items():
        decoded = plain_state_dict(optimizer.state_dict(), optimizer)["state"][0][key]
        assert torch.allclose(decoded, exact, rtol=0.13, atol=3e-6 * exact.abs().max().item())
    before = {code.dtype for code in codes(optimizer)}
    train(module, optimizer, 2, start=20)
    assert {code.dtype for code in codes(optimizer)} == before <= {torch.int8, torch.uint8}


def test_a_low_bit_checkpoint_is_decoded_for_a_plain_optimizer() -> None:
    module = model()
    optimizer = low_bit("AdamW", module)
    train(module, optimizer, 20)
    plain = MAKE["AdamW"](module.parameters())
    plain.load_state_dict(plain_state_dict(optimizer.state_dict(), plain))
    assert "low_bit_step" not in plain.param_groups[0]
    assert plain.state[module[0].weight]["exp_avg"].dtype == torch.float32
    losses = train(module, plain, 20, start=20)
    assert losses[-1] < 0.9 * losses[0]


def test_other_arguments_at_resume_are_followed() -> None:
    module = model()
    optimizer = low_bit("AdamW", module)
    train(module, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    other = low_bit("AdamW", module, keep=[module[0].weight], min_size=600, say=lambda message: None)
    other.load_state_dict(saved)
    assert other.state[module[0].weight]["exp_avg"].dtype == torch.float32
    assert isinstance(other.state[module[2].weight]["exp_avg"], dict)
    train(module, other, 2)


def test_of_a_centered_optimizer_only_the_momentum_is_quantised() -> None:
    """Its variance is a small difference of two averages, and its root would be NaN where that became negative."""
    module = model()
    optimizer = low_bit("RMSprop centered", module)
    train(module, optimizer, 2)
    state = optimizer.state[module[0].weight]
    assert isinstance(state["momentum_buffer"], dict)
    assert state["square_avg"].dtype == state["grad_avg"].dtype == torch.float32


def test_state_that_exists_already_is_quantised_at_once() -> None:
    optimizer = low_bit("Adagrad", model())  # it makes its state in the constructor
    assert len(codes(optimizer)) == 2


@pytest.mark.parametrize("name", ["AdamW", "Adam L2", "Adam amsgrad", "SGD nesterov", "RMSprop", "Adamax"])
def test_moments_of_pruned_weights_decay_to_exactly_nothing(name: str) -> None:
    module = model()
    pruned = torch.rand_like(module[0].weight) < 0.5
    optimizer = low_bit(name, module)
    train(module, optimizer, 3)
    module[0].weight.register_hook(lambda grad: grad.masked_fill(pruned, 0))
    moved = []
    for step in range(3, 250):
        module[0].weight.data[pruned] = 0
        train(module, optimizer, 1, start=step)
        moved.append(module[0].weight[pruned].abs().max().item())
    assert moved[-1] == 0
    assert moved[0] > 0 or name == "RMSprop"


def test_pruned_from_the_start_stays_exactly_zero() -> None:
    for name in MAKE:
        module = model()
        pruned = torch.rand_like(module[0].weight) < 0.5
        module[0].weight.data[pruned] = 0
        module[0].weight.register_hook(lambda grad, pruned=pruned: grad.masked_fill(pruned, 0))
        train(module, low_bit(name, module), 30)
        assert (module[0].weight[pruned] == 0).all(), name


def test_the_fused_step_is_used_inside() -> None:
    modules = [model(), model()]
    for module in modules:
        optimizer = MAKE["AdamW"](module.parameters())
        if module is modules[1]:
            assert use_fused_(optimizer) == [("fused", "")]
        quantize_optimizer_(optimizer, min_size=512)
        losses = train(module, optimizer, 40)
        assert optimizer.param_groups[0]["fused"] is (True if module is modules[1] else None)
        assert final(losses) < 2
    assert torch.allclose(weights(modules[0]), weights(modules[1]), atol=2e-2)


def test_large_parameters_are_stepped_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_accel.optimizers.quantized_state as under_test

    results, sizes = [], []
    original = torch.optim.RMSprop._init_group

    def spy(self: Any, group: Any, *args: Any) -> Any:
        sizes.append(len(group["params"]))
        return original(self, group, *args)

    monkeypatch.setattr(torch.optim.RMSprop, "_init_group", spy)
    for bucket, expected in ((1, [1] * 12), (2**20, [4] * 3)):
        monkeypatch.setattr(under_test, "_BUCKET", bucket)
        module = model()
        sizes.clear()
        train(module, low_bit("RMSprop", module), 3)
        assert sizes == expected
        results.append(weights(module))
    assert torch.equal(*results)


def test_the_closure_is_called_once_with_gradients_enabled() -> None:
    module, calls = model(), []
    optimizer = low_bit("AdamW", module)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = module(torch.ones(2, 64)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() > 0
    assert calls == [True]


LAYOUTS = (torch.channels_last, torch.contiguous_format)


def test_channels_last_parameters_keep_their_layout() -> None:
    layers = [
        nn.Conv2d(16, 32, 3).to(memory_format=memory) for memory in (torch.channels_last, torch.contiguous_format)
    ]
    layers[0].load_state_dict(layers[1].state_dict())
    x = torch.randn(2, 16, 8, 8)
    for layer in layers:
        optimizer = quantize_optimizer_(torch.optim.AdamW(layer.parameters(), fused=True), min_size=512)
        for _ in range(2):
            layer(x).square().mean().backward()
            optimizer.step()
    moment = optimizer.state[layers[1].weight]["exp_avg"]["codes"]
    assert moment.is_contiguous() and layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layers[0].weight, layers[1].weight, atol=1e-3)
    # a checkpoint of one layout in a module of the other
    other = quantize_optimizer_(torch.optim.AdamW(layers[0].parameters(), fused=True), min_size=512)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    layers[0].load_state_dict(layers[1].state_dict())
    for layer, stepped in zip(layers, (other, optimizer), strict=True):
        layer.weight.grad = torch.zeros_like(layer.weight)
        stepped.step()
    assert torch.allclose(layers[0].weight, layers[1].weight, atol=1e-6)


def test_a_copy_is_quantised_too() -> None:
    module = model()
    optimizer = low_bit("AdamW", module)
    train(module, optimizer, 2)
    module_copy, optimizer_copy = copy.deepcopy((module, optimizer))
    train(module, optimizer, 2, start=2)
    train(module_copy, optimizer_copy, 2, start=2)
    assert torch.equal(weights(module), weights(module_copy)) and codes(optimizer_copy)


def test_bfloat16_parameters_decode_to_bfloat16() -> None:
    module = nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = quantize_optimizer_(torch.optim.AdamW(module.parameters(), lr=0.1))
    before = weights(module).clone()
    for _ in range(3):
        module(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    moment = optimizer.state[module.weight]["exp_avg"]
    assert moment["codes"].dtype == torch.int8 and moment["scales"].dtype == torch.bfloat16
    assert not torch.equal(before, weights(module))


class Custom(Optimizer):
    """Counts its steps in the group, as torch's own never do, and keeps a copy of the weights."""

    def __init__(self, params: Any, moment: str = "exp_avg") -> None:
        super().__init__(params, {"lr": 0.01, "moment": moment, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["calls"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state[group["moment"]] = torch.zeros_like(parameter)
                    state["start"] = parameter.clone()
                state[group["moment"]].lerp_(parameter.grad, 0.1)
                parameter.sub_(state[group["moment"]], alpha=group["lr"])
        return loss


def test_an_optimizer_of_ones_own_is_stepped_once_and_only_known_state_is_quantised() -> None:
    module = model()
    optimizer = quantize_optimizer_(Custom(module.parameters()), min_size=512)
    train(module, optimizer, 3)
    state = optimizer.state[module[0].weight]
    assert optimizer.param_groups[0]["calls"] == 3
    assert isinstance(state["exp_avg"], dict) and torch.equal(state["start"], model()[0].weight)


def test_names_of_other_moments_may_be_given_and_none_at_all_warns() -> None:
    module = model()
    with pytest.warns(NoEffectWarning, match="name it in `moments`"):
        train(module, quantize_optimizer_(Custom(module.parameters(), "velocity"), min_size=512), 2)
    optimizer = quantize_optimizer_(Custom(module.parameters(), "velocity"), 512, moments={"velocity": True})
    train(module, optimizer, 2)
    assert optimizer.state[module[0].weight]["velocity"]["codes"].dtype == torch.int8


def test_state_is_encoded_again_after_an_exception() -> None:
    class Fails(torch.optim.AdamW):
        fail = False

        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise RuntimeError("out of luck")
            return super().step(closure)

    module = model()
    optimizer = quantize_optimizer_(Fails(module.parameters()), min_size=512)
    train(module, optimizer, 1)
    optimizer.fail = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of luck"):
        train(module, optimizer, 1)
    assert len(codes(optimizer)) == 4


def test_refusals_name_the_reason() -> None:
    module = model()
    with pytest.raises(ValueError, match="history of gradients"):
        quantize_optimizer_(torch.optim.LBFGS(module.parameters()))
    with pytest.raises(ValueError, match="sparse gradients"):
        quantize_optimizer_(torch.optim.SparseAdam(list(module.parameters())))
    with pytest.raises(ValueError, match="differentiable=False"):
        quantize_optimizer_(torch.optim.AdamW(module.parameters(), differentiable=True))
    with pytest.raises(ValueError, match="quantised already"):
        quantize_optimizer_(low_bit("AdamW", module))
    wrapped = MAKE["AdamW"](module.parameters())
    wrapped.step = lambda closure=None: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="was replaced"):
        quantize_optimizer_(wrapped)
    with pytest.raises(ValueError, match="Expected `min_size`"):
        quantize_optimizer_(MAKE["AdamW"](module.parameters()), min_size=0)


def test_sparse_gradients_are_refused_by_name_unless_the_state_is_kept_in_32_bits() -> None:
    layer = nn.Embedding(64, 64, sparse=True)
    for keep, names in (([], {layer.weight: "words"}), ([layer.weight], {})):
        optimizer = quantize_optimizer_(torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9), keep=keep, names=names)
        layer(torch.tensor([1])).sum().backward()
        if keep:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match=r"'words' is sparse.*keep_32bit"):
                optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon() -> None:
    layers = [nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        optimizer: Optimizer = torch.optim.Muon(layer.parameters())
        if layer is layers[1]:
            quantize_optimizer_(optimizer)
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            layer(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
    assert len(codes(optimizer)) == 1
    assert torch.allclose(layers[0].weight, layers[1].weight, atol=1e-3)
