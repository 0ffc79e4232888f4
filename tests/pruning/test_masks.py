"""The masks against a sort that a reader can check by eye."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel.pruning import masks as masks_module
from lightning_accel.pruning.masks import (
    apply_masks_,
    compute_masks,
    count_pruned,
    mask_optimizer_state_,
    pack_mask,
    unpack_mask,
)


def sorted_masks(weights, amount, masks=None):
    """The slow way: sort all elements by (kept, magnitude, position) and prune the first ones."""
    flat = torch.cat([weight.reshape(-1) for weight in weights]).abs().nan_to_num(nan=float("inf"), posinf=3e38)
    kept = torch.ones_like(flat) if masks is None else torch.cat([mask.reshape(-1) for mask in masks])
    order = sorted(range(flat.numel()), key=lambda index: (float(kept[index]), float(flat[index]), index))
    number = max(round(amount * flat.numel()), int((kept == 0).sum()))
    result = torch.ones_like(flat)
    result[order[:number]] = 0
    parts = result.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
elements = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40]), st.floats(-10, 10, width=32))
tensors = st.lists(st.lists(elements, min_size=0, max_size=30).map(torch.tensor), min_size=1, max_size=4)


@given(tensors, st.floats(0, 1), st.floats(0, 1))
def test_equals_a_sort_with_ties(weights, first, second):
    masks = compute_masks(weights, first)
    assert_equal(masks, sorted_masks(weights, first))
    again = compute_masks(weights, second, masks=masks)
    assert_equal(again, sorted_masks(weights, second, masks))


@pytest.mark.parametrize("samples", [4, 64, 1 << 16])
@pytest.mark.parametrize("chunk", [7, 1 << 18])
@pytest.mark.parametrize("amount", [0.01, 0.5, 0.9, 0.999])
def test_equals_a_sort_whatever_the_sample_and_the_chunks(monkeypatch, samples, chunk, amount):
    monkeypatch.setattr(masks_module, "_SAMPLES", samples)
    monkeypatch.setattr(masks_module, "_CPU_CHUNK", chunk)
    weights = [torch.randn(40, 11), (torch.randn(3, 5, 3, 3) * 4).round(), torch.zeros(20), torch.arange(300.0)]
    assert_equal(compute_masks(weights, amount), sorted_masks(weights, amount))
    before = compute_masks(weights, amount / 2)
    changed = [torch.randn_like(weight) for weight in weights]
    assert_equal(compute_masks(changed, amount, masks=before), sorted_masks(changed, amount, before))


def test_a_sample_that_misleads_changes_nothing(monkeypatch):
    monkeypatch.setattr(masks_module, "_SAMPLES", 100)
    weight = torch.rand(10_000)
    for every_sampled in (0.0, 100.0):
        weight[::100] = every_sampled
        for amount in (0.1, 0.5, 0.95):
            assert_equal(compute_masks([weight], amount), sorted_masks([weight], amount))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    weights = [torch.randn(50, 8, dtype=dtype), torch.randn(70, dtype=dtype)]
    masks = compute_masks(weights, 0.7)
    assert [mask.dtype for mask in masks] == [dtype, dtype]
    assert sum(map(count_pruned, masks)) == round(0.7 * 470)
    assert_equal(compute_masks(weights, 0.8, masks=masks), [m.to(dtype) for m in sorted_masks(weights, 0.8, masks)])


def test_mixed_dtypes_share_one_threshold():
    weights = [torch.tensor([1.0, 4.0], dtype=torch.bfloat16), torch.tensor([2.0, 3.0]), torch.tensor([0.5]).double()]
    assert_equal(compute_masks(weights, 0.6), [
        torch.tensor([0.0, 1.0], dtype=torch.bfloat16), torch.tensor([0.0, 1.0]), torch.tensor([0.0]).double(),
    ])  # fmt: skip


def test_memory_formats():
    conv = torch.randn(6, 5, 3, 3)
    gaps = torch.randn(20, 30)[::2, ::3]
    expected = sorted_masks([conv, gaps], 0.5)
    for weight in (conv, conv.to(memory_format=torch.channels_last)):
        masks = compute_masks([weight, gaps], 0.5)
        assert_equal(masks, expected)
        assert masks[0].stride() == weight.stride(), "else applying the mask would be slow"
        assert_equal(compute_masks([weight, gaps], 0.9, masks=masks), sorted_masks([conv, gaps], 0.9))
    assert_equal(compute_masks([conv.transpose(0, 1), gaps.t()], 0.5), [expected[0].transpose(0, 1), expected[1].t()])


def test_layer_scope():
    weights = [torch.randn(10, 10), 100 * torch.randn(33), torch.zeros(0)]
    masks = compute_masks(weights, 0.6, scope="layer")
    assert [count_pruned(mask) for mask in masks] == [60, 20, 0]
    assert_equal(masks, [sorted_masks([weight], 0.6)[0] for weight in weights])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_never_unprunes_and_never_compounds(scope):
    weights = [torch.randn(30, 30), torch.randn(100)]
    masks = None
    for amount in [0.2, 0.5, 0.5, 0.5, 0.3, 0.7, 0.7]:
        before = masks
        masks = compute_masks(weights, amount, scope, masks)
        if before is not None:
            assert all(bool((new <= old).all()) for new, old in zip(masks, before, strict=True))
        weights = [torch.randn_like(weight) for weight in weights]
    assert sum(map(count_pruned, masks)) == 700


def test_nan_is_pruned_last_and_infinity_before_it():
    weight = torch.tensor([float("nan"), float("inf"), 3e38, 1.0])
    assert [compute_masks([weight], amount)[0].tolist() for amount in (0.25, 0.5, 0.75, 1)] == [
        [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip


def test_arguments_are_unchanged():
    weights, masks = [torch.nn.Parameter(torch.randn(5, 5))], [torch.ones(5, 5)]
    copy = weights[0].detach().clone()
    new = compute_masks(weights, 0.5, masks=masks)
    assert torch.equal(weights[0], copy) and torch.equal(masks[0], torch.ones(5, 5))
    assert not new[0].requires_grad
    compute_masks(weights, 0.1, masks=new)[0].fill_(1)
    assert count_pruned(new[0]) == 12, "masks that come back unchanged are a copy all the same"


def test_bad_arguments():
    weight = torch.randn(4)
    with pytest.raises(ValueError, match=r"^Expected `amount` to be in \[0, 1\], but got 1\.3\.$"):
        compute_masks([weight], 1.3)
    with pytest.raises(ValueError, match=r"^Expected `scope` to be one of 'global', 'layer', but got 'row'\.$"):
        compute_masks([weight], 0.5, "row")
    with pytest.raises(ValueError, match=r"^Expected `masks` to have the shapes of `weights`, but got \[\(3,\)\]\.$"):
        compute_masks([weight], 0.5, masks=[torch.ones(3)])
    for bad, seen in [(weight.int(), r"torch\.int32"), (weight.to_sparse(), r"torch\.sparse_coo")]:
        with pytest.raises(TypeError, match=rf"^Expected `weights` to be dense floating-point .*{seen}"):
            compute_masks([bad], 0.5)


def test_apply_masks():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    apply_masks_([parameter], [torch.tensor([0.0, 1.0])])
    assert parameter.tolist() == [0, 2]
    apply_masks_([], [])


@given(st.integers(0, 70), st.integers(0, 2**31))
def test_packing_round_trips(size, seed):
    mask = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).float()
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == (size + 7) // 8
    assert torch.equal(unpack_mask(packed, like=mask), mask)


def test_packing_keeps_the_positions_in_every_memory_format():
    mask = torch.randint(0, 2, (4, 3, 5, 5)).to(torch.bfloat16)
    like = torch.empty(4, 3, 5, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    buffer = io.BytesIO()
    torch.save(pack_mask(mask), buffer)
    buffer.seek(0)
    unpacked = unpack_mask(torch.load(buffer, weights_only=True), like=like)
    assert torch.equal(unpacked, mask) and unpacked.dtype == mask.dtype and unpacked.stride() == like.stride()
    with pytest.raises(ValueError, match=r"packed mask for the shape \(9,\), but got 38 bytes"):
        unpack_mask(pack_mask(mask), like=torch.empty(9))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Rprop"])
def test_optimizer_state(name):
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    weight, other = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4, 4))
    optimizer = getattr(torch.optim, name)([weight, other], lr=0.1, **options)
    for _ in range(3):
        weight.grad, other.grad = torch.randn(4, 4), torch.randn(4, 4)
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[other].items() if isinstance(value, torch.Tensor)}
    steps = optimizer.state[weight].get("step")
    mask = compute_masks([weight], 0.5)[0]
    mask_optimizer_state_(optimizer, [weight], [mask])
    shaped = {k: v for k, v in optimizer.state[weight].items() if isinstance(v, torch.Tensor) and v.dim()}
    moments = [value for key, value in shaped.items() if key not in SQUARES]
    assert all(bool((value[mask == 0] == 0).all()) for value in moments)
    assert all(bool((value[mask == 1] != 0).any()) for value in shaped.values())
    assert all(bool((value != 0).all()) for key, value in shaped.items() if key in SQUARES), (
        "what divides is left alone"
    )
    assert moments or name == "Adagrad"
    assert optimizer.state[weight].get("step") is steps
    assert all(torch.equal(optimizer.state[other][key], value) for key, value in before.items())


def test_factored_optimizer_state_is_left_alone():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.Adafactor([weight], lr=0.1)
    weight.grad = torch.randn(4, 4)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    mask_optimizer_state_(optimizer, [weight], [torch.zeros(4, 4)])
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in before.items())
