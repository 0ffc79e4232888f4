"""Reading sharded checkpoints piece by piece, without ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_accel.strategies import zero_restore
from lightning_accel.strategies.zero_restore import PlainOptimizer


def test_the_state_of_a_partition_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each parameter in it: a partition is as large as a part of the model."""
    names = ["a", "b", "c"]
    saved = {
        "state": {n: {"step": torch.tensor(1.0), "exp_avg": torch.full((4,), float(n))} for n in range(3)},
        "param_groups": [{"params": [0, 1, 2], "lr": 0.1}],
    }
    source = PlainOptimizer(saved, [names], dict.fromkeys(names, torch.Size([4])))
    allocated = []
    zeros_like = torch.zeros_like

    def count(value: Tensor, **options: Any) -> Tensor:
        allocated.append(value.numel())
        return zeros_like(value, **options)

    monkeypatch.setattr(torch, "zeros_like", count)
    # the second half of `a`, all of `b`, and half of `c`
    flat = zero_restore._Flat(0, 0, torch.empty(8), [("a", 0, 2, 2), ("b", 2, 0, 4), ("c", 6, 0, 2)])
    state = zero_restore._flat_state(flat, source, set(names), names)
    assert state["exp_avg"].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert state["step"] == 1
    assert allocated == [8]
