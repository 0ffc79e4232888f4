"""A module that went through ``torch.compile`` trains with every method as it does without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from tests.conformance.cases import SAMPLE, cases, wrong
from tests.conformance.compare import assert_close
from tests.conformance.toy import Digits, run
from tests.methods import Method

# dynamo itself looks at the gradient of a tensor that is passed on after a break in the graph
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def forgotten_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class CompilableDigits(Digits):
    """Keeps ``log`` out of the graph: dynamo of torch 2.13 stops at what Lightning does there, without any method."""

    @torch.compiler.disable
    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs)


def check_compile(method: Method) -> None:
    # without torchmetrics, which takes dynamo five times as long as the module itself
    arguments: dict[str, Any] = {
        "module": partial(CompilableDigits, torchmetric=False),
        "max_epochs": 2,
        "limit_val_batches": 0,
    }
    compiled = run(method.make(), wrap=partial(torch.compile, backend="eager"), **arguments)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    eager = run(method.make(), **arguments)
    assert compiled.trainer.global_step == eager.trainer.global_step
    assert_close(compiled.weights, eager.weights, 1e-6, "the compiled module")


@pytest.mark.parametrize("method", cases(quick=SAMPLE))
def test_compile(method: Method) -> None:
    check_compile(method)


def test_a_wrong_method_is_flagged() -> None:
    with pytest.raises(AssertionError, match="the compiled module"):
        check_compile(wrong("OnlyUncompiled"))
