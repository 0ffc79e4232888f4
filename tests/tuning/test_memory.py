"""The formulas against bytes that two ranks were measured to hold, in units of 4 bytes a parameter."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_accel.strategies.fully_shard import _WHOLE_MATRICES
from lightning_accel.strategies.zero_config import zero_bytes
from lightning_accel.tuning.memory import STRATEGIES, Model, Parameter, Settings, memory_usage
from lightning_accel.tuning.plan import NOT_ON_SHARDS

MIB = 1024 * 1024
N = 4 * MIB
FP32 = Model((Parameter((2048, 2048)),), state=8 * N, sharded_state=8 * N, flat_state=8 * N, buffers=100, activations=7)
BF16 = Model((Parameter((2048, 2048), itemsize=2),), state=4 * N, sharded_state=4 * N, flat_state=8 * N)


@pytest.mark.parametrize(
    ("strategy", "parameters", "gradients", "master", "state"),
    [
        ("ddp", 4, 4, 0, 8),
        ("accel_zero1", 4, 4, 1, 2),
        ("accel_zero2", 4, 1, 1, 2),
        ("accel_zero3", 1, 1, 1, 2),
        ("accel_fsdp2", 1, 1, 0, 2),
    ],
)
def test_fp32_on_four_devices(strategy: str, parameters: int, gradients: int, master: int, state: int) -> None:
    usage = memory_usage(strategy, FP32, 4)
    got = (usage.parameters, usage.gradients, usage.master, usage.state)
    assert got == tuple(part * N for part in (parameters, gradients, master, state))
    assert (usage.buffers, usage.activations) == (100, 7)


@pytest.mark.parametrize(
    ("strategy", "parts"), [("accel_zero2", (2, 0.5, 1, 2)), ("accel_zero3", (0.5, 0.5, 1, 2)), ("ddp", (2, 2, 0, 4))]
)
def test_bf16_on_four_devices(strategy: str, parts: tuple[float, ...]) -> None:
    usage = memory_usage(strategy, BF16, 4)
    assert (usage.parameters, usage.gradients, usage.master, usage.state) == tuple(int(part * N) for part in parts)


# The most at a time on 2 ranks, next to no activations: a GPT of 3.4M parameters with AdamW, by the C allocator.
MEASURED = {
    "ddp": (5.0, 2.5),
    "accel_zero1": (4.65, 3.5),
    "accel_zero2": (5.05, 3.5),
    "accel_zero3": (5.7, 4.1),
}


@pytest.mark.parametrize("strategy", MEASURED)
def test_the_most_at_a_time(strategy: str) -> None:
    bare = {
        name: dataclasses.replace(model, activations=0, buffers=0) for name, model in {"f": FP32, "b": BF16}.items()
    }
    for model, measured in zip(bare.values(), MEASURED[strategy], strict=True):
        # on the CPU DDP's optimizer steps one parameter at a time, with no copy of all
        copies = 1 if strategy == "ddp" else 0
        total = memory_usage(strategy, model, 2).total / (4 * N)
        assert 0.95 * measured < total < 1.2 * (measured + copies), (model.gradients, total)


def test_stages_1_and_2_have_no_gradients_while_activations_are_complete() -> None:
    large = dataclasses.replace(FP32, activations=100 * N)
    for accumulates, gradients in ((False, 0), (True, 4)):
        usage = memory_usage("accel_zero1", dataclasses.replace(large, accumulates=accumulates), 4)
        assert usage.total == (4 + 2 + 1 + 100 + gradients) * N + usage.working + 100


def test_accumulation_keeps_whole_gradients_under_fsdp2_and_the_sum_beside_the_new_at_stage_2() -> None:
    once, more = FP32, dataclasses.replace(FP32, accumulates=True)
    assert [memory_usage("accel_fsdp2", model, 4).gradients for model in (once, more)] == [N, 4 * N]
    assert memory_usage("accel_zero2", more, 4).working - memory_usage("accel_zero2", once, 4).working == N


def test_frozen_parameters_have_no_gradients_no_master_and_no_state() -> None:
    frozen = Model((Parameter((1024, 1024), itemsize=2, trainable=False), Parameter((16,))), flat_state=128)
    for strategy in STRATEGIES:
        usage = memory_usage(strategy, frozen, 2)
        assert usage.gradients <= 64 and usage.master in (0, 32) and usage.state <= 64
    assert memory_usage("ddp", frozen, 2).parameters == 2 * MIB + 64


def test_offload_leaves_nothing_but_its_work_on_the_device() -> None:
    usage = memory_usage("accel_fsdp2_offload", FP32, 4)
    assert (usage.parameters, usage.gradients, usage.state) == (0, 0, 0) and usage.host >= 4 * N


def test_settings() -> None:
    def bytes_of(strategy: str, model: Model = FP32, **settings: int) -> tuple[int, int]:
        usage = memory_usage(strategy, model, 4, Settings(**settings))
        return usage.parameters, usage.working

    assert [bytes_of("accel_zero2", bucket=size)[1] for size in (1000, 10**9)] == [2 * 4000, 2 * 4 * N]
    assert [bytes_of("ddp", bucket_view=view)[1] for view in (False, True)] == [4 * N, 0]
    assert [bytes_of("accel_zero3", persistence=size)[0] for size in (0, 4 * MIB)] == [N, 5 * N]
    live = [bytes_of("accel_zero3", live=size, bucket=1)[1] for size in (0, 1000, 10**9)]
    assert [size - live[0] for size in live] == [0, 4000, 4 * N]
    assert [bytes_of("accel_fsdp2", replicas=count)[0] for count in (1, 2)] == [N, 2 * N]
    blocks = Model(tuple(Parameter((1024, 1024), block=str(number)) for number in range(8)))
    assert [bytes_of("accel_fsdp2", blocks, reshard=flag)[1] // (4 * MIB) for flag in (True, False)] == [3, 10]


def test_one_device_needs_no_buckets() -> None:
    assert memory_usage("ddp", FP32, 1).working == 0


def test_a_fused_step_makes_no_copies() -> None:
    bare = dataclasses.replace(FP32, activations=0, buffers=0)
    fused = dataclasses.replace(bare, fused=True)
    for strategy, world, copies in (("ddp", 1, 4), ("accel_fsdp2", 2, 0)):  # there it is less than what is gathered
        totals = [memory_usage(strategy, model, world).total for model in (bare, fused)]
        assert totals[0] - totals[1] == copies * N
    assert [memory_usage("accel_fsdp2", model, 2).stepping for model in (bare, fused)] == [2 * N, 0]


def test_in_the_backward_pass_there_is_one_gradient_at_a_time() -> None:
    parameters = tuple(Parameter((1024, 1024), block=str(number)) for number in range(8))
    state = 2 * 8 * 4 * MIB
    model = Model(parameters, state, state, activations=100 * MIB, passing=MIB, in_backward=True, fused=True)
    alone, two, sharded = (
        memory_usage(*of) for of in (("ddp", model, 1), ("ddp", model, 2), ("accel_fsdp2", model, 2))
    )
    assert (alone.gradients, two.gradients, sharded.gradients) == (4 * MIB, 8 * MIB, 2 * MIB)
    assert alone.total == (32 + 64 + 100 + 4 + 1) * MIB and two.working == MIB
    copying = dataclasses.replace(model, fused=False)
    assert memory_usage("ddp", copying, 1).total == alone.total + 4 * MIB


def test_one_formula() -> None:
    """What `zero_bytes` says is what the plan says."""
    for stage, ranks in ((1, 2), (2, 4), (3, 8)):
        usage = memory_usage(f"accel_zero{stage}", FP32, ranks, Settings(persistence=0))
        held = zero_bytes(2048**2, stage, ranks)
        assert held == {name: getattr(usage, name) for name in held}


def test_what_fsdp2_refuses_is_what_the_strategy_refuses() -> None:
    assert set(NOT_ON_SHARDS) == set(_WHOLE_MATRICES)
