"""A batch in micro-batches is that batch; where memory runs out the step is made again, and nothing shows that."""

from __future__ import annotations

import gc
import random
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from lightning_accel import (
    SAM,
    BatchAugmentation,
    GradientAccumulation,
    LabelSmoothing,
    MicroBatching,
    NoEffectWarning,
    NoiseScaleAccumulation,
    OptimizerInBackward,
)
from lightning_accel.augment import CutMix, MixUp
from tests.accumulation import text
from tests.accumulation.micro import Net, Shortage, Watch, samples, weights
from tests.hooks.common import At, Stop, Tiny, fit, none_at, stream

BATCH, COUNT = 8, 29  # three batches of 8, and one of 5


def loader(**arguments: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(COUNT)), **{"batch_size": BATCH, **arguments})


def run(module: Any, *callbacks: Callback, sizes: Any = None, data: Any = None, **options: Any) -> Watch:
    seed_everything(3, verbose=False)
    watch = Watch(sizes)
    watch.trainer = fit(module, *callbacks, watch, data=loader() if data is None else data, **options)  # type: ignore[attr-defined]
    watch.weights = weights(module)  # type: ignore[attr-defined]
    watch.buffers = {name: value.clone() for name, value in module.named_buffers()}  # type: ignore[attr-defined]
    watch.random = (torch.rand(1), random.random(), np.random.rand())  # type: ignore[attr-defined]
    return watch


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit."""
    assert torch.equal(a.weights, b.weights)
    assert (a.losses, a.logged, a.epoch, a.random, a.shapes) == (b.losses, b.logged, b.epoch, b.random, b.shapes)
    for name, value in a.buffers.items():
        assert torch.equal(value, b.buffers[name]), name


def assert_close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-5, atol=1e-6)
    for key in ("losses", "logged", "epoch"):
        assert getattr(a, key) == pytest.approx(getattr(b, key), rel=1e-5), key
    assert a.shapes == b.shapes


# --------------------------------------------------------------------------------------------------------- a given size


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_a_batch_in_micro_batches_is_that_batch(size: int, window: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": window, "max_epochs": 2, "gradient_clip_val": 0.5}
    plain = run(Net(dropout=0.0), **options)
    split = run(Net(dropout=0.0), MicroBatching(size), **options)
    assert_close(split, plain)
    assert not torch.equal(split.weights, plain.weights)  # type: ignore[attr-defined]  # sums in another order
    assert split.hooks["before_zero_grad"] == plain.hooks["before_zero_grad"]
    parts = 2 * sum(-(-samples // size) for samples in (8, 8, 8, 5))
    assert split.hooks["before_backward"] == split.hooks["after_backward"] == parts
    assert split.trainer.global_step == plain.trainer.global_step  # type: ignore[attr-defined]


def test_batches_that_are_not_larger_run_as_they_are() -> None:
    with pytest.warns(NoEffectWarning, match="no batch of a rank had more than 8 samples, and size=8"):
        whole = run(Net(), MicroBatching(8))
    assert_same(whole, run(Net()))


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize("data", ["stream", "none"])
def test_other_loaders(data: str) -> None:
    def make() -> Any:
        return stream() if data == "stream" else none_at(1, 4)

    plain, split = Tiny(), Tiny()
    fit(plain, data=make())
    fit(split, MicroBatching(3), data=make())
    torch.testing.assert_close(weights(split), weights(plain))


def test_the_closure_of_lbfgs_sees_the_whole_batch() -> None:
    def lbfgs(module: nn.Module) -> Any:
        return torch.optim.LBFGS(module.parameters(), max_iter=4)

    plain = run(Net(dropout=0.0, configure=lbfgs))
    assert_close(run(Net(dropout=0.0, configure=lbfgs), MicroBatching(3)), plain)
    short = Net(Shortage(4), dropout=0.0, configure=lbfgs)
    assert_close(run(short, MicroBatching("auto")), plain)
    assert short.shortage is not None and short.shortage.raised == 1


def test_a_loss_scaler_scales_all_micro_batches() -> None:
    def mixed() -> Any:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    plain = run(Net(dropout=0.0), plugins=[mixed()])
    for micro in (MicroBatching(3), MicroBatching("auto")):
        net = Net(Shortage(3) if micro.size is None else None, dropout=0.0)
        split = run(net, micro, plugins=[mixed()])
        torch.testing.assert_close(split.weights, plain.weights, rtol=1e-2, atol=1e-3)  # type: ignore[attr-defined]


class Logging(Net):
    """Logs in every way."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, dropout=0.0)
        self.accuracy = BinaryAccuracy()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        outputs = super().training_step(batch, batch_idx)
        output = outputs["output"]
        both: dict[str, Any] = {"on_step": True, "on_epoch": True}
        self.log("constant", outputs["loss"], batch_size=8, **both)
        self.log("counted", outputs["loss"], batch_size=len(x), **both)
        self.log("tokens", output[y > 0].mean(), batch_size=int((y > 0).sum()), **both)
        self.log("sum", (output > 0).sum().float(), reduce_fx="sum", **both)
        self.log("max", output.max(), reduce_fx=torch.max, **both)
        self.log("min", output.min(), reduce_fx="min", on_step=False, on_epoch=True)
        self.log("step", outputs["loss"], on_step=True, on_epoch=False)
        self.log("twice", outputs["loss"], on_step=False, on_epoch=True)
        self.log("twice", 2 * outputs["loss"], on_step=False, on_epoch=True)
        self.accuracy(output.sigmoid(), (y > 0).long())
        self.log("accuracy", self.accuracy, **both)
        return outputs

    def on_after_backward(self) -> None:
        self.log("norm", self.body.weight.detach().norm(), on_step=True, on_epoch=True)


class Metrics(Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def keep(self, trainer: Any, *_: Any) -> None:
        self.found.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    on_train_batch_end = on_train_epoch_end = keep


@pytest.mark.parametrize("size", [3, "auto"])
def test_what_is_logged_is_that_of_the_batch(size: Any) -> None:
    plain, split, again = Metrics(), Metrics(), Metrics()
    run(Logging(), plain, max_epochs=2)
    run(Logging(Shortage(3) if size == "auto" else None), MicroBatching(size), split, max_epochs=2)
    assert len(plain.found) == len(split.found) == 10
    for ours, theirs in zip(split.found, plain.found, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    run(Logging(), MicroBatching("auto"), again, max_epochs=2)
    assert again.found == plain.found


def test_a_metric_is_not_updated_by_what_failed() -> None:
    module = Logging(Shortage(2, backward=True))
    run(module, MicroBatching("auto"))
    assert module.seen["samples"] == list(range(COUNT))
    assert int(module.accuracy.tp + module.accuracy.fp + module.accuracy.tn + module.accuracy.fn) == 0  # epoch's end
    counted: list[int] = []
    module = Logging(Shortage(2, backward=True))

    def count(trainer: Any, module: Any) -> None:
        accuracy = module.accuracy
        counted.append(int(accuracy.tp + accuracy.fp + accuracy.tn + accuracy.fn))

    run(module, MicroBatching("auto"), At("on_train_batch_end", count))
    assert counted == [8, 16, 24, 29]


# ------------------------------------------------------------------------------------------------------------- auto


class Drawing(Net):
    """Draws from every generator, and has running averages."""

    def __init__(self, shortage: Shortage | None = None) -> None:
        super().__init__(shortage)
        self.body = nn.Sequential(nn.BatchNorm1d(4), self.body)  # type: ignore[assignment]
        self.count, self.tensor = 0, torch.zeros(1)
        self.register_buffer("replaced", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        self.tensor += 1
        self.replaced = self.replaced + 1
        scale = 1 + 0.1 * (random.random() + float(np.random.rand()) + float(torch.rand(())))
        return super().training_step(batch, batch_idx, scale)


@pytest.mark.filterwarnings("ignore:`body.0` is a BatchNorm1d")
@pytest.mark.parametrize(
    "shortage",
    [
        Shortage(4),
        Shortage(4, backward=True),
        Shortage(4, last=True, backward=True, batches=(1,)),
        Shortage(4, batches=(1, 2)),
        Shortage(4, error=MemoryError),
        Shortage(4, error=partial(RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")),
    ],
    ids=["forward", "backward", "last", "mid-window", "MemoryError", "RuntimeError"],
)
def test_a_step_that_failed_leaves_no_trace(shortage: Shortage) -> None:
    shortage.raised = 0
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 2}
    short, same = Drawing(shortage), Drawing()
    found = run(short, MicroBatching("auto"), **options)
    assert shortage.raised > 0
    assert_same(found, run(same, MicroBatching("auto"), sizes=found.sizes, **options))
    assert (short.count, float(short.tensor)) == (same.count, float(same.tensor))
    assert len(short.seen["samples"]) == 2 * COUNT


def test_whole_batches_run_as_they_are() -> None:
    for options in ({}, {"accumulate_grad_batches": 2}):
        assert_same(run(Net(), MicroBatching("auto"), max_epochs=2, **options), run(Net(), max_epochs=2, **options))


def test_the_size_is_said_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        micro = MicroBatching("auto")
        watch = run(Net(Shortage(2)), micro)
    said = [record.message for record in caplog.records if "MicroBatching" in record.message]
    assert said == [
        f"MicroBatching: memory ran out in batch 0 of epoch 0 with {samples} samples at once; from here on at most "
        f"{size}."
        for samples, size in ((8, 4), (4, 2))
    ]
    assert watch.sizes == [2, 2, 2, 2] and micro.size == 2
    run(Net(), micro)
    assert micro.size is None  # another fit begins anew


def test_bytes_that_are_counted() -> None:
    micro = MicroBatching("auto", memory_budget="0.6KiB")
    found = run(Net(), micro)
    assert micro.size == 2
    assert_same(found, run(Net(), MicroBatching("auto"), sizes=found.sizes))


class Keeping(Net):
    """Remembers, weakly, what it made in the forward of each attempt."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(shortage)
        self.made: list[weakref.ref[Tensor]] = []
        self.living = 0

    def forward(self, x: Tensor) -> Tensor:
        gone: Any = _MADE
        self.living = max(self.living, sum(ref() is not None for ref in gone))
        hidden = torch.tanh(self.body(x))
        gone.append(weakref.ref(hidden))
        return self.head(hidden)  # type: ignore[no-any-return]


_MADE: list[weakref.ref[Tensor]] = []


@pytest.mark.parametrize("backward", [False, True])
def test_what_a_failed_attempt_made_is_let_go_of(backward: bool) -> None:
    _MADE.clear()
    gc.disable()
    try:
        module = Keeping(Shortage(2, backward=backward))
        run(module, MicroBatching("auto"))
    finally:
        gc.enable()
    assert len(_MADE) > 14
    assert module.living == 0


def test_an_error_that_is_no_shortage_is_raised_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        run(Net(Shortage(4, error=partial(RuntimeError, "mat1 and mat2 shapes cannot be multiplied"))), MicroBatching())


def test_a_single_sample_that_does_not_fit() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"in batch 1 of epoch 0 with a single sample.*out of.*plan"):
        run(Net(Shortage(0, batches=(1,))), MicroBatching("auto"))


class Wrapped:
    def __init__(self, batch: Any) -> None:
        self.batch = batch


class Unwrapping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self(batch.batch[0])
        self.run_short(output, batch.batch, batch_idx)
        return output.square().mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return Wrapped(batch)


def test_a_batch_that_cannot_be_split() -> None:
    fit(Unwrapping(), MicroBatching("auto"), data=loader())  # as long as it need not be
    for callback, shortage in ((MicroBatching("auto"), Shortage(4)), (MicroBatching(3), None)):
        with pytest.raises(TypeError, match="but the batch is a Wrapped: make tensors of it"):
            fit(Unwrapping(shortage), callback, data=loader())


# ------------------------------------------------------------------------------------------------------------ tokens

TOKENS: dict[str, Any] = {"weight_by": "tokens", "count_key": "labels"}


@pytest.mark.parametrize("window", [0, 2])
def test_by_tokens_the_loss_is_that_of_the_batch(window: int) -> None:
    def windows() -> list[Callback]:
        return [GradientAccumulation(window, **TOKENS)] if window else []

    plain, split, by_samples = text.Text(), text.Text(), text.Text()
    data = text.loader(text.BATCHES)
    fit(plain, *windows(), data=data)
    fit(split, MicroBatching(2, **TOKENS), *windows(), data=data)
    fit(by_samples, MicroBatching(2), *windows(), data=data)
    torch.testing.assert_close(weights(split), weights(plain), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights(by_samples), weights(plain), rtol=1e-3)


class Poisoned(text.Text):
    """A mean of its own, whose gradient is NaN where nothing counts."""

    def loss(self, batch: Any) -> Tensor:
        counts = batch["labels"] != text.IGNORED
        scores = self.net(self.embed(batch["inputs"]["ids"])).transpose(1, 2)
        losses = nn.functional.cross_entropy(scores, batch["labels"].clamp(min=0), reduction="none")
        return (losses * counts).sum() / counts.sum()


def test_what_does_not_count_is_skipped_and_said() -> None:
    batches = text.make_batches([4, 4, 4])
    batches[0]["labels"][:2] = text.IGNORED
    batches[1]["labels"].fill_(text.IGNORED)
    left, after = Poisoned(text.adamw), []
    with pytest.warns(UserWarning) as said:
        keep = At("on_train_batch_end", lambda trainer, module: after.append(weights(module)))
        fit(left, MicroBatching(2, **TOKENS), keep, data=text.loader(batches))
    assert [message[:36] for message in text.ours(said)] == [
        "Nothing counts in a micro-batch: all",
        "Nothing counts in a whole batch: all",
    ]
    assert torch.equal(after[0], after[1])  # no step was made of nothing: neither momentum nor decay
    expected, _ = text.by_hand([[batches[0]], [batches[2]]], Poisoned(text.adamw))
    torch.testing.assert_close(weights(left), expected, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_is_said_once() -> None:
    batches = text.make_batches([4, 4])
    for batch in batches:
        batch["labels"][2:] = text.IGNORED
    with pytest.warns(UserWarning) as said:
        fit(text.Text(), MicroBatching(2), data=text.loader(batches))
    (message,) = text.ours(said)
    assert "The loss of micro-batch 2 of 2 of batch 0 is inf or NaN" in message and "weight_by='tokens'" in message


# ------------------------------------------------------------------------------------------------------ with others


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            conv, head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 5)
        self.net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), head)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("size", [3, "auto"])
def test_augmented_batches_are_split_with_their_targets(size: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(20, 3, 4, 4, generator=generator), torch.arange(20) % 5)

    def trained(*callbacks: Callback) -> Tensor:
        seed_everything(1, verbose=False)
        module = Classifier()
        augmentation = BatchAugmentation([MixUp(alpha=0.4, per_sample=True), CutMix(p=0.5)])
        fit(module, augmentation, LabelSmoothing(0.1), *callbacks, data=DataLoader(data, batch_size=8), max_epochs=2)
        return weights(module)

    micro = MicroBatching(size, **({"memory_budget": "6KiB"} if size == "auto" else {}))
    torch.testing.assert_close(trained(micro), trained(), rtol=1e-5, atol=1e-6)
    assert micro.size is not None and micro.size < 8


def test_the_noise_between_batches_is_that_of_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for micro in ([], [MicroBatching(3)]):
        noise = NoiseScaleAccumulation(2, 2)
        run(Net(dropout=0.0), noise, *micro, max_epochs=3)
        found.append((noise._measured, noise._signal, noise._noise))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    run(Net(), NoiseScaleAccumulation(1, 1), MicroBatching(3))  # measures nothing
    monkeypatch.setattr(NoiseScaleAccumulation, "install", lambda *_: None)  # which refuses it on a single device
    with pytest.raises(MisconfigurationException, match="NoiseScaleAccumulation\\(min_factor=1\\), which measures"):
        run(Net(), NoiseScaleAccumulation(1, 2), MicroBatching(3))


def test_batch_norm_is_said_once() -> None:
    class Normed(Net):
        def __init__(self, frozen: bool) -> None:
            super().__init__()
            self.norms = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
            self.frozen = frozen

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            self.norms.train(not self.frozen)

    with pytest.warns(UserWarning) as said:
        run(Normed(frozen=False), MicroBatching(3))
    (message,) = text.ours(said)
    assert message.startswith("`norms.0` is a BatchNorm1d") and "SyncBatchNorm does not change that" in message
    run(Normed(frozen=True), MicroBatching(3))


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_what_it_cannot_work_with() -> None:
    class Fetching(Net):
        def training_step(self, dataloader_iter: Any) -> Any:
            return None

    for match, module, callbacks in (
        ("takes a `dataloader_iter`", Fetching(), []),
        ("can't work with OptimizerInBackward: it", Net(), [OptimizerInBackward()]),
        ("can't work with SAM: its second pass takes the whole batch", Net(), [SAM()]),
        ("MicroBatching is in the Trainer's callbacks twice", Net(), [MicroBatching(2)]),
    ):
        with pytest.raises(MisconfigurationException, match=match):
            run(module, MicroBatching(3), *callbacks)


def test_everything_is_put_back_after_an_exception() -> None:
    module, micro = Net(), MicroBatching(3)
    stop = At("on_after_backward", lambda *_: (_ for _ in ()).throw(Stop()), on=1)
    trainers: list[Any] = []
    with pytest.raises(Stop):
        run(module, micro, stop, At("on_train_start", lambda trainer, _: trainers.append(trainer)))
    (trainer,) = trainers
    assert "log" not in vars(trainer.fit_loop.epoch_loop._results)
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
