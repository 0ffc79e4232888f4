"""State by torchao, whose step is not compiled on the CPU."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.hooks.tensors import tensors_in
from lightning_accel.optimizers.bitsandbytes_state import use_bitsandbytes_
from lightning_accel.optimizers.layouts import plain_state_dict, torchao_parts
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from lightning_accel.optimizers.torchao_state import torchao_missing, torchao_refusal, use_torchao_
from tests.optimizers.test_quantized_state import SCHEDULERS
from tests.optimizers.toy import MAKE, final, model, train, weights

torchao = pytest.importorskip("torchao.optim")
SAME_MATHS = ["AdamW", "Adam", "Adam L2"]
SUFFIX: dict[Any, str] = {8: "8bit", 4: "4bit", "fp8": "Fp8"}


def low_bit(name: str, module: nn.Module, **arguments: Any) -> Optimizer:
    return use_torchao_(MAKE[name](module.parameters()), **{"min_size": 512, **arguments})


def coded(optimizer: Optimizer) -> dict[int, list[str]]:
    """The moments of each parameter that are coded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        index: [name for name, value in optimizer.state[parameter].items() if torchao_parts(value)]
        for index, parameter in enumerate(parameters)
    }


@pytest.mark.parametrize("bits", SUFFIX)
@pytest.mark.parametrize("name", SAME_MATHS)
def test_it_is_torchaos_own_step(name: str, bits: Any) -> None:
    ours, theirs = model(), model()
    optimizer = low_bit(name, ours, bits=bits, min_size=4096)
    group = optimizer.param_groups[0]
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    own = getattr(torchao, name.split()[0] + SUFFIX[bits])(theirs.parameters(), **options)
    losses = train(ours, optimizer, 5)
    with torch.compiler.set_stance("force_eager"):
        assert train(theirs, own, 5) == losses
    assert torch.equal(weights(ours), weights(theirs))
    assert coded(optimizer)[0] == ["exp_avg", "exp_avg_sq"] and not coded(optimizer)[2]
    assert own.state[theirs[0].weight]["exp_avg"].codes.equal(optimizer.state[ours[0].weight]["exp_avg"].codes)


@pytest.mark.parametrize("name", SAME_MATHS)
def test_the_first_step_is_that_of_torch(name: str) -> None:
    plain, quantized = model(), model()
    for module, wrap in ((plain, lambda o: o), (quantized, lambda o: use_torchao_(o, min_size=512, bits=4))):
        optimizer = MAKE[name](module.parameters())
        optimizer.param_groups[0]["weight_decay"] *= 30
        train(module, wrap(optimizer), 1)
    assert torch.allclose(weights(plain), weights(quantized), atol=1e-6)


@pytest.mark.parametrize(("bits", "within"), [(8, 0.08), (4, 0.25), ("fp8", 0.08)])
def test_trains_nearly_as_well_as_with_32_bits(bits: Any, within: float) -> None:
    plain, quantized = model(), model()
    expected = train(plain, MAKE["AdamW"](plain.parameters()), 150)
    got = train(quantized, low_bit("AdamW", quantized, bits=bits), 150)
    assert final(got) == pytest.approx(final(expected), rel=within) and got != expected


def test_each_parameter_has_its_bits() -> None:
    module = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
    module.append(nn.Linear(64, 9))  # 576 elements: no whole blocks
    chosen = {module[0].weight: 4, module[1].weight: "fp8", module[2].weight: 32}
    optimizer = use_torchao_(torch.optim.AdamW(module.parameters()), min_size=512, chosen=chosen)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(64, 64))], "lr": 0.5})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(64, 64)
    hidden = torch.ones(1, 64)
    for layer in module:
        hidden = layer(hidden)
    hidden.sum().backward()
    optimizer.step()
    assert repr(optimizer.param_groups[1]["lr"]) == "0.5"
    sizes = [sum(t.nbytes for t in tensors_in(optimizer.state[layer.weight]["exp_avg"])) for layer in module]
    # the codes, a scale a block, and the table of values
    assert sizes == [2048 + 4 * 32 + 64, 4096 + 4 * 16, 4 * 4096, 4096 + 4 * 16 + 1024, 4 * 576]
    added: Any = optimizer.state[optimizer.param_groups[1]["params"][0]]
    assert added["exp_avg_sq"].codes.shape == (64, 64)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (MAKE["Adam amsgrad"], "`amsgrad`"),
        (MAKE["Adam maximize"], "`maximize`"),
        (MAKE["NAdam"], "maths of NAdam"),
        (lambda p: torch.optim.AdamW(p, capturable=True), "`capturable`"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})(p), "maths of Mine"),
        (lambda p: torch.optim.AdamW([nn.Parameter(weight.double()) for weight in p]), "torch.float64"),
        (
            lambda p: torch.optim.Adam([{"params": [q], "decoupled_weight_decay": not i} for i, q in enumerate(p)]),
            "all groups or in none",
        ),
    ],
)
def test_other_maths_is_refused_by_the_name_of_the_option(make: Any, reason: str) -> None:
    optimizer = make(model().parameters())
    assert reason in torchao_refusal(optimizer)
    with pytest.raises(ValueError, match=reason):
        use_torchao_(optimizer)
    assert not hasattr(optimizer, "low_bit")


def test_an_option_changed_during_training_is_refused() -> None:
    module = model()
    optimizer = low_bit("AdamW", module)
    train(module, optimizer, 1)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(RuntimeError, match=r"no `maximize`.*backend='generic'"):
        train(module, optimizer, 1)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_made_before_and_after(scheduler: str) -> None:
    """The rate stays a number, which they overwrite; the betas that OneCycleLR writes are used."""
    results = []
    for before in (True, False):
        module = model()
        optimizer = MAKE["AdamW"](module.parameters())
        schedule = SCHEDULERS[scheduler](optimizer) if before else None
        use_torchao_(optimizer, min_size=512, bits=32)
        train(module, optimizer, 12, scheduler=schedule or SCHEDULERS[scheduler](optimizer))
        results.append((weights(module), optimizer.param_groups[0]["lr"]))
    plain = model()
    optimizer = MAKE["AdamW"](plain.parameters())
    train(plain, optimizer, 12, scheduler=SCHEDULERS[scheduler](optimizer))
    for found, rate in results:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9) and isinstance(rate, float)
        assert torch.allclose(found, weights(plain), atol=1e-5)


def test_hooks_run_once_and_the_object_stays() -> None:
    module, calls = model(), []
    optimizer = MAKE["AdamW"](module.parameters())
    optimizer.register_step_post_hook(lambda *_: calls.append(optimizer.param_groups[0]["lr"]))
    assert use_torchao_(optimizer, min_size=512) is optimizer
    assert isinstance(optimizer, torch.optim.AdamW) and isinstance(optimizer, torchao.AdamW8bit)
    assert type(optimizer).__name__ == "AdamW"
    train(module, optimizer, 3)
    assert calls == [2e-3] * 3


def test_the_closure_is_called_once_and_sparse_gradients_are_refused() -> None:
    module, calls = model(), []
    optimizer = low_bit("AdamW", module)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = module(torch.ones(2, 64)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and calls == [True]
    layer = nn.Embedding(64, 64, sparse=True)
    optimizer = use_torchao_(torch.optim.AdamW(layer.parameters()), names={layer.weight: "words"})
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="'words' is sparse"):
        optimizer.step()


def test_resume_is_exact_in_a_new_process_and_the_file_needs_no_torchao(tmp_path: Path) -> None:
    script = """
import sys, torch
saved = torch.load(f"{sys.argv[1]}/saved.pt", weights_only=True)
assert "torchao" not in sys.modules
from lightning_accel.optimizers.torchao_state import use_torchao_
from tests.optimizers.toy import MAKE, model, train, weights
for bits, (state, optimizer_state, expected) in saved.items():
    module = model(1)
    optimizer = use_torchao_(MAKE["AdamW"](module.parameters()), min_size=512, bits=bits)
    module.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    train(module, optimizer, 3, start=4)
    assert torch.equal(weights(module), expected), bits
print("done", end="")
"""
    saved = {}
    for bits in SUFFIX:
        module = model()
        optimizer = low_bit("AdamW", module, bits=bits)
        train(module, optimizer, 4)
        before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
        train(module, optimizer, 3, start=4)
        saved[bits] = (*before, weights(module))
    torch.save(saved, tmp_path / "saved.pt")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done", done.stderr


LAYOUTS: dict[str, Any] = {
    "plain": lambda optimizer, **_: optimizer,
    "generic": lambda optimizer, **arguments: quantize_optimizer_(optimizer, min_size=512, **arguments),
    "bitsandbytes": lambda optimizer, **arguments: use_bitsandbytes_(optimizer, min_size=512, **arguments),
    "8": lambda optimizer, **arguments: use_torchao_(optimizer, min_size=512, **arguments),
    "4": lambda optimizer, **arguments: use_torchao_(optimizer, min_size=512, bits=4, **arguments),
    "fp8": lambda optimizer, **arguments: use_torchao_(optimizer, min_size=512, bits="fp8", **arguments),
    "32": lambda optimizer, **arguments: use_torchao_(optimizer, min_size=512, bits=32, **arguments),
}


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_a_checkpoint_of_any_layout_loads_and_a_conversion_is_said(source: str, to: str) -> None:
    module, said = model(), []
    first = LAYOUTS[source](MAKE["AdamW"](module.parameters()))
    train(module, first, 30)
    second = LAYOUTS[to](MAKE["AdamW"](module.parameters()), say=said.append)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(plain_state_dict(saved, second) if to == "plain" else saved)
    assert len(said) == (source != to and to != "plain" and {source, to} != {"plain", "32"})
    before, after = (plain_state_dict(optimizer.state_dict(), optimizer)["state"] for optimizer in (first, second))
    assert before.keys() == after.keys()
    for index in before:
        assert before[index].keys() == after[index].keys()
        for key, value in before[index].items():
            error = (after[index][key].float() - value.float()).abs().max() / value.abs().max()
            assert error <= (0.13 if to == "4" else 0.04), key
            assert error == 0 or to not in (source, "plain", "32")
    train(module, second, 2, start=30)


def test_the_state_of_torchao_itself_is_read() -> None:
    module = model()
    own = torchao.AdamW8bit(module.parameters())
    with torch.compiler.set_stance("force_eager"):
        train(module, own, 3)
    optimizer = low_bit("AdamW", module, min_size=4096)
    optimizer.load_state_dict(own.state_dict())
    mine: Any = optimizer.state[module[0].weight]["exp_avg"]
    assert torch.equal(mine.codes, own.state[module[0].weight]["exp_avg"].codes)
    generic = quantize_optimizer_(MAKE["AdamW"](module.parameters()), say=lambda _: None)
    generic.load_state_dict(own.state_dict())
    assert generic.state[module[0].weight]["exp_avg"]["codes"].dtype is torch.int8


def test_checkpoints_may_have_32_bits_and_that_of_another_class_is_refused() -> None:
    module = model()
    optimizer = low_bit("AdamW", module, save_32bit=True)
    train(module, optimizer, 2)
    plain = MAKE["AdamW"](module.parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert plain.state[module[0].weight]["exp_avg"].shape == (64, 64)
    train(module, plain, 1)
    other = MAKE["SGD"](module.parameters())
    train(module, other, 1)
    with pytest.raises(ValueError, match="of another class of optimizer"):
        low_bit("AdamW", module).load_state_dict(other.state_dict())


def test_other_dtypes_and_memory_layouts() -> None:
    """torchao computes in float32, and keeps what is not coded in the parameter's dtype."""
    layers = [nn.Conv2d(16, 16, 4).to(memory_format=torch.channels_last), nn.Conv2d(16, 16, 4)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        train_once(layer, use_torchao_(torch.optim.AdamW(layer.parameters(), lr=0.1)))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    half = nn.Conv2d(16, 16, 4).bfloat16()
    optimizer = use_torchao_(torch.optim.AdamW(half.parameters(), lr=0.1))
    train_once(half, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    again = use_torchao_(torch.optim.AdamW(half.parameters(), lr=0.1))
    again.load_state_dict(saved)
    for entries, expected in zip(again.state_dict()["state"].values(), saved["state"].values(), strict=True):
        assert [t.dtype for t in tensors_in(entries)] == [t.dtype for t in tensors_in(expected)]
        assert all(map(torch.equal, tensors_in(entries), tensors_in(expected)))


def train_once(layer: nn.Module, optimizer: Optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    for _ in range(3):
        optimizer.step()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.* does not implement _stable_hash_for_caching:UserWarning")
def test_compiled_as_on_a_gpu_it_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for stance in (torch.compiler.set_stance, nullcontext):
        monkeypatch.setattr("torch.compiler.set_stance", stance)
        module = nn.Linear(64, 64, bias=False)
        nn.init.constant_(module.weight, 0.5)
        optimizer = use_torchao_(torch.optim.AdamW(module.parameters(), lr=0.1), bits="fp8")
        schedule = SCHEDULERS["LambdaLR"](optimizer)
        torch._dynamo.utils.counters.clear()
        for _ in range(3):
            train_once(module, optimizer)
            schedule.step()
        found.append((module.weight.detach().clone(), torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    (eager, none), (compiled, graphs) = found
    assert torch.allclose(eager, compiled, atol=1e-5) and (none, graphs) == (0, 1)  # one, whatever the rate


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchao_missing("cpu") == ""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "no Triton here" in torchao_missing("cuda")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    assert torchao_missing("cpu") == "torchao is not installed"
