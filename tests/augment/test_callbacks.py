from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_accel import BatchAugmentation, LabelSmoothing, NoEffectWarning
from lightning_accel.augment import (
    CutMix,
    MixedTarget,
    MixUp,
    RandomCrop,
    RandomHorizontalFlip,
    augment_batch,
    mixup_batch,
)


class Net(LightningModule):
    """A plain module that knows nothing of augmentation, and notes what it saw."""

    def __init__(self, loss: Any = F.cross_entropy) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 5)
        self.loss = loss
        self.accuracy = MulticlassAccuracy(5, average="micro")
        self.top2 = MulticlassAccuracy(5, average="micro", top_k=2)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.checked: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.layer(x.flatten(1))
        loss = self.loss(out, y)
        self.log("acc", self.accuracy(out, y))
        self.log("top2", self.top2(out, y))
        self.seen.append((x, y, loss.detach() if isinstance(loss, Tensor) else loss))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.checked.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(count: int = 24) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, 3, 4, 4, generator=g), torch.randint(0, 5, (count,), generator=g))


def fit(net: LightningModule, *callbacks: Callback, epochs: int = 1, dataset: Any = None, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(net, DataLoader(dataset or data(), batch_size=8), DataLoader(data(), batch_size=8))
    return trainer


def train(*callbacks: Callback, loss: Any = F.cross_entropy, **options: Any) -> Net:
    seed_everything(1, verbose=False)
    net = Net(loss)
    fit(net, *callbacks, **options)
    return net


def test_an_unedited_step_gets_the_exact_loss_and_hard_metrics() -> None:
    net = train(BatchAugmentation([RandomHorizontalFlip(), RandomCrop(4, padding=1), MixUp(alpha=1.0)], seed=3))
    plain = data()
    assert len(net.seen) == 3
    for i, (x, y, loss) in enumerate(net.seen):
        assert isinstance(y, MixedTarget)
        assert x.shape == (8, 3, 4, 4)
        assert torch.equal(y.targets[0], plain.tensors[1][8 * i : 8 * i + 8])
        assert loss > 0
    # the first batch's loss, of the first weights, from the soft vectors
    seed_everything(1, verbose=False)
    first = Net()
    x, y, loss = net.seen[0]
    torch.testing.assert_close(F.cross_entropy(first.layer(x.flatten(1)), F.one_hot(y, 5)), loss, rtol=1e-5, atol=1e-5)


def test_metrics_are_those_of_the_hard_target() -> None:
    net = train(BatchAugmentation([MixUp(alpha=1.0, per_sample=True)], seed=3), limit_train_batches=1)
    (_x, y, _loss), metrics = net.seen[0], net.trainer.callback_metrics
    with torch.no_grad():
        seed_everything(1, verbose=False)
        out = Net().layer(net.seen[0][0].flatten(1))
    expected = (out.argmax(1) == torch.tensor(y.tolist())).float().mean()
    assert metrics["acc"] == pytest.approx(float(expected))
    top2 = (out.topk(2).indices == torch.tensor(y.tolist())[:, None]).any(1).float().mean()
    assert metrics["top2"] == pytest.approx(float(top2))


def test_validation_sees_its_batches_untouched() -> None:
    net = train(BatchAugmentation([MixUp(alpha=1.0)]), LabelSmoothing(0.1))
    for i, (x, y) in enumerate(net.checked[-3:]):
        assert torch.equal(x, data().tensors[0][8 * i : 8 * i + 8])
        assert type(y) is Tensor


def test_label_smoothing_is_the_run_with_the_losss_own() -> None:
    smoothed = train(LabelSmoothing(0.1), epochs=2)
    own = train(loss=lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1), epochs=2)
    plain = train(epochs=2)
    assert torch.equal(smoothed.layer.weight, own.layer.weight)
    assert not torch.equal(smoothed.layer.weight, plain.layer.weight)


def test_smoothing_and_mixing_go_together_in_any_order() -> None:
    augmentation = [BatchAugmentation([MixUp(alpha=1.0)], seed=3), LabelSmoothing(0.1)]
    first, second = train(*augmentation), train(*reversed(augmentation))
    assert torch.equal(first.layer.weight, second.layer.weight)
    x, y, loss = first.seen[0]
    seed_everything(1, verbose=False)
    expected = F.cross_entropy(Net().layer(x.flatten(1)), 0.9 * (F.one_hot(y, 5) - 0.02) / 0.9 + 0.02)
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize(
    "callbacks",
    [
        [LabelSmoothing(0.0)],
        [BatchAugmentation([MixUp(alpha=0.0), RandomHorizontalFlip(p=0.0), RandomCrop(4), CutMix(p=0.0)])],
    ],
)
def test_neutral_settings_are_the_plain_run(callbacks: list[Callback]) -> None:
    assert torch.equal(train(*callbacks, epochs=2).layer.weight, train(epochs=2).layer.weight)


def test_compiled_module() -> None:
    torch._dynamo.reset()
    seed_everything(1, verbose=False)
    net = CompiledNet()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    fit(compiled, BatchAugmentation([MixUp(alpha=1.0)], seed=3), LabelSmoothing(0.1))
    seed_everything(1, verbose=False)
    eager = CompiledNet()
    fit(eager, BatchAugmentation([MixUp(alpha=1.0)], seed=3), LabelSmoothing(0.1))
    torch.testing.assert_close(net.layer.weight, eager.layer.weight)


class CompiledNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.layer(x.flatten(1)), y)


def test_bf16_autocast() -> None:
    net = train(BatchAugmentation([MixUp(alpha=1.0)]), precision="bf16-mixed")
    assert all(torch.isfinite(loss) for _, _, loss in net.seen)


# --- what a step does with the target -------------------------------------------------------------------------------


def by_gather(out: Tensor, y: Tensor) -> Tensor:
    return -out.log_softmax(1).gather(1, y[:, None]).mean()


def by_soft_vector(out: Tensor, y: Tensor) -> Tensor:
    return -(out.log_softmax(1) * F.one_hot(y, 5)).sum(1).mean()


def focal(out: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(out, y, reduction="none")
    return ((1 - out.softmax(1).gather(1, y[:, None]).squeeze(1)) ** 2 * each).mean()


@pytest.mark.parametrize("callback", [lambda: BatchAugmentation([MixUp(alpha=1.0)]), lambda: LabelSmoothing(0.1)])
def test_an_unknown_loss_warns_once(callback) -> None:
    with pytest.warns(
        NoEffectWarning, match="has no effect: no loss of `training_step` saw .*`gather` took the hard"
    ) as seen:
        train(callback(), loss=by_gather, epochs=2)
    assert len([w for w in seen if w.category is NoEffectWarning]) == 1


def test_a_loss_that_saw_it_in_part_warns() -> None:
    with pytest.warns(NoEffectWarning, match="`cross_entropy` saw how the target was changed, but `gather` combined"):
        train(BatchAugmentation([MixUp(alpha=1.0)]), loss=focal)


def test_smoothing_for_a_regression_loss_warns() -> None:
    with pytest.warns(NoEffectWarning, match="LabelSmoothing has no effect: `mse_loss` is no loss of classes"):
        train(LabelSmoothing(0.1), loss=lambda out, y: F.mse_loss(out[:, 0], y.float()))


def test_known_losses_do_not_warn() -> None:
    # warnings are errors in these tests
    for loss in (nn.CrossEntropyLoss(), by_soft_vector, lambda out, y: F.nll_loss(out.log_softmax(1), y.long())):
        train(BatchAugmentation([MixUp(alpha=1.0)]), LabelSmoothing(0.1), loss=loss)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_does_not_warn() -> None:
    train(BatchAugmentation([MixUp(alpha=1.0)]), loss=lambda out, y: None)


def test_a_second_fit_warns_again() -> None:
    callback, net = LabelSmoothing(0.1), Net(by_gather)
    for _ in range(2):
        with pytest.warns(NoEffectWarning):
            fit(net, callback)


# --- batches --------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass
class Record:
    image: Tensor
    label: Tensor


X, Y = torch.rand(8, 3, 4, 4), torch.arange(8)


@pytest.mark.parametrize(
    ("batch", "keys"),
    [
        ((X, Y), (0, 1)),
        ([X, Y], (0, 1)),
        ((Y, X, "extra"), (1, 0)),
        (Pair(X, Y), (0, 1)),
        (Pair(X, Y), ("image", "label")),
        (Record(X, Y), ("image", "label")),
        ({"image": X, "label": Y}, ("image", "label")),
        ({"inputs": {"pixels": X}, "label": Y}, ("inputs.pixels", "label")),
    ],
)
def test_batches_of_every_kind(batch: Any, keys: tuple[int | str, int | str]) -> None:
    from lightning_accel.hooks.keys import find_item

    x, y = X.clone(), Y.clone()
    g = torch.Generator().manual_seed(4)
    new = augment_batch(batch, [RandomHorizontalFlip(), MixUp(alpha=1.0)], *keys, generator=g)
    smoothed = LabelSmoothing(0.1, target_key=keys[1]).transform_batch(new, g)
    assert type(new) is type(smoothed) is type(batch)
    assert find_item(batch, keys[0], "") is X and torch.equal(x, X)
    assert find_item(batch, keys[1], "") is Y and torch.equal(y, Y)
    assert not torch.equal(find_item(new, keys[0], ""), X)
    assert find_item(new, keys[1], "").smoothing == 0
    assert find_item(smoothed, keys[1], "").smoothing == 0.1
    assert find_item(smoothed, keys[0], "") is find_item(new, keys[0], "")


@pytest.mark.parametrize("batch", [X, (X,), [X], {"image": X}])
def test_batches_without_a_target(batch: Any) -> None:
    keys = ("image", None) if isinstance(batch, dict) else (0, 1)
    new = augment_batch(batch, [RandomHorizontalFlip(p=1.0)], *keys)
    assert type(new) is type(batch)
    x = new if isinstance(new, Tensor) else new["image"] if isinstance(new, dict) else new[0]
    assert torch.equal(x, X.flip(-1))
    with pytest.raises(ValueError, match="Expected the batch to have a target for MixUp, but there is none"):
        augment_batch(batch, [RandomHorizontalFlip(), MixUp()], *keys)


def test_an_unchanged_batch_is_the_same_object() -> None:
    batch = (X, Y)
    assert augment_batch(batch, [MixUp(alpha=0.0)]) is batch
    assert LabelSmoothing(0.0).transform_batch(batch, torch.Generator()) is batch


def test_targets_that_are_no_tensors_are_left_alone() -> None:
    names = ["cat"] * 8
    new = augment_batch((X, names), [RandomHorizontalFlip(p=1.0)])
    assert new[1] is names


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: augment_batch({"image": X}, [MixUp()]),
            ValueError,
            "Expected `input_key` .* has the keys 'image', but got 0",
        ),
        (lambda: augment_batch({"image": X}, [MixUp()], "image"), ValueError, "Expected `target_key` .*, but got 1"),
        (lambda: augment_batch((Y.tolist(), Y), [MixUp()]), TypeError, "Expected `input_key` to name a tensor"),
        (
            lambda: LabelSmoothing().transform_batch(X, torch.Generator()),
            ValueError,
            "Expected the batch to have a target",
        ),
        (
            lambda: LabelSmoothing().transform_batch((X, [1]), torch.Generator()),
            TypeError,
            "Expected `target_key` to name",
        ),
        (lambda: LabelSmoothing(smoothing=1.1), ValueError, r"Expected `smoothing` to be in \[0, 1\], but got 1.1."),
        (
            lambda: BatchAugmentation([]),
            ValueError,
            r"Expected `transforms` to have at least one transform, but got \[\].",
        ),
        (
            lambda: BatchAugmentation(MixUp()),
            TypeError,
            "Expected `transforms` to be a list of transforms, but got MixUp",
        ),
        (lambda: BatchAugmentation([nn.ReLU()]), TypeError, r"but one of them is ReLU\(\)."),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_transforms_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    config = """
callback:
  class_path: lightning_accel.BatchAugmentation
  init_args:
    input_key: image
    target_key: label
    transforms:
      - class_path: lightning_accel.augment.RandomCrop
        init_args: {size: 32, padding: 4}
      - class_path: lightning_accel.augment.RandomCrop
        init_args: {size: [24, 32]}
      - class_path: lightning_accel.augment.RandomHorizontalFlip
      - class_path: lightning_accel.augment.MixUp
        init_args: {alpha: 0.3, per_sample: true}
"""
    callback = parser.instantiate_classes(parser.parse_string(config)).callback
    assert isinstance(callback, BatchAugmentation)
    assert callback.input_key == "image" and callback.target_key == "label"
    crop, wide, flip, mixup = callback.transforms
    assert (crop.size, crop.padding, wide.size, flip.p) == ((32, 32), 4, (24, 32), 0.5)
    assert (mixup.alpha, mixup.per_sample) == (0.3, True)


def test_state_key_tells_settings_apart() -> None:
    keys = {BatchAugmentation([MixUp(alpha=alpha)]).state_key for alpha in (0.1, 0.2, 0.2)}
    assert len(keys) == 2
    assert "MixUp(alpha=0.1, per_sample=False, p=1.0)" in BatchAugmentation([MixUp(alpha=0.1)]).state_key


def test_mixed_by_hand_in_a_plain_loop() -> None:
    x, y = mixup_batch(X, Y, lam=0.25, indices=Y.flip(0))
    out = torch.rand(8, 8)
    expected = 0.25 * F.cross_entropy(out, Y) + 0.75 * F.cross_entropy(out, Y.flip(0))
    torch.testing.assert_close(F.cross_entropy(out, y), expected)
    torch.testing.assert_close(x, 0.25 * X + 0.75 * X.flip(0))


class ManualNet(Net):
    def __init__(self, loss: Any = F.cross_entropy) -> None:
        super().__init__(loss)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization() -> None:
    weights = []
    for kind in (Net, ManualNet):
        seed_everything(1, verbose=False)
        net = kind()
        fit(net, BatchAugmentation([MixUp(alpha=1.0)], seed=3))
        weights.append(net.layer.weight)
    assert torch.equal(*weights)
    with pytest.warns(NoEffectWarning, match="`gather` took the hard"):
        fit(ManualNet(by_gather), BatchAugmentation([MixUp(alpha=1.0)], seed=3))
