"""FullyShardStrategy beside DDP on two ranks, and what it refuses. The runs are in fully_shard_scenarios.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_accel.strategies.fully_shard import FullyShardStrategy
from tests.conformance.processes import made_once
from tests.strategies.fully_shard_scenarios import OTHERS, SAME
from tests.strategies.launch import launch, outcome

MODULE = "tests.strategies.fully_shard_scenarios"
pytestmark = [pytest.mark.xdist_group("fully shard"), pytest.mark.timeout(400)]
IN_BFLOAT16 = {"param_dtype", "reduce_dtype"}  # DDP has nothing like them


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [*SAME, *OTHERS]
    return made_once(tmp_path_factory, "fully_shard", lambda folder: launch(MODULE, folder, names))


def assert_same(a: Any, b: Any, tolerance: float) -> None:
    assert a["steps"] == b["steps"]
    assert a["rates"] == b["rates"]
    for name in ("losses", "evaluated"):
        torch.testing.assert_close(torch.tensor(a[name]), torch.tensor(b[name]), rtol=0, atol=tolerance)
    assert a["weights"].keys() == b["weights"].keys()
    for name, value in a["weights"].items():
        torch.testing.assert_close(value, b["weights"][name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SAME, "methods"])
def test_numbers_are_those_of_ddp(two_ranks: Path, name: str) -> None:
    """Losses of every step, validation, weights and steps, on both ranks."""
    ranks = [outcome(two_ranks, name, rank) for rank in range(2)]
    for result in ranks:
        assert_same(result["ddp"], result["sharded"], 1e-2 if name in IN_BFLOAT16 else 1e-5)
        assert result["sharded"]["losses"][0] != result["sharded"]["losses"][-1]
    first, second = (result["sharded"] for result in ranks)
    assert first["losses"] != second["losses"]  # each rank had its own data
    for weight, value in first["weights"].items():
        assert torch.equal(value, second["weights"][weight])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(IN_BFLOAT16))
def test_explicit_dtypes_are_used(two_ranks: Path, name: str) -> None:
    result = outcome(two_ranks, name)
    assert result["ddp"]["losses"] != result["sharded"]["losses"]


@pytest.mark.slow
def test_one_reduction_a_window(two_ranks: Path) -> None:
    """A batch gathers the root once and each of three blocks twice; only a window's last reduces gradients."""
    gathers = {"c10d._allgather_base_": 7}
    first, last = gathers, {**gathers, "c10d._reduce_scatter_base_": 4}
    assert outcome(two_ranks, "window") == [first, last, first, last]


@pytest.mark.slow
def test_from_a_yaml(two_ranks: Path) -> None:
    """By name and by class with patterns: DDP's numbers, and the arguments arrive."""
    result = outcome(two_ranks, "yaml")
    for kind, offload, blocks in (("name", True, 0), ("class", False, 4)):
        assert_same(result["ddp"], result[kind], 1e-5)
        assert result[kind]["offload"] == offload
        assert result[kind]["units"] == 1 + blocks


ERRORS = {
    "no room": "CheckpointError: Rank 0 could not write the checkpoint. FileExistsError",
    "weights only": "KeyError: 'Trying to restore optimizer state but checkpoint contains only the model",
    "other module": "is no checkpoint of this Gan: missing in the checkpoint: generator.0.weight;",
    "not a checkpoint": "meta.pt",
    "different": "rank 0 has `head.weight (8, 16) float32 trainable` where rank 1 has `head.weight (9, 16)",
    "meta": "MisconfigurationException: Meta has parameters on the meta device",
    "sharded": "MisconfigurationException: Sharded has parameters that are sharded already",
    "dtypes": "MisconfigurationException: FullyShardStrategy needs trainable parameters of one dtype",
    "adafactor": "MisconfigurationException: Adafactor does not run on shards",
    "replicas": "MisconfigurationException: FullyShardStrategy(replicas=3) can't divide 2 ranks",
    "compiled": "RuntimeError: Using a compiled model is incompatible with the current strategy: `FullyShardStrategy`",
    "16-mixed": "does not support `Fabric(..., precision='16-mixed')`. Choose a different precision among: 32",
    "sync_batchnorm": "ValueError: SyncBatchNorm expected input tensor to be on GPU",
    "param_dtype": "set precision='bf16-mixed'.",
    "LowBitOptimizer": "MisconfigurationException: LowBitOptimizer(backend='bitsandbytes') can't work here",
    "GradualPruning": "MisconfigurationException: GradualPruning can't work with FullyShardStrategy",
    "changed": "its checksum differs.",
    "truncated": "has 100 bytes, but",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_an_error_on_every_rank(two_ranks: Path, name: str) -> None:
    for rank in range(2):
        assert ERRORS[name] in outcome(two_ranks, "errors", rank)[name]


@pytest.mark.slow
def test_says_what_has_no_effect(two_ranks: Path) -> None:
    first, second = (outcome(two_ranks, "effects", rank) for rank in range(2))
    assert "no repeated layer (an item of a Sequential or ModuleList) has 1,000,000" in first["auto"][0]
    assert "'Missing' is neither the class nor the whole name" in first["unknown"][0]
    assert "parameters in blocks.0, blocks.2 are shared" in first["tied"][0]
    assert "sharded by an earlier Trainer" in first["again"][0]
    assert not any(second.values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": 0}, ValueError, "Expected `blocks` to be an int of at least 1, but got 0."),
        (
            {"blocks": "Block"},
            ValueError,
            "`blocks` to be 'auto', an int or a list of names, but got 'Block'.",
        ),
        ({"blocks": ["("]}, ValueError, "Expected `blocks` to hold valid regular expressions"),
        ({"blocks": [3]}, TypeError, "Expected `blocks` to be a list of regular expressions, but one of them is 3."),
        ({"blocks": 1.5}, TypeError, "Expected `blocks` to be a list of regular expressions, but got 1.5."),
        ({"reshard_after_forward": "no"}, ValueError, "Expected `reshard_after_forward` to be one of True, False"),
        ({"offload": "cpu"}, ValueError, "Expected `offload` to be one of True, False, but got 'cpu'."),
        ({"param_dtype": "float16"}, ValueError, "Expected `param_dtype` to be one of None, 'bfloat16'"),
        ({"reduce_dtype": "int8"}, ValueError, "Expected `reduce_dtype` to be one of None, 'float32', 'bfloat16'"),
        ({"replicas": 0}, ValueError, "Expected `replicas` to be an int of at least 1, but got 0."),
        ({"timeout": 0}, ValueError, "Expected `timeout` to be in (0, inf), but got 0."),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        FullyShardStrategy(**arguments)


def test_the_callers_list_stays() -> None:
    blocks = ["Block"]
    strategy = FullyShardStrategy(blocks=blocks)
    blocks.append("Other")
    assert strategy.blocks == ["Block"]
