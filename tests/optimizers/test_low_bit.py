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
from lightning_accel.hooks.tensors import tensors_in
from lightning_accel.optimizers.codes import dither
from lightning_accel.optimizers.low_bit_backend import Wish, choose_backend
from tests.optimizers.test_fused import Net, fit
from tests.optimizers.test_quantized_state import Custom, codes
from tests.optimizers.toy import MAKE, WITHOUT_MOMENTS, model, weights

BACKENDS = ["generic", "bitsandbytes", "torchao"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_optimizer_of_a_fit_is_quantised(backend: str, parts: int, caplog: pytest.LogCaptureFixture) -> None:
    bits: Any = 4 if backend == "torchao" else 8  # the smaller matrix is no whole blocks of torchao in 8
    callback, net = LowBitOptimizer(bits, backend, min_size=512), Net(MAKE["AdamW"], parts)  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        trainer = fit(net, callback)
    assert [f"by the {backend} backend (as asked for)" in choice for choice in callback.choices] == [True] * parts
    assert sum(f"LowBitOptimizer: AdamW in {bits} bits" in record.getMessage() for record in caplog.records) == parts
    for optimizer in trainer.optimizers:
        dtypes = {
            tensor.dtype
            for state in optimizer.state.values()
            for value in state.values()
            for tensor in tensors_in(value)
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


BACKEND = "lightning_accel.optimizers.low_bit_backend"


def chosen(optimizer: Any, bits: Any = 8, **wish: Any) -> tuple[str, str]:
    """What is chosen where the matrices, but not that of the 10 classes, are to be in these bits."""
    matrices = [p for group in optimizer.param_groups for p in group["params"] if p.dim() == 2 and p.shape[0] != 10]
    return choose_backend(optimizer, Wish(dict.fromkeys(matrices, bits), **wish))


def test_auto_says_what_it_takes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(name: str = "AdamW", **options: Any) -> Any:
        optimizer = MAKE[name](model().parameters())
        optimizer.param_groups[0].update(options)
        return optimizer

    def elsewhere(name: str = "AdamW") -> Any:
        return MAKE[name](model().to("meta").parameters())

    assert chosen(here()) == ("generic", "on the CPU it is as fast or faster")
    assert chosen(here(), 4) == ("generic", "on the CPU it is as fast or faster")
    assert "decouples" in chosen(here("Adam L2"))[1] and chosen(here("Adam L2"))[0] == "generic"
    assert "fused" in chosen(here(fused=True))[1] and "fused" in chosen(here(fused=True), 4)[1]
    for backend, bits in (("bitsandbytes", 8), ("torchao", 4), ("torchao", "fp8")):
        monkeypatch.setattr(f"{BACKEND}.{backend}_missing", lambda device: "it is missing")
        assert chosen(elsewhere(), bits) == ("generic", "it is missing")
        monkeypatch.setattr(f"{BACKEND}.{backend}_missing", lambda device: "")
        assert chosen(elsewhere(), bits)[0] == backend
        assert "at random" in chosen(elsewhere(), bits, rounds=True)[1]
    assert chosen(elsewhere("Adam L2"), 4)[0] == "torchao"  # which adds the decay to the gradient, as Adam does
    assert chosen(elsewhere("NAdam"), 4) == ("generic", "torchao has no optimizer with the maths of NAdam")
    assert chosen(elsewhere(), "bf16") == ("generic", "torchao has no bfloat16")
    assert (
        chosen(elsewhere(), save_32bit=True)[0] == "generic" and chosen(elsewhere(), 4, save_32bit=True)[0] == "torchao"
    )
    uneven = torch.optim.AdamW([torch.nn.Parameter(torch.empty(size, 99, device="meta")) for size in (256, 99)])
    assert chosen(uneven, 4) == ("generic", "the blocks of torchao must be whole")
    cycled = elsewhere()
    lr_scheduler.OneCycleLR(cycled, 0.01, total_steps=9)
    assert "compiles its step again for each value of `betas`" in chosen(cycled, 4)[1]
    monkeypatch.setattr(f"{BACKEND}.triton_on", lambda device: object() if device.type == "meta" else None)
    assert chosen(elsewhere(), 4) == ("generic", "its own kernels take the step of Adam")
    assert chosen(elsewhere("Adam L2"), "fp8") == ("generic", "its own kernels take the step of Adam")
    assert chosen(elsewhere()) == ("bitsandbytes", "its kernels compute the same maths")
    assert "fused" in chosen(here(fused=True), 4)[1]
    each, half = elsewhere(), MAKE["AdamW"](model().to("meta", torch.bfloat16).parameters())
    each.param_groups[0]["foreach"] = True
    for unlike in (each, half):  # which they do not step
        assert chosen(unlike, 4) == ("torchao", "its compiled step computes the same maths")


def test_the_choice_names_the_share_that_is_quantised() -> None:
    callback = LowBitOptimizer(min_size=512, keep_32bit=[r"net\.2\.weight"])
    fit(Net(MAKE["AdamW"]), callback)
    (choice,) = callback.choices
    assert "1 of 4 parameters, 85.2% of the elements" in choice


@pytest.mark.parametrize(
    ("backend", "name", "reason"),
    [("bitsandbytes", "SGD nesterov", "`nesterov`"), ("torchao", "Adam amsgrad", "`amsgrad`")],
)
def test_other_maths_is_refused_with_a_way_out(backend: Any, name: str, reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{reason}\. Use backend='generic'"):
        fit(Net(MAKE[name]), LowBitOptimizer(backend=backend, min_size=512))


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
def test_a_library_that_is_not_installed_is_named(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(ImportError, match=rf"lightning-accel\[{backend}\]"):
        fit(Net(MAKE["AdamW"]), LowBitOptimizer(backend=backend, min_size=512))


def test_what_is_no_whole_blocks_of_torchao_stays_in_32_bits_and_that_is_said() -> None:
    callback = LowBitOptimizer(backend="torchao", min_size=512)  # 64 x 64 is, 10 x 64 is not
    fit(Net(MAKE["AdamW"]), callback)
    assert "1 of 4 parameters, 85.2%" in callback.choices[0] and "1 stay in 32 bits" in callback.choices[0]
    with pytest.raises(MisconfigurationException, match="no parameter is made of whole blocks of torchao"):
        fit(Net(MAKE["AdamW"]), LowBitOptimizer(backend="torchao", min_size=512, keep_32bit=[r"net\.0"]))


def test_paged_state_is_refused_where_there_is_nothing_to_page() -> None:
    for make, reason in ((MAKE["AdamW"], "parameters on the cpu device"), (MAKE["SGD"], "no paged SGD")):
        with pytest.raises(MisconfigurationException, match=rf"paged=True.*{reason}.*Leave out `paged`"):
            fit(Net(make), LowBitOptimizer(min_size=512, paged=True))
    with pytest.raises(ValueError, match="Expected `paged` to be False with backend='torchao'"):
        LowBitOptimizer(paged=True, backend="torchao")


def test_paged_state_is_that_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{BACKEND}.paged_refusal", lambda optimizer: "")
    monkeypatch.setattr("lightning_accel.optimizers.bitsandbytes_state.paged_refusal", lambda optimizer: "")
    callback = LowBitOptimizer(min_size=512, paged=True)
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        trainer = fit(Net(MAKE["AdamW"]), callback)
    assert "by the bitsandbytes backend (only it pages)" in callback.choices[0]
    assert "PagedAdamW8bit" in [cls.__name__ for cls in type(trainer.optimizers[0]).__mro__]


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


def test_an_optimizer_of_a_library_is_left_alone() -> None:
    import bitsandbytes
    import torchao.optim

    with pytest.warns(NoEffectWarning, match="optimizer of bitsandbytes itself"):
        fit(Net(lambda p: bitsandbytes.optim.AdamW8bit(p, min_8bit_size=1)), LowBitOptimizer())
    with torch.compiler.set_stance("force_eager"), pytest.warns(NoEffectWarning, match="optimizer of torchao itself"):
        fit(Net(torchao.optim.AdamW8bit), LowBitOptimizer())


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


@pytest.mark.parametrize("pattern", ["^b", "bias"])
def test_bits_of_another_optimizers_and_of_small_parameters_do_not_count(pattern: str) -> None:
    module = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in "ab"})
    callback = LowBitOptimizer(backend="torchao", min_size=512, bits_for={pattern: "bf16"})
    optimizer: Any = callback.transform(MAKE["AdamW"](module["a"].parameters()), module)
    assert optimizer.low_bit.bits_of(module["a"].weight) == 8


def test_what_only_the_generic_backend_can_do() -> None:
    with pytest.raises(MisconfigurationException, match=r"bitsandbytes has no 4 bits.*Use backend='generic'"):
        fit(Net(MAKE["AdamW"]), LowBitOptimizer(bits=4, backend="bitsandbytes", min_size=512))
    with pytest.raises(MisconfigurationException, match=r"torchao has no bfloat16.*Use backend='generic'"):
        fit(Net(MAKE["AdamW"]), LowBitOptimizer(bits="bf16", backend="torchao", min_size=512))
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
