"""Codes of 4 and 8 bits, fp8 and bfloat16: what they are, that the kernels give the same bits, and that they train."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.optimizers import kernels
from lightning_accel.optimizers.codes import CODES, table
from lightning_accel.optimizers.layouts import plain_state_dict
from lightning_accel.optimizers.quantize import decode_moment, encode_moment, moment_bits
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from lightning_accel.optimizers.stochastic_rounding import round_to_bfloat16_
from lightning_accel.report.sizes import optimizer_state_bytes
from tests.optimizers.toy import MAKE, final, model, train, weights

BITS = [8, 4, "fp8", "bf16"]
SIGNED = [True, False]


def sample(size: int, signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    value = torch.randn(size, generator=generator) * torch.randn(size, generator=generator).exp() ** 3
    value[::7] = 0
    return value if signed else value.square()


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return all(torch.equal(one[name].float(), two[name].float()) for name in ("codes", "scales"))


@pytest.mark.skipif(kernels.kernels() is None, reason="there is no C compiler here")
@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("bits", BITS)
def test_the_kernels_give_the_bits_of_the_tensor_operations(
    bits: Any, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1, 100, 256, 257, 2**16 + 300):
        for step in (None, 0, 5):
            value, found = sample(size, signed), []
            for without in (False, True):
                monkeypatch.setattr(kernels, "without_kernels", without)
                moment = encode_moment(value, signed, step, bits=bits)
                found.append((moment, decode_moment(moment)))
            assert same(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_where_triton_does_not_run_the_reason_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 99)
    assert kernels.triton_on(device) is None and "Triton" in kernels.why_no_triton(device)
    assert kernels.triton_on(torch.device("cpu")) is None
    monkeypatch.setattr(kernels, "without_kernels", True)
    assert kernels.why_no_triton(device) == "without_kernels is set"


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("bits", BITS)
def test_triton_is_told_the_code(bits: Any, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    stand_in = SimpleNamespace(
        encode=lambda line, codes, scales, noise, *which: told.append(which),
        decode=lambda codes, scales, out, *which: told.append(which),
    )
    monkeypatch.setattr("lightning_accel.optimizers.codes.triton_for", lambda *tensors: stand_in)
    decode_moment(encode_moment(sample(1000, signed), signed, 3, bits=bits))
    # the codes of fp8 do not tell the sign, nor need it; decoding bfloat16 is a copy
    decoded = [] if bits == "bf16" else [(bits, signed and bits != "fp8")]
    assert told == [(bits, signed), *decoded]


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("bits", BITS)
def test_decoded_values_get_their_codes_again(bits: Any, signed: bool) -> None:
    moment = encode_moment(sample(1000, signed), signed, 3, bits=bits)
    assert moment_bits(moment) == bits
    for step in (None, 8):
        assert same(encode_moment(decode_moment(moment), signed, step, bits=bits), moment)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_averages_to_the_value_and_no_second_moment_becomes_zero(bits: Any) -> None:
    value = torch.linspace(0.1, 1, 512)  # above the smallest code of 4 bits
    mean = torch.stack([decode_moment(encode_moment(value, False, step, bits=bits)) for step in range(256)]).mean(0)
    assert torch.allclose(mean, value, rtol=5e-3)
    tiny = torch.tensor([1.0, 1e-30] + [0.0] * 126)
    assert decode_moment(encode_moment(tiny, False, 0, bits=bits))[1] > 0


def test_the_map_of_4_bits_is_that_of_the_paper() -> None:
    found = table("4 signed", torch.device("cpu")).tolist()
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    assert found == pytest.approx([-value for value in reversed(positive)] + [0.0, *positive, 1.0])
    largest = torch.zeros(256).index_fill_(0, torch.tensor([5, 200]), -3.0)  # the map has no -1: the scale turns
    assert decode_moment(encode_moment(largest, True, 1, bits=4)).min() == -3.0


def low_bit(name: str, module: nn.Module, **arguments: Any) -> Optimizer:
    return quantize_optimizer_(MAKE[name](module.parameters()), **{"min_size": 512, **arguments})


@pytest.mark.parametrize(
    ("bits", "size"), [(8, 2 * (1 + 4 / 256)), (4, 2 * (0.5 + 4 / 128)), ("fp8", 2.03125), ("bf16", 4)]
)
def test_bytes_a_parameter_are_those_of_theory(bits: Any, size: float) -> None:
    weight = nn.Parameter(torch.zeros(512, 512))
    optimizer = quantize_optimizer_(torch.optim.AdamW([weight]), bits=bits)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert (optimizer_state_bytes([optimizer]) - 4) / weight.numel() == pytest.approx(size)


@pytest.mark.parametrize("bits", [4, "fp8", "bf16"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Adam amsgrad"])
def test_trains_as_with_32_bits_and_resumes_bit_for_bit(name: str, bits: Any) -> None:
    plain, module = model(), model()
    expected = train(plain, MAKE[name](plain.parameters()), 100)
    optimizer = low_bit(name, module, bits=bits)
    losses = train(module, optimizer, 60)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    losses += train(module, optimizer, 40, start=60)
    assert final(losses) == pytest.approx(final(expected), rel=0.2 if bits == 4 else 0.08)
    again = model(1)
    resumed = low_bit(name, again, bits=bits)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, 40, start=60)
    assert torch.equal(weights(again), weights(module))


@pytest.mark.parametrize("source", [32, *BITS])
@pytest.mark.parametrize("to", [32, *BITS])
def test_a_checkpoint_in_any_bits_is_converted_and_that_is_said(source: Any, to: Any) -> None:
    module, said = model(), []
    first = low_bit("AdamW", module, bits=source)
    train(module, first, 5)
    second = low_bit("AdamW", module, bits=to, say=said.append)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert len(said) == (source != to), said
    before, after = (plain_state_dict(optimizer.state_dict(), optimizer)["state"][0] for optimizer in (first, second))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(before[name], after[name], atol=0.15 * before[name].abs().max().item())
    train(module, second, 1, start=5)


def test_saved_in_32_bits_a_plain_optimizer_goes_on() -> None:
    module = model()
    optimizer = low_bit("AdamW", module, save_32bit=True)
    train(module, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    other, again = low_bit("AdamW", model(), save_32bit=True), copy.deepcopy(module)
    plain = MAKE["AdamW"](again.parameters())
    plain.load_state_dict(copy.deepcopy(saved))
    train(again, plain, 2, start=5)
    other.load_state_dict(saved)
    assert other.state_dict()["state"][0]["exp_avg"].equal(saved["state"][0]["exp_avg"])


def test_the_state_of_another_class_is_refused() -> None:
    module = model()
    sgd = MAKE["SGD"](module.parameters())
    train(module, sgd, 1)
    with pytest.raises(ValueError, match=r"keeps exp_avg, exp_avg_sq .*momentum_buffer.*another class"):
        low_bit("AdamW", module).load_state_dict(sgd.state_dict())


def test_in_32_bits_it_is_the_plain_run() -> None:
    plain, module = model(), model()
    train(plain, MAKE["AdamW"](plain.parameters()), 5)
    train(module, low_bit("AdamW", module, bits=32), 5)
    assert torch.equal(weights(plain), weights(module))


def test_rounding_to_bfloat16_is_right_on_average_and_repeats() -> None:
    for number in (1.001, -3e-5, 0.0, float("inf")):
        value, found = torch.full((20_000,), number), torch.empty(20_000, dtype=torch.bfloat16)
        mean = round_to_bfloat16_(found, value, torch.Generator().manual_seed(0)).float().mean().item()
        assert mean == pytest.approx(number, rel=2e-4)
    assert round_to_bfloat16_(found, value, torch.Generator()).equal(
        round_to_bfloat16_(found.clone(), value, torch.Generator())
    )


@pytest.mark.parametrize("min_size", [1, 10**6])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_small_updates_of_bfloat16_weights_are_lost_only_without_stochastic_rounding(name: str, min_size: int) -> None:
    moved = []
    for seed in (None, 0):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        make = (
            torch.optim.AdamW([weight], 1e-4, weight_decay=0)
            if name == "AdamW"
            else torch.optim.SGD([weight], 1e-4, 0.5)
        )
        optimizer = quantize_optimizer_(make, min_size=min_size, seed=seed)
        for _ in range(50):
            weight.grad = torch.full_like(weight, 1.0 if name == "AdamW" else 0.5)
            optimizer.step()
        moved.append(1 - weight.float().mean().item())
    assert moved[0] == 0 and moved[1] == pytest.approx(50e-4, rel=0.1)


@pytest.mark.parametrize("min_size", [1, 10**6])
def test_stochastic_rounding_resumes_bit_for_bit(min_size: int) -> None:
    def make(module: nn.Module) -> Optimizer:
        return low_bit("AdamW", module, min_size=min_size, seed=3)

    def step(module: nn.Module, optimizer: Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        optimizer.step()

    module, again = model().bfloat16(), model(1).bfloat16()
    optimizer, resumed = make(module), make(again)
    for number in range(4):
        step(module, optimizer, number)
    again.load_state_dict(copy.deepcopy(module.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(4, 7):
        step(module, optimizer, number)
        step(again, resumed, number)
    assert torch.equal(weights(module), weights(again))
    state = next(iter(resumed.state.values()))["exp_avg"]
    assert (state["scales"] if min_size == 1 else state).dtype is torch.float32


def test_a_group_that_is_added_has_the_places_that_it_has_from_the_start() -> None:
    """Whatever is stepped first; the places decide how parameters are rounded."""
    first, second, third = (nn.Parameter(torch.zeros(8).bfloat16()) for _ in range(3))
    optimizer: Any = quantize_optimizer_(torch.optim.AdamW([first]), seed=0)
    optimizer.add_param_group({"params": [second]})
    optimizer.add_param_group({"params": [third]})
    third.grad = torch.ones_like(third)
    optimizer.step()
    assert optimizer.low_bit.order == {first: 0, second: 1, third: 2}


def test_every_code_is_named() -> None:
    assert list(CODES) == BITS
