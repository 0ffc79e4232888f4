from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.optimizers.bitsandbytes_state import (
    bitsandbytes_missing,
    bitsandbytes_refusal,
    paged_refusal,
    use_bitsandbytes_,
)
from lightning_accel.optimizers.layouts import plain_state_dict
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from tests.forking import python
from tests.optimizers.test_quantized_state import SCHEDULERS
from tests.optimizers.toy import MAKE, final, model, train, weights

bnb = pytest.importorskip("bitsandbytes")
SAME_MATHS = ["AdamW", "Adam", "SGD", "RMSprop"]
OTHER_MATHS = {
    "Adam L2": "decouples `weight_decay`",
    "Adam amsgrad": "`amsgrad`",
    "Adam maximize": "`maximize`",
    "SGD nesterov": "`nesterov`",
    "SGD dampening": "`dampening`",
    "RMSprop centered": "`centered`",
    "Adagrad": "maths of Adagrad",
    "Adadelta": "maths of Adadelta",
    "Adamax": "maths of Adamax",
    "NAdam": "maths of NAdam",
    "RAdam": "maths of RAdam",
}


def low_bit(name: str, module: nn.Module, **arguments: Any) -> Optimizer:
    return use_bitsandbytes_(MAKE[name](module.parameters()), **{"min_size": 512, **arguments})


def test_every_optimizer_is_in_one_of_the_lists() -> None:
    assert set(SAME_MATHS) | set(OTHER_MATHS) == set(MAKE)


@pytest.mark.parametrize("name", SAME_MATHS)
def test_trains_as_well_as_with_32_bits(name: str) -> None:
    plain, quantized = model(), model()
    optimizer = low_bit(name, quantized)
    expected, got = train(plain, MAKE[name](plain.parameters()), 150), train(quantized, optimizer, 150)
    assert final(got) == pytest.approx(final(expected), rel=0.08)
    assert optimizer.state[quantized[0].weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", SAME_MATHS)
def test_the_first_step_is_that_of_torch(name: str, weight_decay: float) -> None:
    plain, quantized = model(), model()
    for module, wrap in ((plain, lambda o: o), (quantized, lambda o: use_bitsandbytes_(o, min_size=512))):
        optimizer = MAKE[name](module.parameters())
        optimizer.param_groups[0]["weight_decay"] = 0.0 if name == "Adam" else weight_decay
        train(module, wrap(optimizer), 1)
    assert torch.allclose(weights(plain), weights(quantized), atol=1e-6)


@pytest.mark.parametrize("name", SAME_MATHS)
def test_it_is_bitsandbytes_own_step(name: str) -> None:
    ours, theirs = model(), model()
    optimizer = low_bit(name, ours)
    group = optimizer.param_groups[0]
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "min_8bit_size": 512}
    options |= {"momentum": 0.9} if name == "SGD" else {}
    own = getattr(bnb.optim, f"{name}8bit")(theirs.parameters(), **options)
    assert train(ours, optimizer, 5) == train(theirs, own, 5)
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("name", OTHER_MATHS)
def test_other_maths_is_refused_by_the_name_of_the_option(name: str) -> None:
    optimizer = MAKE[name](model().parameters())
    with pytest.raises(ValueError, match=OTHER_MATHS[name]):
        use_bitsandbytes_(optimizer)
    assert type(optimizer).__module__.startswith("torch.optim")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "without momentum"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), "ignores the `momentum`"),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)), "tensors"),
        (lambda p: torch.optim.AdamW(p, capturable=True), "`capturable`"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})(p), "maths of Mine"),
    ],
)
def test_options_that_bitsandbytes_does_not_have(make: Any, reason: str) -> None:
    assert reason in bitsandbytes_refusal(make(model().parameters()))


def test_other_parameters_than_bitsandbytes_can_take() -> None:
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    assert "memory layout" in bitsandbytes_refusal(torch.optim.AdamW(layer.parameters()))
    complex_weight = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    assert "complex64" in bitsandbytes_refusal(torch.optim.AdamW([complex_weight]))


def test_decoupled_decay_of_adam_is_the_same_maths() -> None:
    optimizer = torch.optim.Adam(model().parameters(), weight_decay=0.1, decoupled_weight_decay=True)
    assert bitsandbytes_refusal(optimizer) == ""


def test_an_option_changed_during_training_is_refused() -> None:
    module = model()
    optimizer = low_bit("Adam", module)
    train(module, optimizer, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match=r"decouples `weight_decay`.*backend='generic'"):
        train(module, optimizer, 1)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", SAME_MATHS)
def test_schedulers_made_before_and_after(name: str, scheduler: str) -> None:
    if (name, scheduler) == ("RMSprop", "OneCycleLR"):  # it writes a momentum, which bitsandbytes ignores for RMSprop
        optimizer = MAKE[name](model().parameters())
        SCHEDULERS[scheduler](optimizer)
        assert "ignores the `momentum`" in bitsandbytes_refusal(optimizer)
        return
    results = []
    for before in (True, False):
        module = model()
        optimizer = MAKE[name](module.parameters())
        schedule = SCHEDULERS[scheduler](optimizer) if before else None
        use_bitsandbytes_(optimizer, min_size=512)
        train(module, optimizer, 12, scheduler=schedule or SCHEDULERS[scheduler](optimizer))
        results.append((weights(module), optimizer.param_groups[0]["lr"]))
        assert "betas" in optimizer.param_groups[0] or name not in ("Adam", "AdamW")
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_the_momentum_that_a_schedule_writes_is_the_one_that_is_used() -> None:
    """SGD8bit itself reads `betas`, which OneCycleLR does not write for SGD."""
    modules = [model(), model()]
    for module in modules:
        optimizer = MAKE["SGD"](module.parameters())
        if module is modules[1]:
            use_bitsandbytes_(optimizer, min_size=10**6)  # 32-bit state: the same up to rounding
        train(module, optimizer, 25, scheduler=SCHEDULERS["OneCycleLR"](optimizer))
    assert torch.allclose(weights(modules[0]), weights(modules[1]), atol=1e-5)


def test_hooks_run_once_and_the_object_stays() -> None:
    module, calls = model(), []
    optimizer = MAKE["AdamW"](module.parameters())
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    assert use_bitsandbytes_(optimizer, min_size=512) is optimizer
    assert isinstance(optimizer, torch.optim.AdamW) and isinstance(optimizer, bnb.optim.AdamW8bit)
    assert type(optimizer).__name__ == "AdamW"
    train(module, optimizer, 3)
    assert calls == ["post"] * 3


def test_kept_parameters_have_32_bits_and_the_process_wide_manager_is_not_involved() -> None:
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    module = model()
    optimizer = low_bit("AdamW", module, keep=[module[0].weight])
    train(module, optimizer, 1)
    assert optimizer.state[module[0].weight]["state1"].dtype == torch.float32
    assert optimizer.state[module[2].weight]["state1"].dtype == torch.uint8
    assert optimizer.state[module[2].bias]["state1"].dtype == torch.float32
    manager = GlobalOptimManager.get_instance()
    assert not manager.pid2config and not manager.index2config and not manager.module_weight_config_triple


def test_sparse_gradients_are_refused() -> None:
    layer = nn.Embedding(64, 64, sparse=True)
    optimizer = use_bitsandbytes_(torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9), names={layer.weight: "words"})
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="'words' is sparse"):
        optimizer.step()


def test_the_closure_is_called_once_with_gradients_enabled() -> None:
    module, calls = model(), []
    optimizer = low_bit("AdamW", module)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = module(torch.ones(2, 64)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and calls == [True]


def test_resume_is_exact_in_a_new_process(tmp_path: Path) -> None:
    script = """
import sys, torch
from lightning_accel.optimizers.bitsandbytes_state import use_bitsandbytes_
from tests.optimizers.toy import MAKE, model, train, weights
for name in ["AdamW", "SGD", "RMSprop"]:
    module = model(1)
    optimizer = use_bitsandbytes_(MAKE[name](module.parameters()), min_size=512)
    saved = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state[module[0].weight]["state1"].dtype == torch.uint8
    assert type(optimizer.state[module[0].weight]["step"]) is int
    train(module, optimizer, 3, start=4)
    assert torch.equal(weights(module), saved["weights"]), name
print("done", end="")
"""
    for name in ["AdamW", "SGD", "RMSprop"]:
        module = model()
        optimizer = low_bit(name, module)
        train(module, optimizer, 4)
        saved = copy.deepcopy({"model": module.state_dict(), "optimizer": optimizer.state_dict()})
        train(module, optimizer, 3, start=4)
        torch.save({**saved, "weights": weights(module)}, tmp_path / f"{name}.pt")
    done = subprocess.run([python(), "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done", done.stderr


BACKENDS: dict[str, Any] = {
    "plain": lambda optimizer, **_: optimizer,
    "generic": lambda optimizer, **arguments: quantize_optimizer_(optimizer, min_size=512, **arguments),
    "bitsandbytes": lambda optimizer, **arguments: use_bitsandbytes_(optimizer, min_size=512, **arguments),
}


@pytest.mark.parametrize("to", ["generic", "bitsandbytes"])
@pytest.mark.parametrize("source", BACKENDS)
@pytest.mark.parametrize("name", SAME_MATHS)
def test_a_checkpoint_of_any_layout_loads_and_a_conversion_is_said(name: str, source: str, to: str) -> None:
    module, said = model(), []
    first = BACKENDS[source](MAKE[name](module.parameters()))
    train(module, first, 30)
    second = BACKENDS[to](MAKE[name](module.parameters()), say=said.append)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert len(said) == (source != to)
    before, after = (plain_state_dict(optimizer.state_dict(), optimizer)["state"] for optimizer in (first, second))
    assert before.keys() == after.keys()
    for index in before:
        assert before[index].keys() == after[index].keys()
        for key, value in before[index].items():
            largest = value.abs().max().item()
            assert torch.allclose(after[index][key].float(), value.float(), rtol=0.2, atol=2e-3 * largest), key
    expected = train(*copied(module, first), 5, start=30) if source == "plain" else None
    got = train(module, second, 5, start=30)
    if expected:
        assert got == pytest.approx(expected, rel=0.02)


def copied(module: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    return copy.deepcopy((module, optimizer))


def test_state_without_a_momentum_yet_starts_afresh() -> None:
    module = model()
    optimizer = low_bit("SGD", module)
    optimizer.load_state_dict(MAKE["SGD"](module.parameters()).state_dict())
    train(module, optimizer, 1)
    assert optimizer.state[module[0].weight]["step"] == 1


def test_a_fused_optimizer_gives_up_its_fused_step_and_gradient_scaling() -> None:
    optimizer = use_bitsandbytes_(torch.optim.AdamW(model().parameters(), fused=True))
    assert optimizer.param_groups[0]["fused"] is None and not hasattr(optimizer, "_step_supports_amp_scaling")


PAGED = "lightning_accel.optimizers.bitsandbytes_state.paged_refusal"


def test_what_can_not_be_paged_is_told() -> None:
    assert "no paged SGD" in paged_refusal(MAKE["SGD"](model().parameters()))
    assert "there are parameters on the cpu device" in paged_refusal(MAKE["AdamW"](model().parameters()))
    with pytest.raises(ValueError, match=r"state can be paged, but .* on the cpu device"):
        low_bit("AdamW", model(), paged=True)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("source", ["itself", "plain"])
def test_loaded_state_is_paged_again(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a buffer of the CPU in the place of one that a GPU pages: bitsandbytes itself would load it unpaged."""

    def get_state_buffer(self: Any, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        buffer: Any = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True
        return buffer

    kernel = getattr(bnb.optim, f"Paged{name}8bit")
    monkeypatch.setattr(PAGED, lambda optimizer: "")
    monkeypatch.setattr(kernel, "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(kernel, "prefetch_state", lambda *_: None)
    plain, paged = model(), model()
    optimizers = [low_bit(name, plain), low_bit(name, paged, paged=True)]
    assert isinstance(optimizers[1], kernel)
    assert train(plain, optimizers[0], 3) == train(paged, optimizers[1], 3)
    saved = optimizers[1].state_dict()
    if source == "plain":
        saved = plain_state_dict(saved, optimizers[1])
    unpaged, again = low_bit(name, plain), low_bit(name, paged, paged=True)
    for optimizer in (unpaged, again):
        optimizer.load_state_dict(copy.deepcopy(saved))
    assert train(paged, again, 2, start=3) == train(plain, unpaged, 2, start=3)
    assert torch.equal(weights(paged), weights(plain))
    moments = [value for state in again.state.values() for key, value in state.items() if key in ("state1", "state2")]
    assert len(moments) == 8 and all(moment.is_paged for moment in moments)
    assert {moment.dtype for moment in moments} == {torch.uint8, torch.float32}


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bitsandbytes_missing("cpu") == ""
    bitsandbytes_missing.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert bitsandbytes_missing("cpu") == "bitsandbytes is not installed"
    bitsandbytes_missing.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(bnb.optim.AdamW8bit, "step", lambda self: 1 / 0)
    assert "does not work on cpu here (ZeroDivisionError" in bitsandbytes_missing("cpu")
    bitsandbytes_missing.cache_clear()
