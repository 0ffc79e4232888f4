"""Which parameters are pruned."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_accel.pruning.selection import PrunedLayer, report_layers, report_table, select_weights


class Model(nn.Module):
    """One layer of each kind, and an output layer tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm([4, 4])
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.GRU(4, 4)
        self.hidden = nn.Linear(4, 4)
        self.again = self.hidden
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.hidden.weight
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight
        self.lookup = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)


def test_default_is_the_weights_of_linear_conv_and_attention_layers_once():
    selection = select_weights(Model())
    names = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight"]
    assert list(selection.weights) == names
    assert selection.frozen == {} and selection.unmatched == []


def test_include_and_exclude():
    model = Model()
    assert list(select_weights(model, include=["rnn.weight", "^conv"]).weights) == [
        "conv.weight", "conv.bias", "rnn.weight_ih_l0", "rnn.weight_hh_l0",
    ]  # fmt: skip
    assert list(select_weights(model, include=["^output"]).weights) == ["embedding.weight"], "known by its other name"
    selection = select_weights(model, exclude=["tied", "attention", "nothing"])
    assert list(selection.weights) == ["conv.weight"], "a shared weight is excluded by any of its names"
    assert selection.unmatched == ["nothing"]
    assert list(select_weights(model, include=[]).weights) == []


def test_frozen_weights_are_left_alone():
    model = Model()
    model.conv.requires_grad_(False)
    selection = select_weights(model)
    assert list(selection.frozen) == ["conv.weight"] and "conv.weight" not in selection.weights


@pytest.mark.parametrize("pattern", ["heads", "lookup"])
def test_a_pattern_that_matches_nothing(pattern):
    with pytest.raises(
        ValueError, match=rf"pattern of `include` .*'{pattern}', .* none of: embedding\.weight, output.*, \.\.\.$"
    ):
        select_weights(Model(), include=["conv", pattern])


def test_names_of_compiled_submodules():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.Linear(2, 2))
    assert list(select_weights(model).weights) == ["0.weight", "1.weight"]


def test_report():
    weight = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    rows = report_layers({"a": weight, "empty": torch.zeros(0)}, {"b": torch.ones(3)})
    assert rows == [
        PrunedLayer("a", (2, 2), 4, 1), PrunedLayer("empty", (0,), 0, 0), PrunedLayer("b", (3,), 3, 3, frozen=True),
    ]  # fmt: skip
    assert [row.sparsity for row in rows] == [0.75, 0, 0]
    text = io.StringIO()
    Console(file=text, width=100).print(report_table(rows, "title"))
    for part in ("title", "2x2", "1 of 4", "0.7500", "frozen, left alone", "2 pruned"):
        assert part in text.getvalue()
