"""SAM against the few lines that it amounts to, and all that a second pass must leave alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanSquaredError, MetricCollection

from lightning_accel import (
    EMA,
    SAM,
    BatchAugmentation,
    ExactResume,
    FusedOptimizer,
    GradientAccumulation,
    GradualPruning,
    LearningRateFinder,
    LowBitOptimizer,
    Muon,
    NoEffectWarning,
    NoiseScaleAccumulation,
)
from lightning_accel.augment import MixUp
from lightning_accel.optimizers.sam import perturb_, restore_
from tests.conformance.compare import assert_equal
from tests.conftest import WEIGHTS_ONLY
from tests.hooks.common import At, Stop, fit, loader, make_trainer, samples, save_at

# ------------------------------------------------------------------------------------------------- the pure functions


def weights_with_gradients() -> list[Tensor]:
    weights = [torch.randn(3, 2), torch.randn(4), torch.randn(())]
    for weight in weights:
        weight.requires_grad_().grad = torch.randn_like(weight)
    return weights


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_perturbed_weights_are_rho_away_along_the_gradient_and_come_back_bit_for_bit() -> None:
    weights = weights_with_gradients()
    start, gradient = flat(weights), flat(weight.grad for weight in weights)
    before = [weight.detach().clone() for weight in weights]
    assert perturb_(weights, 0.3)
    torch.testing.assert_close(flat(weights) - start, 0.3 * gradient / gradient.norm())
    restore_(weights, before)
    assert torch.equal(flat(weights), start)


def test_adaptive_distances_are_relative_to_each_weight() -> None:
    """Equation 8 of ASAM, for the first two; the last one is moved as by SAM, in the same norm."""
    weights = weights_with_gradients()
    start, gradient = flat(weights), flat(weight.grad for weight in weights)
    size = torch.cat([start[:10].abs() + 0.01, torch.ones(1)])
    assert perturb_(weights, 0.3, set(weights[:2]), eta=0.01)
    torch.testing.assert_close(flat(weights) - start, 0.3 * size**2 * gradient / (size * gradient).norm())


def test_adaptive_does_not_see_how_layers_are_scaled() -> None:
    """Two layers with one scaled up and the other down are the same network, and are perturbed as the same."""
    one, other = (torch.tensor([[1.0, -2.0], [0.5, 3.0]]) for _ in range(2))
    other *= 7
    for weight, gradient in ((one, torch.tensor([[1.0, 2.0], [-1.0, 0.5]])), (other, None)):
        weight.requires_grad_().grad = torch.tensor([[1.0, 2.0], [-1.0, 0.5]]) / 7 if gradient is None else gradient
        perturb_([weight], 0.5, {weight}, eta=0.0)
    torch.testing.assert_close(other, 7 * one)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_moves_where_the_gradient_is_not_finite(bad: float) -> None:
    weights = weights_with_gradients()
    start = flat(weights)
    weights[1].grad[2] = bad  # type: ignore[index]
    assert not perturb_(weights, 0.3) and not perturb_(weights, 0.3, set(weights))
    assert torch.equal(flat(weights), start)


def test_a_gradient_of_zero_moves_nothing() -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.zeros(3)
    assert perturb_([weight], 0.3) and weight.tolist() == [1, 1, 1]


def test_norms_of_half_precision_are_taken_in_float32() -> None:
    weight = torch.zeros(70_000, dtype=torch.float16, requires_grad=True)
    weight.grad = torch.full((70_000,), 300.0, dtype=torch.float16)  # the sum of the squares is out of range
    assert perturb_([weight], 10.0)
    torch.testing.assert_close(weight[0].item(), 10 / 70_000**0.5, rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------------- against a loop by hand


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Net(LightningModule):
    """A small regression with what a second pass could disturb."""

    def __init__(
        self,
        dropout: float = 0.0,
        norm: bool = False,
        optimizer: Callable[[Any], torch.optim.Optimizer] = SGD,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)
        )
        self.make = optimizer
        self.calls: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls.append("step")
        x, y = batch
        return F.mse_loss(self.layers(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def sam_by_hand(
    net: Net, windows: list[list[Any]], rho: float = 0.05, every: int = 1, eta: float | None = None, clip: float = 0
) -> dict[str, Tensor]:
    """SAM in plain torch."""
    optimizer = net.configure_optimizers()
    names = {weight: name for name, weight in net.named_parameters()}

    def backward(batches: list[Any]) -> None:
        optimizer.zero_grad()
        for batch in batches:
            (net.training_step(batch, 0) / len(batches)).backward()

    for step, batches in enumerate(windows):
        random = torch.get_rng_state()
        backward(batches)
        if step % every == 0:
            trained = [weight for weight in net.parameters() if weight.grad is not None]
            before = [weight.detach().clone() for weight in trained]
            adaptive = {w: eta is not None and "bias" not in names[w] for w in trained}
            size = [old.abs() + eta if adaptive[w] else 1.0 for w, old in zip(trained, before, strict=True)]
            norm = torch.stack([(w.grad * t).norm() for w, t in zip(trained, size, strict=True)]).double().norm().item()
            with torch.no_grad():
                for weight, t in zip(trained, size, strict=True):
                    weight.add_(weight.grad * t * t, alpha=rho / (norm + 1e-12))
            torch.set_rng_state(random)
            statistics = copy.deepcopy(dict(net.named_buffers()))
            backward(batches)
            with torch.no_grad():
                for weight, old in zip(trained, before, strict=True):
                    weight.copy_(old)
                for name, buffer in net.named_buffers():
                    buffer.copy_(statistics[name])
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return net.state_dict()


def trained(net: Net, *callbacks: Any, **arguments: Any) -> dict[str, Tensor]:
    fit(net, *callbacks, **arguments)
    return net.state_dict()


def batches(epochs: int = 1) -> list[Any]:
    return [batch for _ in range(epochs) for batch in loader()]


@pytest.mark.parametrize(
    ("sam", "by_hand"),
    [
        ({}, {}),
        ({"rho": 0.3}, {"rho": 0.3}),
        ({"every": 2}, {"every": 2}),
        ({"adaptive": True}, {"rho": 0.5, "eta": 0.01}),
        ({"adaptive": True, "rho": 1.0, "eta": 0.2, "every": 3}, {"rho": 1.0, "eta": 0.2, "every": 3}),
    ],
)
def test_bit_for_bit_the_loop_by_hand(sam: dict[str, Any], by_hand: dict[str, Any]) -> None:
    expected = sam_by_hand(Net(), [[batch] for batch in batches(2)], **by_hand)
    assert_equal(trained(Net(), SAM(**sam), max_epochs=2), expected, "SAM")
    plain = trained(Net(), max_epochs=2)
    assert any(not torch.equal(plain[name], value) for name, value in expected.items())


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, lr=0.01), partial(torch.optim.RMSprop, lr=0.01)])
def test_with_other_optimizers(optimizer: Any) -> None:
    expected = sam_by_hand(Net(optimizer=optimizer), [[batch] for batch in batches()])
    assert_equal(trained(Net(optimizer=optimizer), SAM()), expected, "SAM")


def test_dropout_is_the_same_in_both_passes_and_running_means_see_the_first() -> None:
    slow = partial(torch.optim.SGD, lr=0.01)
    net = Net(0.5, norm=True, optimizer=slow)
    windows = [[batch] for batch in batches(2)]
    torch.manual_seed(5)
    expected, after = sam_by_hand(net, windows, rho=0.5), torch.rand(3)

    class Rewound(Net):
        def on_train_start(self) -> None:
            torch.manual_seed(5)  # whatever was drawn to set up the data

    net = Rewound(0.5, norm=True, optimizer=slow)
    # a loader that draws nothing, as the loop by hand
    trainer = make_trainer(SAM(rho=0.5), max_epochs=2)
    trainer.fit(net, DataLoader(samples(5), batch_size=4, generator=torch.Generator()))
    assert_equal(net.state_dict(), expected, "SAM")
    assert torch.equal(torch.rand(3), after)
    assert net.layers[1].num_batches_tracked == 10


def test_it_begins_at_start() -> None:
    plain = [[batch] for batch in batches()]
    net = Net()
    optimizer = net.configure_optimizers()
    for (batch,) in plain[:3]:
        optimizer.zero_grad()
        net.training_step(batch, 0).backward()
        optimizer.step()
    net.make = lambda parameters: optimizer  # type: ignore[assignment,return-value]
    expected = sam_by_hand(net, plain[3:])
    assert_equal(trained(Net(), SAM(start="0.6fit")), expected, "SAM")


def test_a_fit_that_ends_before_start_is_said() -> None:
    with pytest.warns(NoEffectWarning, match="the fit ended before `start` \\('9step'\\)"):
        net = Net()
        assert_equal(trained(net, SAM(start=9)), trained(Net()), "before `start`")
    assert len(net.calls) == 5


def test_clipping_is_of_the_second_gradient() -> None:
    expected = sam_by_hand(Net(), [[batch] for batch in batches()], rho=0.5, clip=0.2)
    assert_equal(trained(Net(), SAM(rho=0.5), gradient_clip_val=0.2), expected, "SAM")


# ------------------------------------------------------------------------------------------------------- accumulation


def test_a_window_goes_through_the_second_pass_as_a_whole() -> None:
    given = batches(2)
    windows = [given[0:2], given[2:4], given[4:5], given[5:7], given[7:9], given[9:10]]
    expected = sam_by_hand(Net(), windows, rho=0.3)
    net = Net()
    assert_equal(trained(net, SAM(rho=0.3), GradientAccumulation(2), max_epochs=2), expected, "SAM")
    assert len(net.calls) == 20
    net = Net()
    assert_equal(
        trained(net, SAM(rho=0.3), accumulate_grad_batches=2, limit_train_batches=4),
        sam_by_hand(Net(), windows[:2], rho=0.3),
        "the Trainer's own windows",
    )


def test_each_batch_of_a_window_has_its_own_random_draws_again_and_none_is_used_up() -> None:
    drawn: list[float] = []

    class Drawing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            drawn.append(float(torch.rand(())))
            if len(drawn) in (3, 4):  # in a second pass
                torch.rand(9)
            return super().training_step(batch, batch_idx)

    fit(Drawing(), SAM(), accumulate_grad_batches=2, limit_train_batches=4)
    first = [*drawn[0:2], *drawn[4:6]]
    assert drawn == [*first[:2], *first[:2], *first[2:], *first[2:]] and len(set(first)) == 4
    drawn.clear()

    class Plain(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            drawn.append(float(torch.rand(())))
            return super().training_step(batch, batch_idx)

    fit(Plain(), limit_train_batches=4)
    assert drawn == first


def test_only_steps_that_are_due_keep_batches() -> None:
    expected = sam_by_hand(Net(), [batches()[:2], batches()[2:4]], rho=0.3, every=2)
    net = Net()
    result = trained(net, SAM(rho=0.3, every=2), accumulate_grad_batches=2, limit_train_batches=4)
    assert_equal(result, expected, "SAM")
    assert len(net.calls) == 6


class Words(Net):
    """Its loss is the mean over the entries that are not masked."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, mask = batch
        return F.mse_loss(self.layers(x)[mask], y[mask])


def test_weighed_windows_are_one_big_batch() -> None:
    x, y = samples(4).tensors
    mask = torch.rand(16, 1, generator=torch.Generator().manual_seed(2))[:, 0] < torch.arange(1, 17) / 16
    data = torch.utils.data.TensorDataset(x, y, mask)
    small, big = DataLoader(data, batch_size=4), DataLoader(data, batch_size=16)
    assert len({int(m.sum()) for _, _, m in small}) > 1
    weighed = GradientAccumulation(4, weight_by="tokens", count_key=2)
    result = trained(Words(), SAM(rho=0.3), weighed, data=small, max_epochs=3)
    expected = trained(Words(), SAM(rho=0.3), data=big, max_epochs=3)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # said by Lightning, once a process
def test_a_batch_without_a_loss_is_passed_over() -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx == 0 else None

    net = Skips(optimizer=partial(torch.optim.SGD, lr=0.1))
    result = trained(net, SAM(rho=0.3), accumulate_grad_batches=2, limit_train_batches=2)
    half = partial(torch.optim.SGD, lr=0.05)  # the Trainer divides by the batches that were to come
    assert_equal(result, sam_by_hand(Net(optimizer=half), [batches()[:1]], rho=0.3), "SAM")
    assert len(net.calls) == 3


def test_a_resume_in_a_window_has_its_batches(tmp_path: Path) -> None:
    """With dropout: also the random draws of each batch."""
    path, complete = tmp_path / "window.ckpt", tmp_path / "complete.ckpt"

    def callbacks() -> list[Any]:
        return [SAM(rho=0.3), GradientAccumulation(3), ExactResume()]

    whole = Net(0.3)
    saves = [save_at("on_train_batch_end", path, on=1), save_at("on_train_batch_end", complete, on=2)]
    fit(whole, *callbacks(), *saves)
    key = SAM(rho=0.3).state_key
    assert len(torch.load(path, weights_only=True)["callbacks"][key]["ranks"]) == 1
    assert key not in torch.load(complete, weights_only=True)["callbacks"]
    resumed = Net(0.3)
    torch.manual_seed(77)
    make_trainer(*callbacks()).fit(resumed, loader(), ckpt_path=path, **WEIGHTS_ONLY)
    assert_equal(resumed.state_dict(), whole.state_dict(), "resumed")
    assert resumed.calls == ["step"] * (1 + 3 + 2 + 2)


def test_a_resume_in_a_window_without_its_batches_is_said(tmp_path: Path) -> None:
    path = tmp_path / "window.ckpt"
    fit(Net(), GradientAccumulation(3), ExactResume(), save_at("on_train_batch_end", path, on=1))
    resumed = Net()
    with pytest.warns(UserWarning, match="inside an accumulation window without the batches that SAM kept of it"):
        fit(resumed, SAM(), GradientAccumulation(3), ExactResume(), ckpt_path=path)
    assert resumed.calls == ["step"] * (1 + 2 + 2)


class Pair:
    """A batch of a class that a checkpoint can't be read with."""

    def __init__(self, items: Any) -> None:
        self.x, self.y = (torch.stack(column) for column in zip(*items, strict=True))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))


def test_batches_that_cannot_be_saved_are_said_and_the_checkpoint_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "window.ckpt"
    data = loader(collate_fn=Pair)
    with pytest.warns(UserWarning, match=r"can't be loaded with weights_only=True \(.*Pair\)"):
        fit(Net(), SAM(), save_at("on_train_batch_end", path, on=0), accumulate_grad_batches=2, data=data)
    assert SAM().state_key not in torch.load(path, weights_only=True)["callbacks"]


# ------------------------------------------------------------------------------------------------------ what is logged


class Measured(Net):
    """Logs its loss and measures it in all ways."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(norm=True, **arguments)
        self.error = MeanSquaredError()
        self.both = MetricCollection({"a": MeanSquaredError(), "b": MeanSquaredError(squared=False)})
        self.listed = CatMetric()  # keeps lists
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        found = self.layers(x)
        loss = F.mse_loss(found, y)
        self.error(found, y)
        self.both(found, y)
        self.listed.update(found.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("error", self.error, on_step=False, on_epoch=True)
        self.log_dict(self.both, on_step=False, on_epoch=True)  # type: ignore[arg-type]
        self.losses.append(float(loss.detach()))
        return {"loss": loss, "extra": batch_idx}


def test_logs_and_metrics_are_of_the_first_pass() -> None:
    net, outputs = Measured(), []
    seen: list[tuple[int, int]] = []

    def look(trainer: Any, module: Measured) -> None:
        seen.append((int(module.error.total), len(module.listed.value)))  # type: ignore[arg-type]

    class Outputs(At):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, output: Any, *_: Any) -> None:
            outputs.append(float(output["loss"]))

    trainer = fit(net, SAM(rho=0.5), At("on_train_batch_end", look), Outputs("setup", lambda *_: None))
    first = net.losses[::2]
    assert len(net.losses) == 10 and first != net.losses[1::2]
    assert outputs == first
    assert seen == [(4 * n, n) for n in range(1, 6)]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    mean = sum(first) / 5
    assert metrics["loss_epoch"] == metrics["error"] == metrics["a"] == pytest.approx(mean)
    assert metrics["b"] == pytest.approx(mean**0.5) and metrics["loss_step"] == first[-1]


def test_hooks_of_a_backward_are_called_twice_and_all_others_once() -> None:
    net, calls = Net(), []
    once = ["on_train_batch_start", "on_before_zero_grad", "on_before_optimizer_step", "on_train_batch_end"]
    twice = ["on_before_backward", "on_after_backward"]
    for name in once + twice:
        setattr(net, name, lambda *_, name=name: calls.append(name))
    fit(net, SAM(), data=loader(1))
    order = [once[0], "on_before_backward", once[1], "on_after_backward", *twice, once[2], once[3]]
    assert sorted(calls) == sorted(order) and calls[-2:] == once[2:]


def test_a_gradient_that_a_hook_changes_is_changed_in_both_passes() -> None:
    class Masked(Net):
        def on_after_backward(self) -> None:
            self.layers[0].weight.grad[:, 0] = 0  # type: ignore[index]

    net = Masked(optimizer=partial(torch.optim.SGD, lr=0.1))
    before = net.layers[0].weight[:, 0].clone()  # type: ignore[index]
    trained(net, SAM(rho=1.0))
    assert torch.equal(net.layers[0].weight[:, 0], before)  # type: ignore[index]


def test_both_passes_have_the_same_batch_with_the_same_mix() -> None:
    seen: list[Any] = []

    class Watched(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append((batch_idx, batch[0].clone(), batch[1].clone()))
            return super().training_step(batch, batch_idx)

    fit(Watched(), SAM(), BatchAugmentation([MixUp(1.0)]))
    assert len(seen) == 10
    assert_equal(seen[::2], seen[1::2], "the second pass")
    assert not torch.equal(seen[0][1], batches()[0][0])


# ----------------------------------------------------------------------------------------------- batches of all kinds


def as_dicts(items: Any) -> dict[str, Any]:
    return {"x": torch.stack([x for x, _ in items]), "inner": {"y": [torch.stack([y for _, y in items])]}}


class Popping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        target = batch["inner"]["y"].pop()
        return super().training_step((batch.pop("x"), target), batch_idx)


def test_a_step_may_take_its_batch_apart() -> None:
    result = trained(Popping(), SAM(), data=loader(collate_fn=as_dicts))
    assert_equal(result, sam_by_hand(Net(), [[batch] for batch in batches()]), "SAM")


def test_a_batch_that_is_changed_in_place_is_refused() -> None:
    class Dividing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0].div_(2)
            return super().training_step(batch, batch_idx)

    net = Dividing()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(MisconfigurationException, match="changes a tensor of it in place: make a new one"):
        fit(net, SAM())
    assert_equal(net.state_dict(), before, "weights")


# --------------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_changes_nothing(fused: bool) -> None:
    """Its scale is a power of two, and a direction has no scale."""
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=fused)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    result = trained(Net(optimizer=optimizer), SAM(rho=0.3), plugins=[precision])
    expected = sam_by_hand(Net(optimizer=optimizer), [[batch] for batch in batches()], rho=0.3)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-6, atol=1e-7, msg=name)


class Overflowing(Net):
    """Its gradient is infinite at batch 2."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx == 2 else loss


def test_an_overflow_in_the_first_pass_skips_the_step_and_the_second_pass() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    net = Overflowing()
    result = trained(net, SAM(rho=0.3), plugins=[precision])
    assert net.calls == ["step"] * 9 and scaler.get_scale() == 512
    expected = sam_by_hand(Net(), [[batch] for n, batch in enumerate(batches()) if n != 2], rho=0.3)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_bfloat16_autocast() -> None:
    result, plain = (trained(Net(), *sam, precision="bf16-mixed") for sam in ([SAM(rho=0.5)], []))
    expected = sam_by_hand(Net(), [[batch] for batch in batches()], rho=0.5)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=0, atol=0.02, msg=name)
    assert any(not torch.equal(result[name], value) for name, value in plain.items())


def test_parameters_that_are_too_coarse_are_said() -> None:
    with pytest.warns(UserWarning, match=r"rounded away in parameters of torch\.bfloat16"):
        fit(Net(), SAM(), precision="bf16-true")


# ----------------------------------------------------------------------------------------- gradients and parameters


def test_a_gradient_that_is_not_finite_is_left_to_the_optimizer_and_said_once() -> None:
    class Guarded(Overflowing):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if not all(bool(p.grad.isfinite().all()) for p in self.parameters()):  # type: ignore[union-attr]
                optimizer.zero_grad()

    net = Guarded()
    with pytest.warns(UserWarning, match="The gradient of step 2 holds inf or NaN: SAM makes no second pass") as said:
        result = trained(net, SAM(rho=0.3), max_epochs=2)
    assert len([item for item in said if "SAM" in str(item.message)]) == 1
    assert net.calls == ["step"] * 18
    expected = sam_by_hand(Net(), [[batch] for n, batch in enumerate(batches(2)) if n not in (2, 7)], rho=0.3)
    assert_equal(result, expected, "SAM")


class Odd(Net):
    """A frozen layer, two layers with one weight, a layer that is not used, and one without an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.left_out, self.shared = nn.Linear(3, 3), nn.Linear(1, 1), nn.Linear(1, 1)
        self.layers.append(self.shared)
        self.layers.append(nn.Linear(1, 1))
        self.layers[-1].weight = self.shared.weight  # type: ignore[assignment]
        self.layers.append(self.left_out)
        self.layers[0].requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        inside = [parameter for name, parameter in self.named_parameters() if "left_out" not in name]
        outside = {id(parameter) for parameter in self.left_out.parameters()}
        return self.make([parameter for parameter in inside if id(parameter) not in outside])


def test_frozen_shared_unused_and_forgotten_parameters() -> None:
    at: list[dict[str, Tensor]] = []

    class Watched(Odd):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            at.append({name: value.detach().clone() for name, value in self.named_parameters()})
            return super().training_step(batch, batch_idx)

    fit(Watched(), SAM(rho=0.3), data=loader(1))
    moved = {name for name, value in at[0].items() if not torch.equal(value, at[1][name])}
    assert moved == {f"layers.{n}" for n in ("3.weight", "3.bias", "4.weight", "4.bias", "5.bias")}
    distance = flat(at[1].values()) - flat(at[0].values())
    assert float(distance.norm()) == pytest.approx(0.3, rel=1e-5)


def test_pruned_weights_stay_zero_in_the_second_pass_too() -> None:
    zeros: list[int] = []

    class Watched(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            zeros.append(int((self.layers[0].weight == 0).sum()))  # type: ignore[union-attr]
            return super().training_step(batch, batch_idx)

    pruning = GradualPruning(0.5, start=0, end=3, every=1, include=["layers.0.weight"])
    fit(Watched(), SAM(rho=0.5), pruning, max_epochs=2)
    assert zeros[::2] == zeros[1::2] and zeros[-1] == 16 and len(set(zeros)) > 2


def test_sparse_gradients_are_refused() -> None:
    class Sparse(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0] + self.embedding(torch.tensor([1])), batch[1]), batch_idx)

    with pytest.raises(MisconfigurationException, match=r"sparse gradients, but that of 'embedding\.weight' is"):
        fit(Sparse(), SAM())


# ------------------------------------------------------------------------------------------------- what can't be done


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_what_is_refused() -> None:
    lbfgs = partial(torch.optim.LBFGS, lr=0.1)
    with pytest.raises(MisconfigurationException, match="SAM can't work with LBFGS, which evaluates the loss several"):
        fit(Net(optimizer=lbfgs), SAM())
    with pytest.raises(MisconfigurationException, match="SAM can't work with NoiseScaleAccumulation: it measures"):
        fit(Net(), SAM(), NoiseScaleAccumulation())
    with pytest.raises(MisconfigurationException, match="SAM is in the Trainer's callbacks twice"):
        fit(Net(), SAM(), SAM(rho=0.1))

    class Iterating(Net):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    with pytest.raises(MisconfigurationException, match=r"SAM needs each batch twice, but .* a `dataloader_iter`"):
        fit(Iterating(), SAM())


def test_an_optimizer_that_evaluates_twice_is_refused() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    with pytest.raises(MisconfigurationException, match="SAM can't work with Twice, which evaluates the loss several"):
        fit(Net(optimizer=partial(Twice, lr=0.1)), SAM())


# --------------------------------------------------------------------------------------------- nothing is left behind


@contextmanager
def failing_in(net: Net, number: int) -> Iterator[None]:
    original = net.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        loss = original(batch, batch_idx)
        if len(net.calls if isinstance(net, Measured) is False else net.losses) == number:
            raise Stop
        return loss

    net.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(Stop):
        yield


def test_an_exception_in_the_second_pass_leaves_what_the_first_one_left() -> None:
    net, first = Measured(), Measured()
    with failing_in(first, 1):
        fit(first)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with failing_in(net, 2):
        fit(net, SAM(rho=5.0))
    assert_equal(net.state_dict(), first.state_dict(), "weights and running means")
    assert int(net.error.total) == int(first.error.total) == 4
    assert len(net.listed.value) == 1
    del state


@pytest.mark.parametrize("hook", ["training_step", "on_after_backward"])
def test_a_checkpoint_from_inside_the_second_pass_has_the_true_weights(tmp_path: Path, hook: str) -> None:
    """As a cluster's signal may ask for at any moment; the pass goes on as if nothing had been."""
    path, net, plain = tmp_path / "inside.ckpt", Net(), Net()
    original = getattr(net, hook)

    def saving(*args: Any) -> Any:
        result = original(*args)
        if len(net.calls) == 4:
            net.trainer.save_checkpoint(path)
        return result

    setattr(net, hook, saving)
    start = trained(Net(), SAM(rho=0.3), data=loader(1))
    result = trained(net, SAM(rho=0.3))
    assert_equal(torch.load(path, weights_only=True)["state_dict"], start, "saved")
    assert_equal(result, trained(plain, SAM(rho=0.3)), "what was trained")


def test_with_everything_that_steps() -> None:
    """Beside the methods of an optimizer, whose closure it is called in."""
    optimizer = partial(torch.optim.AdamW, lr=0.01)
    others: list[list[Any]] = [[LowBitOptimizer(min_size=8)], [FusedOptimizer()], [Muon(), EMA(0.5)]]
    for callbacks in others:
        net = Net(optimizer=optimizer)
        fit(net, SAM(rho=0.3), *callbacks)
        assert len(net.calls) == 10 and all(value.isfinite().all() for value in net.state_dict().values())


def test_an_epoch_without_backwards_has_no_second_pass() -> None:
    """The Trainer's weight averaging makes one for the running means of batch norm."""
    net = Net(norm=True, optimizer=partial(torch.optim.SGD, lr=0.01))
    fit(net, SAM(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), max_epochs=2)
    assert len(net.calls) == 2 * 2 * 5 + 5


def test_on_the_side_of_a_fit() -> None:
    """The finder's steps have a second pass too, and leave nothing."""
    calls: list[None] = []

    class Counted(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            outside(calls)
            return super().training_step(batch, batch_idx)

    net, finder = Counted(), LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_steps=10, early_stop=None)
    fit(net, SAM(rho=0.3), finder)
    assert finder.rate is not None and len(calls) == 2 * 10 + 10
    again = Net(optimizer=partial(torch.optim.SGD, lr=finder.rate, momentum=0.9))
    assert_equal(net.state_dict(), trained(again, SAM(rho=0.3)), "after the search")


def outside(calls: list[None]) -> None:
    calls.append(None)
