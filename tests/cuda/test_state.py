"""Low-bit state by kernels that a CUDA device alone has: which is chosen, what it learns, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_accel import EMA, FullyShardStrategy, LowBitOptimizer, Muon, NoEffectWarning
from lightning_accel.report.sizes import optimizer_state_bytes
from tests.conformance.compare import assert_equal
from tests.conformance.toy import Recorder
from tests.cuda.wide import PARAMETERS, Losses, loader, train, weights

pytestmark = [pytest.mark.cuda, pytest.mark.slow, pytest.mark.timeout(400)]

SIDES: dict[str, tuple[dict[str, Any], str, float]] = {
    "8 bits": ({}, "bitsandbytes backend (its kernels compute the same maths)", 2.1),
    "paged": ({"paged": True}, "bitsandbytes backend (only it pages)", 2.1),
    "4 bits": ({"bits": 4}, "generic backend (its own kernels take the step of Adam)", 1.1),
    "fp8": ({"bits": "fp8"}, "generic backend (its own kernels take the step of Adam)", 2.1),
    "bf16": ({"bits": "bf16"}, "generic backend (torchao has no bfloat16)", 4.1),
    "generic": ({"backend": "generic"}, "generic backend (as asked for)", 2.1),
    "torchao": ({"backend": "torchao"}, "torchao backend (as asked for)", 2.1),
    "torchao 4 bits": ({"backend": "torchao", "bits": 4}, "torchao backend (as asked for)", 1.1),
}
"""Arguments, what is said of the choice, and the most bytes of state a parameter."""


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return train(data=loader(256, 8), epochs=6)[1].losses


@pytest.mark.parametrize("side", SIDES)
def test_it_learns_what_32_bits_learn(side: str, plain: list[float]) -> None:
    arguments, said, most = SIDES[side]
    low_bit = LowBitOptimizer(**arguments)
    bytes_of = StateBytes()
    _, losses = train(low_bit, bytes_of, data=loader(256, 8), epochs=6)
    assert said in low_bit.choices[0]
    assert bytes_of.found / PARAMETERS < most
    assert plain[-1] < 0.98 * plain[0]  # there is something to learn
    gained = (plain[0] - losses.losses[-1]) / (plain[0] - plain[-1])
    assert gained > (0.9 if "4" in side else 0.97)


class StateBytes(Losses):
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.found = optimizer_state_bytes(trainer.optimizers)


@pytest.mark.parametrize("side", SIDES)
def test_it_goes_on_bit_for_bit(side: str, tmp_path: Path) -> None:
    def fit(name: str, epochs: int, **options: Any) -> Any:
        options = {"data": loader(256, 4), "dropout": 0.0, "enable_checkpointing": True, **options}
        train(LowBitOptimizer(**SIDES[side][0]), Recorder(final=tmp_path / name), epochs=epochs, **options)
        return torch.load(tmp_path / name, weights_only=True)

    whole = fit("whole.ckpt", 4)
    fit("half.ckpt", 2)
    resumed = fit("resumed.ckpt", 4, seed=9, ckpt_path=tmp_path / "half.ckpt")  # from other weights
    for key in ("state_dict", "optimizer_states"):
        assert_equal(resumed[key], whole[key], key)


def test_paged_state_is_the_same_state() -> None:
    ours, losses = train(LowBitOptimizer(paged=True), data=loader(256))
    same, again = train(LowBitOptimizer(backend="bitsandbytes"), data=loader(256))
    assert losses.losses == again.losses
    assert torch.equal(weights(ours), weights(same))


@pytest.mark.parametrize("rounding", [False, True])
def test_parameters_in_bfloat16(rounding: bool) -> None:
    callbacks = [LowBitOptimizer(stochastic_rounding=True)] if rounding else []
    module, losses = train(*callbacks, data=loader(256, 8), epochs=6, precision="bf16-true")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert losses.losses[-1] < losses.losses[0]


def test_an_average_in_main_memory_is_the_one_on_the_device() -> None:
    averages = []
    for device in ("cpu", None):
        ema = EMA(decay=0.9, device=device) if device else EMA(decay=0.9)
        module, _ = train(ema, data=loader(256))
        averages.append(weights(module))
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-6, atol=1e-7)


def test_muon_is_that_of_torch() -> None:
    _, losses = train(Muon(), data=loader(256, 8), epochs=6)
    assert losses.losses[-1] < losses.losses[0]


def test_fully_sharded_on_one_device_is_plain_training() -> None:
    with pytest.warns(NoEffectWarning, match="no repeated layer"):
        # of one rank too, Lightning's own sampler would shuffle
        ours, losses = train(
            data=loader(256), dropout=0.0, strategy=FullyShardStrategy(), use_distributed_sampler=False
        )
    same, again = train(data=loader(256), dropout=0.0)
    torch.testing.assert_close(losses.losses, again.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(ours), weights(same), rtol=1e-4, atol=1e-5)
