from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch.optim import lr_scheduler

from lightning_accel import FusedOptimizer, LowBitOptimizer
from lightning_accel.errors import NoEffectWarning
from lightning_accel.optimizers.codes import dither
from lightning_accel.optimizers.low_bit import choose_backend
from tests.optimizers.test_fused import Net, fit
from tests.optimizers.test_quantized_state import Custom, codes
from tests.optimizers.toy import MAKE, WITHOUT_MOMENTS, model, weights

BACKENDS = ["generic", "bitsandbytes"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_optimizer_of_a_fit_is_quantised(backend: str, parts: int, caplog: pytest.LogCaptureFixture) -> None:
    callback, net = LowBitOptimizer(backend=backend, min_size=512), Net(MAKE["AdamW"], parts)  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        trainer = fit(net, callback)
    assert [f"by the {backend} backend (as asked for)" in choice for choice in callback.choices] == [True] * parts
    assert sum("LowBitOptimizer: AdamW in 8 bits" in record.getMessage() for record in caplog.records) == parts
    for optimizer in trainer.optimizers:
        dtypes = {
            tensor.dtype
            for state in optimizer.state.values()
            for value in state.values()
            for tensor in (value.values() if isinstance(value, dict) else [value])
            if isinstance(tensor, torch.Tensor)
        }
        assert torch.uint8 in dtypes
    assert not torch.equal(weights(net), weights(Net(MAKE["AdamW"], parts)))


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()[0]
        schedule = lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=18)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Save(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 9:
            trainer.save_checkpoint("9.ckpt")


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_in_mid_epoch_is_exact(backend: Any) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def run(*callbacks: Any, **arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        net = Scheduled(MAKE["AdamW"])
        low_bit = LowBitOptimizer(backend=backend, min_size=512)
        trainer = fit(net, low_bit, *callbacks, loader=StatefulDataLoader, max_epochs=3, **arguments)
        assert trainer.global_step == 18
        return weights(net), codes(trainer.optimizers[0])

    expected, moments = run(Save())
    dither.cache_clear()
    torch.manual_seed(5)
    resumed, moments_resumed = run(Save(), resume="9.ckpt")
    assert torch.equal(resumed, expected)
    assert len(moments) == (4 if backend == "generic" else 0)
    assert all(map(torch.equal, moments, moments_resumed))


def test_auto_says_what_it_takes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(MAKE["AdamW"](model().parameters())) == ("generic", "on the CPU it is as fast or faster")
    assert choose_backend(MAKE["Adam L2"](model().parameters()))[0] == "generic"
    assert "decouples" in choose_backend(MAKE["Adam L2"](model().parameters()))[1]
    assert "fused" in choose_backend(torch.optim.AdamW(model().parameters(), fused=True))[1]
    elsewhere = MAKE["AdamW"](model().to("meta").parameters())
    monkeypatch.setattr("lightning_accel.optimizers.low_bit.bitsandbytes_missing", lambda device: "it is missing")
    assert choose_backend(elsewhere) == ("generic", "it is missing")
    monkeypatch.setattr("lightning_accel.optimizers.low_bit.bitsandbytes_missing", lambda device: "")
    assert choose_backend(elsewhere)[0] == "bitsandbytes"


def test_the_choice_names_the_share_that_is_quantised() -> None:
    callback = LowBitOptimizer(min_size=512, keep_32bit=[r"net\.2\.weight"])
    fit(Net(MAKE["AdamW"]), callback)
    (choice,) = callback.choices
    assert "1 of 4 parameters, 85.2% of the elements" in choice


def test_other_maths_is_refused_with_a_way_out() -> None:
    with pytest.raises(MisconfigurationException, match=r"`nesterov`\. Use backend='generic'"):
        fit(Net(MAKE["SGD nesterov"]), LowBitOptimizer(backend="bitsandbytes", min_size=512))


def test_bitsandbytes_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"lightning-accel\[bitsandbytes\]"):
        fit(Net(MAKE["AdamW"]), LowBitOptimizer(backend="bitsandbytes", min_size=512))


def test_an_optimizer_with_a_history_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="LBFGS keeps a history"):
        fit(Net(lambda p: torch.optim.LBFGS(p)), LowBitOptimizer())


@pytest.mark.parametrize("name", WITHOUT_MOMENTS)
def test_an_optimizer_without_moments_runs_as_it_is_and_that_is_told(name: str) -> None:
    net, plain = Net(WITHOUT_MOMENTS[name]), Net(WITHOUT_MOMENTS[name])
    with pytest.warns(NoEffectWarning, match="LowBitOptimizer has no effect"):
        fit(net, LowBitOptimizer(min_size=1))
    fit(plain)
    assert torch.equal(weights(net), weights(plain))


@pytest.mark.parametrize("arguments", [{}, {"min_size": 1, "keep_32bit": ["."]}])
def test_nothing_to_quantise_is_the_plain_run_and_is_told(arguments: dict[str, Any]) -> None:
    net, plain = Net(MAKE["AdamW"], 2), Net(MAKE["AdamW"], 2)
    arguments = arguments or {"min_size": 10**6}
    with pytest.warns(NoEffectWarning, match=r"min_size.*keep_32bit"):
        fit(net, LowBitOptimizer(**arguments))
    fit(plain)
    assert torch.equal(weights(net), weights(plain))


def test_an_expression_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="'embeding' matches none"):
        fit(Net(MAKE["AdamW"]), LowBitOptimizer(min_size=512, keep_32bit=["net", "embeding"]))


def test_an_optimizer_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(NoEffectWarning, match="LowBitOptimizer has no effect: no state of Custom"):
        fit(Net(lambda p: Custom(p, "velocity")), LowBitOptimizer(min_size=512))
    trainer = fit(Net(lambda p: Custom(p, "velocity")), LowBitOptimizer(min_size=512, moments={"velocity": "signed"}))
    assert len(codes(trainer.optimizers[0])) == 2


def test_an_optimizer_of_bitsandbytes_is_left_alone() -> None:
    import bitsandbytes

    with pytest.warns(NoEffectWarning, match="optimizer of bitsandbytes itself"):
        fit(Net(lambda p: bitsandbytes.optim.AdamW8bit(p, min_8bit_size=1)), LowBitOptimizer())


@pytest.mark.parametrize("low_bit_first", [True, False])
def test_with_fused_the_wrapper_keeps_the_fused_step(low_bit_first: bool) -> None:
    low_bit, fused = LowBitOptimizer(min_size=512), FusedOptimizer()
    trainer = fit(Net(MAKE["AdamW"]), *((low_bit, fused) if low_bit_first else (fused, low_bit)))
    assert fused.choices == ["AdamW: fused"] and "keeps the fused step" in low_bit.choices[0]
    assert trainer.optimizers[0].param_groups[0]["fused"] is True and len(codes(trainer.optimizers[0])) == 4


def test_a_second_fit_works() -> None:
    callback = LowBitOptimizer(min_size=512)
    for _ in range(2):
        trainer = fit(Net(MAKE["AdamW"]), callback)
        assert len(codes(trainer.optimizers[0])) == 4 and len(callback.choices) == 1


def test_bits_by_name_and_embeddings_in_32() -> None:
    module = torch.nn.ModuleDict(
        {"words": torch.nn.Embedding(64, 64), "a": torch.nn.Linear(64, 64), "b": torch.nn.Linear(64, 64)}
    )
    for arguments, expected in (
        ({}, [32, 8, 4]),
        ({"keep_embeddings": False}, [8, 8, 4]),
        ({"bits_for": {"words": "fp8", "b": 4}}, ["fp8", 8, 4]),
        ({"keep_32bit": ["words"], "keep_embeddings": False}, [32, 8, 4]),
    ):
        callback = LowBitOptimizer(**{"min_size": 512, "bits_for": {"^b": 4}, **arguments})  # type: ignore[arg-type]
        optimizer: Any = callback.transform(MAKE["AdamW"](module.parameters()), module)
        assert [optimizer.low_bit.bits_of(layer.weight) for layer in module.values()] == expected
        assert "8" in callback.choices[0] and "4 bits" in callback.choices[0]


def test_what_only_the_generic_backend_can_do() -> None:
    with pytest.raises(MisconfigurationException, match=r"only it has 4 bits.*Use backend='generic'"):
        fit(Net(MAKE["AdamW"]), LowBitOptimizer(bits=4, backend="bitsandbytes", min_size=512))
    with pytest.warns(NoEffectWarning, match="`stochastic_rounding` is for parameters in bfloat16"):
        fit(Net(MAKE["AdamW"]), LowBitOptimizer(stochastic_rounding=True, min_size=512))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 7}, ValueError, "Expected `bits` to be one of 8"),
        ({"bits": "8"}, TypeError, "Expected `bits`"),
        ({"backend": "cuda"}, ValueError, "Expected `backend`"),
        ({"min_size": 0}, ValueError, "Expected `min_size`"),
        ({"keep_32bit": "net"}, TypeError, "Expected `keep_32bit`"),
        ({"keep_32bit": ["("]}, ValueError, "Expected `keep_32bit`"),
        ({"moments": {"velocity": "both"}}, ValueError, r"Expected `moments\['velocity'\]`"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LowBitOptimizer(**arguments)
