"""Batches of any structure are split into micro-batches, and outputs are put together again."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_accel.accumulation.splitting import combine_outputs, micro_sizes, samples_of, split_batch
from lightning_accel.augment import mix_targets, smooth_targets

X = torch.arange(10.0).view(5, 2)
Y = torch.arange(5)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor
    name: str = "all"
    made: int = field(default=3, init=False)


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict, as tokenizers return."""


class Opaque:
    pass


@pytest.mark.parametrize("samples", [1, 2, 7, 10])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_sizes_are_nearly_equal(samples: int, parts: int) -> None:
    sizes = micro_sizes(samples, parts)
    assert sum(sizes) == samples and len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


def leaves(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, Record):
        return [item.x, item.y]
    values = item.values() if hasattr(item, "values") else item
    return [leaf for value in values for leaf in leaves(value)]


@pytest.mark.parametrize(
    "batch",
    [
        X,
        [X, Y],
        (X, Y),
        Pair(X, Y),
        Record(X, Y),
        {"x": X, "y": Y},
        OrderedDict(x=X, y=Y),
        Encoding(x=X, y=Y),
        {"inputs": [X, Pair(X, Y)], "target": (Y, {"more": Record(X, Y)})},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_structures_are_kept(batch: Any) -> None:
    assert samples_of(batch) == 5
    parts = split_batch(batch, [3, 2])
    assert [samples_of(part) for part in parts] == [3, 2]
    assert all(type(part) is type(batch) for part in parts)
    for whole, *pieces in zip(leaves(batch), *map(leaves, parts), strict=True):
        assert torch.equal(torch.cat(pieces), whole)
        assert all(piece.untyped_storage()._cdata == whole.untyped_storage()._cdata for piece in pieces)  # views


def test_what_has_no_entry_for_each_sample_is_shared() -> None:
    positions, names, options = torch.arange(7), list("abcde"), ["two", "words"]
    batch = {"x": X, "scale": torch.tensor(2.0), "names": names, "options": options, "none": None, "empty": [], "n": 3}
    first, second = split_batch({**batch, "at": {"p": positions}}, [3, 2], shared_keys=["at.p"])
    assert samples_of({**batch, "at": {"p": positions}}, shared_keys=["at.p"]) == 5
    assert (first["names"], second["names"]) == (["a", "b", "c"], ["d", "e"])
    for part in (first, second):
        assert part["scale"] is batch["scale"] and part["options"] is options and part["at"]["p"] is positions
        assert (part["none"], part["empty"], part["n"]) == (None, [], 3)
    whole = split_batch({"x": X, "y": X}, [3, 2], shared_keys=["y"])[0]
    assert whole["y"] is X


def test_lists_with_an_entry_for_each_sample() -> None:
    images, targets = [torch.zeros(3, 4, n + 4) for n in range(5)], [{"boxes": torch.zeros(n, 4)} for n in range(5)]
    with pytest.raises(ValueError, match=r"`0.0` has 3 and `1.0.boxes` has 0: name .* `list_keys`"):
        samples_of((images, targets))
    keys = ["0", "1"]
    assert samples_of((images, targets), list_keys=keys) == 5
    first, second = split_batch((images, targets), [3, 2], list_keys=keys)
    assert second[0] == images[3:] and first[1] == targets[:3]
    samples = list(zip(images, targets, strict=True))
    assert samples_of(samples, list_keys=[""]) == 5
    assert split_batch(samples, [3, 2], list_keys=[""])[1] == samples[3:]
    with pytest.raises(TypeError, match="Expected `list_keys` to name lists, but `x` is a Tensor"):
        samples_of({"x": X}, list_keys=["x"])


def test_numpy_and_sparse() -> None:
    first, second = split_batch([np.arange(5), X.to_sparse()], [3, 2])
    assert first[0].tolist() == [0, 1, 2]
    assert torch.equal(second[1].to_dense(), X[3:])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": X, "o": Opaque()}, TypeError, "`o` is a Opaque: make tensors of it in `collate_fn`, or .*`shared_keys`"),
        ([X, {"p": pack_sequence([X, X])}], TypeError, "`1.p` is a PackedSequence"),
        ([torch.nested.as_nested_tensor([X, X[:2]], layout=torch.jagged)], TypeError, "`0` is a nested tensor"),
        (Opaque(), TypeError, "the batch is a Opaque"),
        ([X, Y[:4]], ValueError, "`0` has 5 and `1` has 4"),
        ("text", ValueError, "Expected the batch to have tensors to split, but this str has none"),
        ([torch.tensor(1)], ValueError, "has none"),
    ],
)
def test_what_cannot_be_split_is_named(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        samples_of(batch)


def test_what_is_shared_may_be_anything() -> None:
    opaque = Opaque()
    assert samples_of({"x": X, "o": opaque}, shared_keys=["o"]) == 5
    assert split_batch({"x": X, "o": opaque}, [3, 2], shared_keys=["o"])[1]["o"] is opaque
    with pytest.raises(ValueError, match="Expected `shared_keys` to name an item of the batch, which has the keys 'x'"):
        samples_of({"x": X}, shared_keys=["y"])


@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.tensor([0.1, 0.9, 0.4, 0.6, 0.5])], ids=["one", "each"])
def test_mixed_targets_keep_their_mix(lam: Tensor) -> None:
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    target = smooth_targets(mix_targets(Y, torch.tensor([4, 3, 2, 1, 0]), lam), 0.1)
    whole = torch.nn.functional.cross_entropy(scores, target)
    parts = split_batch([scores, target], [3, 2])
    losses = [torch.nn.functional.cross_entropy(*part) for part in parts]
    torch.testing.assert_close(losses[0] * 3 / 5 + losses[1] * 2 / 5, whole)
    assert target.usage.mixed_by == "cross_entropy"  # type: ignore[attr-defined]


def test_outputs_are_combined() -> None:
    mean = torch.tensor(1.0), torch.tensor(4.0)
    found = combine_outputs(
        [
            {"scores": X[:3], "mean": mean[0], "number": 1.0, "text": "a", "count": torch.tensor(3), "odd": X[:2]},
            {"scores": X[3:], "mean": mean[1], "number": 4.0, "text": "b", "count": torch.tensor(2), "odd": X[:2]},
        ],
        [3, 2],
        [0.6, 0.4],
    )
    assert torch.equal(found["scores"], X)
    assert float(found["mean"]) == pytest.approx(2.2) and found["number"] == pytest.approx(2.2)
    assert found["text"] == ["a", "b"] and found["count"] == [torch.tensor(3), torch.tensor(2)]
    assert isinstance(found["odd"], list)
    assert combine_outputs([X], [5], [0.0]) is X
    half = combine_outputs([value.half() for value in mean], [1, 1], [0.5, 0.5])
    assert half.dtype == torch.float16 and float(half) == 2.5
