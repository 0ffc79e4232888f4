"""Which blocks are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_accel.strategies.wrapping import choose_blocks, group_parameters


class Layer(nn.Module):
    """A layer of a transformer: attention and a Sequential."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Transformer(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(8, 100, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


class Experts(nn.Module):
    """Layers with experts in them, which some ranks may not call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))}) for _ in range(2)
        )
        self.stages = nn.ModuleList(Stage() for _ in range(2))


class Stage(nn.Module):
    """A repeated layer that has repeated layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Layer() for _ in range(2))


class Net(nn.Module):
    """Sequential in Sequential, as vision models are."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize(
    ("module", "blocks", "expected"),
    [
        (Transformer(), 500, ["layers.0", "layers.1"]),
        (Transformer(), 10_000, []),
        (Transformer(), ["Layer"], ["layers.0", "layers.1"]),
        (Transformer(), [r"layers\.\d+"], ["layers.0", "layers.1"]),
        (Transformer(), [r"layers\.0", "head"], ["layers.0", "head"]),
        (Transformer(), ["Layer", "Sequential"], ["layers.0", "layers.0.mlp", "layers.1", "layers.1.mlp"]),
        (Transformer(), ["layers"], []),  # a ModuleList has no forward
        (Transformer(tied=True), ["Layer", "head"], ["layers.0", "layers.1"]),
        (Experts(), 100, ["stages.0", "stages.1"]),
        (Net(), 200, ["features.0", "features.2"]),
        (Net(), 100, ["features.0", "features.2", "classifier.1"]),
    ],
)
def test_choice(module: nn.Module, blocks: Any, expected: list[str]) -> None:
    chosen, _ = choose_blocks(module, blocks)
    assert list(chosen) == expected
    assert all(dict(module.named_modules())[name] is block for name, block in chosen.items())


def test_a_layer_that_stands_alone_is_never_chosen_by_size() -> None:
    """Other code may read its weight without a call, as MultiheadAttention does with that of its `out_proj`."""
    chosen, _ = choose_blocks(Transformer(), 1)
    assert set(chosen) == {"layers.0", "layers.1"}


def test_auto_takes_what_transformers_declare() -> None:
    module = Transformer()
    module.layers._no_split_modules = ["Layer", "NotHere"]  # type: ignore[assignment]
    assert list(choose_blocks(module, "auto")[0]) == ["layers.0", "layers.1"]
    assert choose_blocks(Transformer(), "auto")[0] == {}


def test_auto_takes_large_repeated_layers() -> None:
    module = nn.Sequential(nn.ModuleList(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(2)))
    assert list(choose_blocks(module, "auto")[0]) == ["0.0", "0.1"]


def test_a_module_in_two_blocks_is_in_none() -> None:
    shared = nn.Linear(4, 4)
    module = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared), nn.Sequential(nn.Linear(4, 4))])
    chosen, notes = choose_blocks(module, ["Sequential"])
    assert list(chosen) == ["2"]
    assert "0, 1" in notes[0]


def test_a_parameter_shared_inside_a_block_is_no_hindrance() -> None:
    module = Transformer()
    module.layers[0].mlp[0].bias = module.layers[0].mlp[0].bias
    module.layers[0].again = module.layers[0].mlp
    assert list(choose_blocks(module, ["Layer"])[0]) == ["layers.0", "layers.1"]


def test_names_what_matched_nothing() -> None:
    _, notes = choose_blocks(Transformer(), ["Layer", "layer"])
    assert notes == ["`blocks` 'layer' is neither the class nor the whole name of a module with parameters"]


def test_parameters_of_each_group() -> None:
    module = Transformer(tied=True)
    chosen, _ = choose_blocks(module, ["Layer", "Sequential"])
    sizes = group_parameters(module, chosen)
    mlp = 8 * 32 + 32 + 32 * 8 + 8
    attention = 4 * (8 * 8 + 8)
    assert sizes == {
        "": 800,
        "layers.0": attention,
        "layers.0.mlp": mlp,
        "layers.1": attention,
        "layers.1.mlp": mlp,
    }
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in module.parameters())


def test_a_frozen_or_integer_parameter_is_counted() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    assert group_parameters(module, {}) == {"": 9}
