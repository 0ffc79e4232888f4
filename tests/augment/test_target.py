from __future__ import annotations

import copy
import io
import operator
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_accel.augment import MixedTarget, mix_targets, smooth_targets

A = torch.tensor([0, 3, 1, 4, 2, 2])
OTHERS = torch.tensor([3, 0, 5, 1, 2, 4])
B = A[OTHERS]
LAM = torch.tensor(0.7)
EACH = torch.tensor([0.9, 0.2, 0.5, 1.0, 0.0, 0.35])
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25])


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def soft(target: Tensor, other: Tensor, lam: Tensor, classes: int = 5) -> Tensor:
    lam = lam[:, None] if lam.ndim else lam
    return lam * F.one_hot(target, classes) + (1 - lam) * F.one_hot(other, classes)


def log_softmax_by_hand(x: Tensor) -> Tensor:
    return x - x.exp().sum(1, keepdim=True).log()


# --- it is the hard target ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [LAM, 1 - LAM, EACH])
def test_is_the_label_with_the_largest_share(lam: Tensor) -> None:
    y = mix_targets(A, OTHERS, lam)
    expected = torch.where(lam >= 0.5, A, B)
    assert isinstance(y, MixedTarget)
    assert torch.equal(y == expected, torch.ones(6, dtype=torch.bool))
    assert y.tolist() == expected.tolist()
    assert multiclass_accuracy(expected, y, num_classes=5, average="micro") == 1
    assert multiclass_accuracy(F.one_hot(expected, 5).float(), y, num_classes=5, top_k=1) == 1


def test_equal_labels_of_smaller_shares_win_together() -> None:
    labels = torch.tensor([0, 1, 1])
    once = mix_targets(labels, torch.tensor([1, 2, 0]), torch.tensor(0.6))  # 0: .6 of 0, .4 of 1
    twice = mix_targets(once, torch.tensor([2, 0, 1]), torch.tensor(0.6))  # 0: .36 + .16 of 0, .24 + .24 of 1
    thrice = mix_targets(labels, torch.tensor([1, 2, 0]), torch.tensor(0.4))
    assert once.tolist() == [0, 1, 1]
    assert twice.tolist()[0] == 0
    assert thrice.tolist() == [1, 1, 0]
    first = mix_targets(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0]), torch.tensor(0.55))
    both = mix_targets(first, torch.tensor([2, 2, 0]), torch.tensor(0.75))
    # 0: .4125 + .1125 of 0 against .3375 + .1375 of 1
    assert both.tolist()[0] == 0
    mixed = mix_targets(first, torch.tensor([2, 2, 0]), torch.tensor(0.6))
    # 0: the largest single share is .33 of 0, but .27 + .22 of 1 against .33 + .18 of 0
    assert F.one_hot(mixed, 2)[0].tolist() == pytest.approx([0.51, 0.49])
    assert mixed.tolist()[0] == 0


def test_results_of_other_operations_are_plain() -> None:
    y = mix_targets(A, OTHERS, LAM)
    for result in (
        y == A,
        y + 1,
        torch.cat([y, y]),
        torch.stack([y, A]),
        y.sum(),
        y.unique(),
        logits(6, 5).detach()[:, y],
    ):
        assert type(result) is Tensor
    assert y.shape == (6,) and y.dtype == torch.int64 and y.device.type == "cpu" and len(y) == 6
    assert "tensor([0, 3, 1, 4, 2, 2])" in repr(y)
    assert torch.zeros(6, 5).scatter(1, y[:, None], 1.0).sum() == 6


def test_one_hot_is_soft_and_under_no_grad_hard() -> None:
    y = mix_targets(A, OTHERS, EACH)
    torch.testing.assert_close(F.one_hot(y, 5), soft(A, B, EACH))
    torch.testing.assert_close(F.one_hot(y), soft(A, B, EACH))
    torch.testing.assert_close(F.one_hot(smooth_targets(y, 0.1), 5), 0.9 * soft(A, B, EACH) + 0.02)
    with torch.no_grad():
        assert torch.equal(F.one_hot(y, 5), F.one_hot(torch.where(EACH >= 0.5, A, B), 5))


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.long(),
        lambda y: y.int().to(torch.int64),
        lambda y: y.to("cpu"),
        lambda y: y.clone().detach().contiguous(),
        lambda y: y.view(2, 3).flatten(),
        lambda y: y.reshape(-1, 1).squeeze(1),
        lambda y: torch.flatten(y.unsqueeze(-1)),
        lambda y: y[:, None][:, 0],
        lambda y: copy.deepcopy(y),
        lambda y: copy.copy(y),
        lambda y: pickle.loads(pickle.dumps(y)),
        lambda y: y.float().long(),
    ],
)
@pytest.mark.parametrize("lam", [LAM, EACH])
def test_casts_moves_and_layouts_keep_the_mix(change, lam: Tensor) -> None:
    y = smooth_targets(mix_targets(A, OTHERS, lam), 0.1)
    x = logits(6, 5)
    changed = change(y)
    assert isinstance(changed, MixedTarget)
    assert torch.equal(changed == A, y == A)
    assert torch.equal(F.cross_entropy(x, changed), F.cross_entropy(x, y))


def test_torch_save_keeps_the_mix() -> None:
    y, x = mix_targets(A, OTHERS, EACH), logits(6, 5)
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    assert torch.equal(F.cross_entropy(x, torch.load(buffer, weights_only=False)), F.cross_entropy(x, y))


@pytest.mark.parametrize("lam", [LAM, EACH])
def test_parts_of_a_target_keep_their_mix(lam: Tensor) -> None:
    y, x = mix_targets(A, OTHERS, lam), logits(6, 5)
    each = F.cross_entropy(x, y, reduction="none")
    assert torch.equal(F.cross_entropy(x[2:5], y[2:5], reduction="none"), each[2:5])
    assert torch.equal(F.cross_entropy(x[EACH > 0.4], y[EACH > 0.4], reduction="none"), each[EACH > 0.4])
    for part, start in zip(y.chunk(3), (0, 2, 4), strict=True):
        assert torch.equal(F.cross_entropy(x[start : start + 2], part, reduction="none"), each[start : start + 2])
    twice = torch.cat([x, x])
    assert torch.equal(F.cross_entropy(twice, y.repeat(2), reduction="none"), torch.cat([each, each]))


@pytest.mark.parametrize(
    "edit",
    [
        lambda y: operator.setitem(y, 0, 1),
        lambda y: y.add_(1),
        lambda y: operator.iadd(y, 1),
        lambda y: operator.iand(y, 1),
        lambda y: y.masked_fill_(y == 1, 0),
    ],
)
def test_editing_labels_in_place_raises(edit) -> None:
    with pytest.raises(RuntimeError, match="edit the labels before the batch is augmented"):
        edit(mix_targets(A, OTHERS, LAM))


# --- the loss of a mix ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_of_one_share_is_the_mix_of_the_losses(weight, ignore_index, label_smoothing, reduction) -> None:
    x, y = logits(6, 5), mix_targets(A, OTHERS, LAM)
    options = {
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    expected = LAM * F.cross_entropy(x, A, **options) + (1 - LAM) * F.cross_entropy(x, B, **options)
    assert torch.equal(F.cross_entropy(x, y, **options), expected)
    assert torch.equal(nn.CrossEntropyLoss(**options)(x, y), expected)
    assert torch.equal(F.cross_entropy(input=x, target=y, **options), expected)


@pytest.mark.parametrize("lam", [LAM, EACH])
def test_cross_entropy_is_that_of_the_soft_target(lam: Tensor) -> None:
    x, y = logits(6, 5), mix_targets(A, OTHERS, lam)
    by_hand = -(soft(A, B, lam) * log_softmax_by_hand(x)).sum(1).mean()
    torch.testing.assert_close(F.cross_entropy(x, y), by_hand)
    torch.testing.assert_close(F.cross_entropy(x, y), F.cross_entropy(x, soft(A, B, lam)))
    torch.testing.assert_close(F.nll_loss(x.log_softmax(1), y), by_hand)
    (grad,) = torch.autograd.grad(F.cross_entropy(x, y), x)
    torch.testing.assert_close(grad, (x.softmax(1) - soft(A, B, lam)) / 6)


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_shares_of_single_samples_are_reduced_as_asked(ignore_index, weight, label_smoothing) -> None:
    x, y = logits(6, 5), mix_targets(A, OTHERS, EACH)
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    each = EACH * F.cross_entropy(x, A, reduction="none", **options)
    each = each + (1 - EACH) * F.cross_entropy(x, B, reduction="none", **options)
    torch.testing.assert_close(F.cross_entropy(x, y, reduction="none", **options), each)
    torch.testing.assert_close(F.cross_entropy(x, y, reduction="sum", **options), each.sum())
    # OTHERS is a permutation: both labels of the mix have the same classes, so the mean has the plain loss's divisor
    divisor = (torch.ones(5) if weight is None else weight)[A][A.ne(ignore_index)].sum()
    torch.testing.assert_close(F.cross_entropy(x, y, **options), each.sum() / divisor)
    equal = mix_targets(A, OTHERS, LAM.expand(6))
    torch.testing.assert_close(
        F.cross_entropy(x, equal, **options), F.cross_entropy(x, mix_targets(A, OTHERS, LAM), **options)
    )


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_deprecated_reduction_flags() -> None:
    x, y = logits(6, 5), mix_targets(A, OTHERS, EACH)
    each = F.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(F.cross_entropy(x, y, size_average=False), each.sum())
    torch.testing.assert_close(F.cross_entropy(x, y, reduce=False), each)
    torch.testing.assert_close(F.cross_entropy(x, y, size_average=True), each.mean())


@pytest.mark.parametrize("lam", [LAM, EACH])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_binary_losses(lam: Tensor, reduction: str) -> None:
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    x, y = logits(6), mix_targets(labels, OTHERS, lam)
    value = lam * labels + (1 - lam) * labels[OTHERS]
    options = {"reduction": reduction, "weight": torch.rand(6), "pos_weight": torch.tensor(3.0)}
    expected = F.binary_cross_entropy_with_logits(x, value, **options)
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(x, y.float(), **options), expected)
    torch.testing.assert_close(nn.BCEWithLogitsLoss(**options)(x[:, None].squeeze(1), y.float()), expected)
    expected = F.binary_cross_entropy(x.sigmoid(), value, reduction=reduction)
    torch.testing.assert_close(F.binary_cross_entropy(x.sigmoid(), y.float(), reduction=reduction), expected)


@pytest.mark.parametrize("lam", [LAM, EACH])
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss])
def test_losses_of_numbers(lam: Tensor, loss) -> None:
    x, y = logits(6), mix_targets(A, OTHERS, lam)
    each = lam * loss(x, A.float(), reduction="none") + (1 - lam) * loss(x, B.float(), reduction="none")
    torch.testing.assert_close(loss(x, y.float(), reduction="none"), each)
    torch.testing.assert_close(loss(x, y.float()), each.mean())
    torch.testing.assert_close(loss(x, y.float(), reduction="sum"), each.sum())


def test_weighted_mean_of_the_squared_error_divides_by_the_weights() -> None:
    x, y, weight = logits(6), mix_targets(A, OTHERS, EACH), torch.rand(6)
    each = EACH * (x - A) ** 2 + (1 - EACH) * (x - B) ** 2
    torch.testing.assert_close(F.mse_loss(x, y.float(), weight=weight), (each * weight).sum() / weight.sum())


@pytest.mark.parametrize("lam", [LAM, EACH])
def test_one_hot_labels_of_the_dataset(lam: Tensor) -> None:
    x, y = logits(6, 5), mix_targets(F.one_hot(A, 5), OTHERS, lam)
    torch.testing.assert_close(F.cross_entropy(x, y.float()), F.cross_entropy(x, soft(A, B, lam)))
    torch.testing.assert_close(
        F.binary_cross_entropy_with_logits(x, y.float()), F.binary_cross_entropy_with_logits(x, soft(A, B, lam))
    )
    log_p, p = x.log_softmax(1), soft(A, B, lam)
    # the divergence from a soft vector differs from that of its parts by their entropy, which has no gradient
    (mixed,) = torch.autograd.grad(F.kl_div(log_p, y.float(), reduction="batchmean"), x, retain_graph=True)
    (expected,) = torch.autograd.grad(F.kl_div(log_p, p, reduction="batchmean"), x)
    torch.testing.assert_close(mixed, expected)


def test_multi_margin_loss_has_one_loss_a_sample() -> None:
    x, y = logits(6, 5), mix_targets(A, OTHERS, EACH)
    each = EACH * F.multi_margin_loss(x, A, reduction="none") + (1 - EACH) * F.multi_margin_loss(x, B, reduction="none")
    torch.testing.assert_close(F.multi_margin_loss(x, y), each.mean())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no F.linear_cross_entropy")
@pytest.mark.parametrize("lam", [LAM, EACH])
def test_linear_cross_entropy(lam: Tensor) -> None:
    x, weight, y = logits(6, 7), logits(5, 7, seed=1), smooth_targets(mix_targets(A, OTHERS, lam), 0.1)
    torch.testing.assert_close(F.linear_cross_entropy(x, weight, y), F.cross_entropy(x @ weight.T, y))


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@pytest.mark.parametrize("each", [False, True])
def test_labels_of_pixels(weight, each: bool) -> None:
    mask = torch.randint(0, 5, (6, 4, 3), generator=torch.Generator().manual_seed(1))
    mask[0, 0] = -100
    x, lam = logits(6, 5, 4, 3), EACH if each else LAM
    y = mix_targets(mask, OTHERS, lam)
    a = F.cross_entropy(x, mask, weight, reduction="none")
    b = F.cross_entropy(x, mask[OTHERS], weight, reduction="none")
    share = lam[:, None, None] if each else lam
    expected = share * a + (1 - share) * b
    torch.testing.assert_close(F.cross_entropy(x, y, weight, reduction="none"), expected)
    divisor = (torch.ones(5) if weight is None else weight)[mask[mask != -100]].sum()
    torch.testing.assert_close(F.cross_entropy(x, y, weight), expected.sum() / divisor)
    flat = F.cross_entropy(x.movedim(1, -1).reshape(-1, 5), y.view(-1), weight)
    torch.testing.assert_close(flat, expected.sum() / divisor)


def test_half_precision_losses_keep_their_dtype() -> None:
    y = mix_targets(A, OTHERS, LAM)
    assert F.cross_entropy(logits(6, 5).bfloat16(), y).dtype == torch.bfloat16
    assert F.cross_entropy(logits(6, 5).double(), mix_targets(A, OTHERS, EACH)).dtype == torch.float64


def test_autocast() -> None:
    layer, x, y = nn.Linear(8, 5), torch.rand(6, 8), mix_targets(A, OTHERS, LAM)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert torch.equal(F.cross_entropy(out, y), LAM * F.cross_entropy(out, A) + (1 - LAM) * F.cross_entropy(out, B))


# --- mixing further, and floating targets ---------------------------------------------------------------------------


shares = st.floats(0, 1, width=32)
orders = st.permutations(range(6)).map(torch.tensor)


@settings(deadline=None, max_examples=30)
@given(
    first=shares | st.lists(shares, min_size=6, max_size=6),
    second=st.lists(shares, min_size=6, max_size=6),
    order=orders,
    again=orders,
    smoothing=shares,
)
def test_mixing_twice_is_mixing_the_soft_vectors_twice(first, second, order, again, smoothing) -> None:
    lam, each = torch.tensor(first), torch.tensor(second)
    once = soft(A, A[order], lam)
    twice = each[:, None] * once + (1 - each[:, None]) * once[again]
    y = mix_targets(mix_targets(A, order, lam), again, each)
    torch.testing.assert_close(F.one_hot(y, 5), twice)
    x = logits(6, 5)
    torch.testing.assert_close(F.cross_entropy(x, y), F.cross_entropy(x, twice))
    best = twice.max(1).values
    torch.testing.assert_close(twice.gather(1, y.hard[:, None])[:, 0], best)
    # smoothing commutes with mixing
    late, early = (
        smooth_targets(y, smoothing),
        mix_targets(mix_targets(smooth_targets(A, smoothing), order, lam), again, each),
    )
    assert torch.equal(F.cross_entropy(x, late), F.cross_entropy(x, early))
    torch.testing.assert_close(F.cross_entropy(x, late), F.cross_entropy(x, twice, label_smoothing=smoothing))


def test_floating_targets_are_values() -> None:
    value = torch.rand(6, 3)
    mixed = mix_targets(value, OTHERS, EACH)
    assert type(mixed) is Tensor
    torch.testing.assert_close(mixed, EACH[:, None] * value + (1 - EACH[:, None]) * value[OTHERS])
    torch.testing.assert_close(mix_targets(value, OTHERS, LAM), LAM * value + (1 - LAM) * value[OTHERS])


def test_floating_smoothed_targets_are_mixed_as_values() -> None:
    p, x = torch.rand(6, 5).softmax(1), logits(6, 5)
    y = mix_targets(smooth_targets(p, 0.1), OTHERS, EACH)
    expected = F.cross_entropy(x, EACH[:, None] * p + (1 - EACH[:, None]) * p[OTHERS], label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(x, y), expected)


# --- smoothing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_smoothing_is_torchs_own(weight, ignore_index, reduction) -> None:
    x = logits(6, 5)
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    expected = F.cross_entropy(x, A, label_smoothing=0.1, **options)
    assert torch.equal(F.cross_entropy(x, smooth_targets(A, 0.1), **options), expected)
    torch.testing.assert_close(F.nll_loss(x.log_softmax(1), smooth_targets(A, 0.1), **options), expected)
    mask = torch.randint(0, 5, (6, 4, 3))
    x = logits(6, 5, 4, 3)
    expected = F.cross_entropy(x, mask, label_smoothing=0.1, **options)
    assert torch.equal(F.cross_entropy(x, smooth_targets(mask, 0.1), **options), expected)
    torch.testing.assert_close(F.nll_loss(x.log_softmax(1), smooth_targets(mask, 0.1), **options), expected)


def test_smoothing_on_top_of_the_modules_own_is_smoothing_twice() -> None:
    x, y = logits(6, 5), smooth_targets(A, 0.1)
    twice = 0.8 * (0.9 * F.one_hot(A, 5) + 0.1 / 5) + 0.2 / 5
    torch.testing.assert_close(F.cross_entropy(x, y, label_smoothing=0.2), F.cross_entropy(x, twice))
    torch.testing.assert_close(F.cross_entropy(x, smooth_targets(y, 0.2)), F.cross_entropy(x, twice))


def test_smoothing_binary_targets_moves_half_to_each_class() -> None:
    x, labels = logits(6), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = F.binary_cross_entropy_with_logits(x, labels * 0.9 + 0.05)
    assert torch.equal(F.binary_cross_entropy_with_logits(x, smooth_targets(labels, 0.1).float()), expected)
    assert torch.equal(F.binary_cross_entropy_with_logits(x, smooth_targets(labels.float(), 0.1)), expected)


def test_smoothing_of_zero_is_the_target_itself() -> None:
    assert smooth_targets(A, 0.0) is A
    y = mix_targets(A, OTHERS, LAM)
    assert smooth_targets(y, 0) is y
    with pytest.raises(ValueError, match=r"Expected `smoothing` to be in \[0, 1\], but got 1.5."):
        smooth_targets(A, 1.5)


# --- what the step did with it --------------------------------------------------------------------------------------


def test_usage_tells_what_the_step_did() -> None:
    x = logits(6, 5)

    def usage(step):
        y = smooth_targets(mix_targets(A, OTHERS, LAM), 0.1)
        step(y)
        return y.usage.mixed_by, y.usage.bypassed_by, y.usage.unsmoothed_by

    assert usage(lambda y: (x.argmax(1) == y).float().mean()) == ("", "", "")
    assert usage(lambda y: F.cross_entropy(x, y.long().view(-1))) == ("cross_entropy", "", "")
    assert usage(lambda y: F.one_hot(y, 5)) == ("one_hot", "", "")
    assert usage(lambda y: -x.log_softmax(1).gather(1, y[:, None]).mean()) == ("", "gather", "")
    assert usage(lambda y: F.mse_loss(x[:, 0], y.float())) == ("mse_loss", "", "mse_loss")
    with torch.no_grad():
        assert usage(lambda y: x.gather(1, y[:, None])) == ("", "", "")


# --- torch.compile --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHT, label_smoothing=0.1)


def functional_step(net: Net, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    out = net.layer(x)
    return F.cross_entropy(out, y, ignore_index=2), (out.argmax(1) == y).float().mean()


def module_step(net: Net, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    out = net.layer(x)
    return net.loss(out, y.long().view(-1)), F.one_hot(y, 5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("step", [functional_step, module_step])
@pytest.mark.parametrize(("smoothing", "each"), [(0.0, False), (0.1, True)])
def test_compiled_steps_see_the_mix(backend: str, step, smoothing: float, each: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    for _ in range(3):
        x, order = torch.randn(6, 3), torch.rand(6).argsort()
        lam = torch.rand(6) if each else torch.rand(())
        y = smooth_targets(mix_targets(A, order, lam), smoothing)
        loss, second = compiled(net, x, y)
        loss.backward()
        expected, expected_second = step(net, x, mix_targets(smooth_targets(A, smoothing), order, lam))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(second, expected_second)
        assert y.usage.mixed_by
    assert graphs.frame_count == 1


def test_compiled_step_without_a_known_loss_is_noticed() -> None:
    torch._dynamo.reset()
    net = Net()

    def step(x: Tensor, y: Tensor) -> Tensor:
        return -net.layer(x).log_softmax(1).gather(1, y[:, None]).mean()

    y = mix_targets(A, OTHERS, LAM)
    torch.compile(step, fullgraph=True, backend="aot_eager")(torch.randn(6, 3), y)
    assert (y.usage.mixed_by, y.usage.bypassed_by) == ("", "gather")
