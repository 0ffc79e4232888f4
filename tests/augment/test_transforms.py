from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_accel.augment import (
    CutMix,
    MixedTarget,
    MixUp,
    RandomCrop,
    RandomHorizontalFlip,
    Transform,
    crop_batch,
    cutmix_batch,
    flip_batch,
    mixup_batch,
)
from lightning_accel.augment.cutmix import draw_boxes
from lightning_accel.augment.transform import draw_beta

ALL = [
    RandomHorizontalFlip(p=0.5),
    RandomCrop(8, padding=2),
    MixUp(alpha=0.4),
    MixUp(alpha=0.4, per_sample=True),
    CutMix(alpha=1.0),
    CutMix(alpha=1.0, per_sample=True),
]
NEUTRAL = [
    RandomHorizontalFlip(p=0.0),
    RandomCrop(8),
    RandomCrop([8, 8], padding=0),
    MixUp(alpha=0.0),
    MixUp(p=0.0),
    CutMix(alpha=0.0),
    CutMix(p=0.0, per_sample=True),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(dtype: torch.dtype = torch.float32, count: int = 16, side: int = 8, seed: int = 1) -> Tensor:
    if dtype.is_floating_point:
        return torch.rand(count, 3, side, side, generator=generator(seed)).to(dtype)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator(seed), dtype=dtype)


LABELS = torch.arange(16)


@pytest.mark.parametrize("t", NEUTRAL, ids=repr)
def test_neutral_returns_the_same_objects_and_draws_nothing(t: Transform) -> None:
    x, g = images(), generator()
    before = g.get_state()
    new_x, new_y = t(x, LABELS, generator=g)
    assert new_x is x
    assert new_y is LABELS
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize("t", ALL, ids=repr)
def test_the_generator_alone_decides(t: Transform) -> None:
    x, before = images(), torch.get_rng_state()
    first, second, other = (t(x, LABELS, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(5)
    again = t(x, LABELS)[0]
    torch.manual_seed(5)
    assert torch.equal(t(x, LABELS)[0], again)


@pytest.mark.parametrize("t", ALL, ids=repr)
def test_keeps_memory_format_dtype_and_the_callers_tensors(t: Transform) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = images(dtype).contiguous(memory_format=memory_format)
            copy, labels = x.clone(), LABELS.clone()
            new = t(x, labels, generator=generator())[0]
            assert new.dtype == dtype
            assert new.shape == x.shape
            assert new.is_contiguous(memory_format=memory_format)
            assert torch.equal(x, copy)
            assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("t", ALL, ids=repr)
def test_memory_format_does_not_change_the_values(t: Transform) -> None:
    x = images()
    plain = t(x, LABELS, generator=generator())[0]
    last = t(x.contiguous(memory_format=torch.channels_last), LABELS, generator=generator())[0]
    assert torch.equal(plain, last)


@pytest.mark.parametrize("t", ALL, ids=repr)
def test_holds_no_state(t: Transform) -> None:
    assert t.state_dict() == {}
    assert list(t.buffers()) == []
    assert not t.is_neutral


@pytest.mark.parametrize("t", [RandomHorizontalFlip(), RandomCrop(8, padding=2)], ids=repr)
def test_called_with_the_input_alone(t: Transform) -> None:
    x = images()
    alone = t(x, generator=generator())
    both, y = t(x, LABELS, generator=generator())
    assert torch.equal(alone, both)
    assert y is LABELS


@pytest.mark.parametrize("t", [MixUp(), CutMix()], ids=repr)
def test_mixing_needs_a_target(t: Transform) -> None:
    with pytest.raises(ValueError, match=r"Expected `y` to be the target, which .* mixes, but got None"):
        t(images())
    with pytest.raises(ValueError, match="Expected `y` to have one target for each of 16 samples"):
        t(images(), torch.arange(3))
    with pytest.raises(TypeError, match="Expected `y` to be a tensor"):
        t(images(), [1] * 16)


# --- flip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_flip_mirrors_the_chosen_samples(dtype: torch.dtype) -> None:
    x = images(dtype)
    new = flip_batch(x, torch.tensor([1, 4]))
    for i in range(16):
        expected = x[i].numpy()[:, :, ::-1] if i in (1, 4) else x[i].numpy()
        assert (new[i].numpy() == expected).all()


def test_flip_takes_the_share_p() -> None:
    x = torch.arange(2.0).expand(4000, 1, 1, 2)
    flipped = (RandomHorizontalFlip(p=0.3)(x, generator=generator())[:, 0, 0, 0] == 1).float().mean()
    assert flipped == pytest.approx(0.3, abs=0.03)
    assert torch.equal(RandomHorizontalFlip(p=1.0)(x), x.flip(-1))


# --- crop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("side", "size", "padding"), [(8, (5, 6), 0), (8, (8, 8), 3), (8, (12, 9), 2), (80, (72, 66), 5)]
)
def test_crop_cuts_windows_out_of_the_padded_images(dtype, side, size, padding) -> None:
    x = images(dtype, count=6, side=side)
    tops = torch.arange(6).clamp(max=side + 2 * padding - size[0])
    lefts = torch.arange(5, -1, -1).clamp(max=side + 2 * padding - size[1])
    new = crop_batch(x, tops, lefts, size, padding, fill=7)
    for i in range(6):
        padded = F.pad(x[i], (padding,) * 4, value=7)
        top, left = int(tops[i]), int(lefts[i])
        assert torch.equal(new[i], padded[:, top : top + size[0], left : left + size[1]])


def test_both_ways_of_cropping_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_accel.augment import random_crop

    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(count=32, side=10).contiguous(memory_format=memory_format)
        t = RandomCrop([7, 12], padding=9, fill=0.5)
        mask = torch.randint(0, 5, (32, 10, 10))
        gathered, gathered_mask = t(x, mask, generator=generator())
        monkeypatch.setattr(random_crop, "_SMALL", 0)
        copied, copied_mask = t(x, mask, generator=generator())
        monkeypatch.undo()
        assert torch.equal(gathered, copied)
        assert torch.equal(gathered_mask, copied_mask)
        assert copied.is_contiguous(memory_format=memory_format)


def test_crop_reaches_every_place_equally() -> None:
    x = torch.zeros(9000, 1, 3, 3)
    x[:, :, 1, 1] = 1
    counts = RandomCrop(3, padding=1)(x, generator=generator()).sum((0, 1))
    assert (counts / 9000).tolist() == [pytest.approx([1 / 9] * 3, abs=0.02)] * 3


def test_crop_larger_than_the_image() -> None:
    with pytest.raises(
        ValueError, match=r"Expected images of at least 12 x 12 pixels with their padding, but got 8 x 8"
    ):
        RandomCrop(12, padding=1)(images())


# --- targets with a value for each pixel -----------------------------------------------------------------------------


def coordinates(count: int = 16, side: int = 8) -> tuple[Tensor, Tensor]:
    """Images and masks that say the same: each pixel its own number."""
    mask = torch.arange(1, count * side * side + 1).view(count, side, side)
    return mask[:, None].float().expand(-1, 3, -1, -1), mask


@pytest.mark.parametrize(
    "t",
    [RandomHorizontalFlip(), RandomCrop(6), RandomCrop(8, padding=2, target_fill=0), CutMix(), CutMix(per_sample=True)],
    ids=repr,
)
def test_masks_move_with_their_images(t: Transform) -> None:
    x, mask = coordinates()
    for target in (mask, mask[:, None].expand(-1, 2, -1, -1), mask.float()):
        new_x, new_mask = t(x, target, generator=generator())
        assert type(new_mask) is Tensor
        assert new_mask.dtype == target.dtype
        assert not torch.equal(new_mask, target)
        assert torch.equal(new_x[:, 0], (new_mask[:, 0] if target.ndim == 4 else new_mask).float())


def test_padded_mask_pixels_are_ignored_by_the_loss() -> None:
    x, mask = coordinates()
    _, new = RandomCrop(8, padding=2)(x, mask, generator=generator())
    assert set(new[new <= 0].tolist()) == {-100}
    with pytest.raises(ValueError, match=r"Expected `target_fill` to fit into the target's torch.uint8, but got -100"):
        RandomCrop(8, padding=2)(x, (mask % 200).to(torch.uint8))
    assert 255 in RandomCrop(8, padding=2, target_fill=255)(x, (mask % 200).to(torch.uint8))[1]


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixed_masks_move_with_their_images(per_sample: bool) -> None:
    x, mask = coordinates(4)
    mask %= 5
    lam = torch.tensor([0.7, 0.4, 0.9, 0.2]) if per_sample else 0.7
    x, y = mixup_batch(x, mask, lam=lam, indices=torch.tensor([1, 0, 3, 2]))
    logits = torch.randn(4, 5, 8, 8)
    flipped = RandomHorizontalFlip(p=1.0)(x, y)[1]
    assert isinstance(flipped, MixedTarget)
    torch.testing.assert_close(F.cross_entropy(logits.flip(-1), flipped), F.cross_entropy(logits, y))
    cropped = RandomCrop(8, padding=2)(x, y, generator=generator())[1]
    each = F.cross_entropy(logits, cropped, reduction="none")
    assert (each[cropped == -100] == 0).all()
    assert (each[cropped != -100] > 0).all()


# --- MixUp ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 3, 8, 8), (16, 5), (16, 7, 4)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_averages_inputs_and_losses(shape, per_sample) -> None:
    x, indices = torch.rand(shape), torch.rand(16).argsort()
    lam = torch.rand(16) if per_sample else torch.tensor(0.3)
    new_x, new_y = mixup_batch(x, LABELS, lam=lam, indices=indices)
    for i in range(16):
        share = float(lam[i] if per_sample else lam)
        torch.testing.assert_close(new_x[i], share * x[i] + (1 - share) * x[indices[i]])
        expected = share * F.one_hot(LABELS[i], 16) + (1 - share) * F.one_hot(LABELS[indices[i]], 16)
        torch.testing.assert_close(F.one_hot(new_y, 16)[i], expected)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("t", [MixUp, CutMix])
def test_input_and_target_are_mixed_alike(t, per_sample: bool) -> None:
    # one image of one colour a class: the picture's own mean says what its label must be
    x = F.one_hot(LABELS, 16).float()[:, :, None, None].expand(-1, -1, 8, 8)
    seen = []
    for seed in range(20):
        new_x, new_y = t(alpha=1.0, per_sample=per_sample)(x, LABELS, generator=generator(seed))
        torch.testing.assert_close(new_x.mean((2, 3)), F.one_hot(new_y, 16))
        seen.append(len(new_x.mean((2, 3)).max(1).values.unique()))
    assert (max(seen) > 2) == per_sample


def test_mixup_p_is_the_share_that_is_mixed() -> None:
    x, y = torch.arange(4000.0)[:, None], torch.arange(4000)
    new_x, _ = MixUp(alpha=1.0, per_sample=True, p=0.25)(x, y, generator=generator())
    assert (new_x != x).float().mean() == pytest.approx(0.25, abs=0.03)
    untouched = [MixUp(alpha=1.0, p=0.25)(x[:4], y[:4], generator=generator(i))[1] is not None for i in range(10)]
    assert all(untouched)
    same = [type(MixUp(alpha=1.0, p=0.25)(x[:4], y[:4], generator=generator(i))[1]) is Tensor for i in range(400)]
    assert sum(same) / 400 == pytest.approx(0.75, abs=0.07)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 8.0])
def test_draws_have_the_moments_of_beta(alpha: float) -> None:
    lam = draw_beta(alpha, 20000, generator())
    assert lam.min() >= 0 and lam.max() <= 1
    assert lam.mean() == pytest.approx(0.5, abs=0.01)
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_mixup_refuses_integers() -> None:
    with pytest.raises(
        TypeError, match=r"Expected `x` to be floating for MixUp, but got torch.uint8: convert it first"
    ):
        MixUp()(images(torch.uint8), LABELS)


def test_mixup_lets_gradients_through() -> None:
    x = torch.rand(4, 3, requires_grad=True)
    mixup_batch(x, torch.arange(4), lam=0.25, indices=torch.tensor([1, 2, 3, 0]))[0].sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 3))


# --- CutMix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cutmix_pastes_one_rectangle(dtype: torch.dtype) -> None:
    x, indices = images(dtype), torch.rand(16).argsort()
    new_x, new_y = cutmix_batch(x, LABELS, boxes=[1, 4, 2, 8], indices=indices)
    expected = x.clone()
    expected[:, :, 1:4, 2:8] = x[indices][:, :, 1:4, 2:8]
    assert torch.equal(new_x, expected)
    share = F.one_hot(LABELS, 16) * (1 - 18 / 64) + F.one_hot(LABELS[indices], 16) * 18 / 64
    torch.testing.assert_close(F.one_hot(new_y, 16), share)


def test_cutmix_pastes_a_rectangle_a_sample() -> None:
    x, indices = images(), torch.rand(16).argsort()
    boxes = torch.stack(draw_boxes(torch.rand(16), 8, 8, generator()))
    new_x, new_y = cutmix_batch(x, LABELS, boxes=boxes, indices=indices)
    for i, (top, bottom, left, right) in enumerate(boxes.T.tolist()):
        expected = x[i].clone()
        expected[:, top:bottom, left:right] = x[indices[i], :, top:bottom, left:right]
        assert torch.equal(new_x[i], expected)
        kept = 1 - (bottom - top) * (right - left) / 64
        share = kept * F.one_hot(LABELS[i], 16) + (1 - kept) * F.one_hot(LABELS[indices[i]], 16)
        torch.testing.assert_close(F.one_hot(new_y, 16)[i], share)


@settings(max_examples=50)
@given(lam=st.floats(0, 1, width=32), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_boxes_lie_on_the_image_and_are_no_larger_than_asked(lam, height, width, seed) -> None:
    top, bottom, left, right = (int(edge) for edge in draw_boxes(torch.tensor([lam]), height, width, generator(seed)))
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    assert (bottom - top) * (right - left) <= (1 - lam) * height * width + 1e-3


def test_boxes_are_as_large_as_asked_where_they_fit() -> None:
    top, bottom, left, right = draw_boxes(torch.full((4000,), 0.75), 100, 100, generator())
    assert int((bottom - top).max()) == int((right - left).max()) == 50
    # 50 wide at a uniform centre: half of the places are cut off by up to half of it
    assert ((right - left).float().mean() / 50).item() == pytest.approx(0.875, abs=0.02)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomHorizontalFlip(p=1.5), r"Expected `p` to be in \[0, 1\], but got 1.5\."),
        (lambda: RandomCrop(0), "Expected `size` to be an int of at least 1, but got 0."),
        (lambda: RandomCrop([1, 2, 3]), r"Expected `size` to be an int or \[height, width\], but got \[1, 2, 3\]."),
        (lambda: RandomCrop(8, padding=-1), "Expected `padding` to be an int of at least 0, but got -1."),
        (lambda: MixUp(alpha=-1), r"Expected `alpha` to be in \[0, inf\), but got -1."),
        (lambda: CutMix(alpha=float("nan")), r"Expected `alpha` to be in \[0, inf\), but got nan."),
        (lambda: CutMix(p=2.0), r"Expected `p` to be in \[0, 1\], but got 2.0."),
        (lambda: mixup_batch(torch.rand(2, 2), torch.arange(2), alpha=0), r"Expected `alpha` to be in \(0, inf"),
        (
            lambda: CutMix()(torch.rand(4, 3), torch.arange(4)),
            r"images \(B, C, H, W\) for CutMix, but got shape \(4, 3\)",
        ),
        (lambda: RandomHorizontalFlip()(torch.rand(3, 8, 8)), r"\(B, C, H, W\) for RandomHorizontalFlip"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_transforms_need_torch_and_what_the_package_imports_itself() -> None:
    code = (
        "import sys, torch, lightning_accel; before = set(sys.modules);"
        "from lightning_accel.augment import MixUp, CutMix, RandomCrop, RandomHorizontalFlip, mix_targets;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "new -= {'lightning_accel', 'torch', *sys.stdlib_module_names}; assert not new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
