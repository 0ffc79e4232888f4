"""The formulas against the numbers of ZeRO's paper and of what is divided by how many."""

from __future__ import annotations

import pytest

from lightning_accel.tuning.memory import Model, Parameter, memory_usage

MIB = 1024 * 1024
N = 4 * MIB
FP32 = Model((Parameter((2048, 2048)),), state=8 * N, plain_state=8 * N, master_state=8 * N, buffers=100, activations=7)
BF16 = Model((Parameter((2048, 2048), itemsize=2),), state=4 * N, plain_state=4 * N, master_state=8 * N)


@pytest.mark.parametrize(
    ("strategy", "parameters", "gradients", "master", "state"),
    [
        ("ddp", 4, 4, 0, 8),
        ("accel_zero2", 4, 1, 1, 2),
        ("accel_zero3", 1, 1, 1, 2),
        ("accel_fsdp2", 1, 1, 0, 2),
    ],
)
def test_fp32_on_four_devices(strategy: str, parameters: int, gradients: int, master: int, state: int) -> None:
    usage = memory_usage(strategy, FP32, 4, bucket=0)
    got = (usage.parameters, usage.gradients, usage.master, usage.state)
    assert got == tuple(part * N for part in (parameters, gradients, master, state))
    assert (usage.buffers, usage.activations) == (100, 7)
    assert usage.total == sum(got) + 107 + usage.working


@pytest.mark.parametrize(
    ("strategy", "parts"), [("accel_zero2", (2, 0.5, 1, 2)), ("accel_zero3", (0.5, 0.5, 1, 2)), ("ddp", (2, 2, 0, 4))]
)
def test_bf16_on_four_devices(strategy: str, parts: tuple[float, ...]) -> None:
    usage = memory_usage(strategy, BF16, 4, bucket=0)
    assert (usage.parameters, usage.gradients, usage.master, usage.state) == tuple(int(part * N) for part in parts)


def test_frozen_parameters_have_no_gradients() -> None:
    frozen = Model((Parameter((1024, 1024), trainable=False), Parameter((16,))))
    assert memory_usage("ddp", frozen, 2).gradients == 64


def test_offload_leaves_nothing_but_its_work_on_the_device() -> None:
    usage = memory_usage("accel_fsdp2_offload", FP32, 4)
    assert (usage.parameters, usage.gradients, usage.state) == (0, 0, 0) and usage.host >= 4 * N


def test_a_bucket_is_no_larger_than_what_there_is_to_send() -> None:
    bucket = {size: memory_usage("accel_zero2", FP32, 4, bucket=size).working for size in (0, 1000, 10**9)}
    assert bucket == {0: 0, 1000: 4000, 10**9: 4 * N}
