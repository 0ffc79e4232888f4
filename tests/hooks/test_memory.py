"""Bytes that live, the limit on them, and which errors say that memory ran out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_accel.hooks.memory import LiveBytes, is_out_of_memory


def step(net: nn.Module, batch: torch.Tensor) -> None:
    net(batch).square().mean().backward()


def test_what_lives_is_counted_once_and_until_it_is_gone() -> None:
    x = torch.ones(16)
    with LiveBytes() as live:
        y = x * 2
        view = y.view(4, 4)
        assert live.now == 64
        del y
        assert live.now == 64  # the view holds it
        del view
        x.add_(1)  # not made here, but written to
        assert live.now == 64
    assert live.peak == 64


def test_what_is_compiled_stays_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, x = torch.compile(lambda x: (x * 2).exp(), backend="eager"), torch.ones(16)
    with LiveBytes() as live:
        y = compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert live.now == y.nbytes
    torch._dynamo.reset()


def test_known_tensors_are_not_counted() -> None:
    x = torch.ones(16)
    with LiveBytes(known=[x]) as live:
        x.add_(1)
    assert live.now == live.peak == 0


def test_the_limit_holds_in_the_backward_pass_too() -> None:
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    with LiveBytes(known=net.parameters()) as live:
        loss = net(torch.ones(2, 32)).square().mean()
        forward = live.peak
        loss.backward()
    assert live.peak > forward + 3 * 32 * 32 * 4  # gradients
    net.zero_grad()
    loss = None
    with LiveBytes(limit=forward + 4096, known=net.parameters()):
        loss = net(torch.ones(2, 32)).square().mean()
        with pytest.raises(torch.OutOfMemoryError, match=r"bytes are in use, and \d") as raised:
            loss.backward()
    assert is_out_of_memory(raised.value)


def test_less_at_a_time_fits() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    peaks = []
    for batch in (64, 32):
        net.zero_grad()
        with LiveBytes(known=net.parameters()) as live:
            step(net, torch.ones(batch, 64))
        peaks.append(live.peak)
    gradients = sum(parameter.numel() for parameter in net.parameters()) * 4
    assert peaks[0] - gradients > 1.5 * (peaks[1] - gradients)
    net.zero_grad()
    with LiveBytes(limit=peaks[1], known=net.parameters()):
        step(net, torch.ones(32, 64))
        net.zero_grad()
        with pytest.raises(torch.OutOfMemoryError):
            step(net, torch.ones(64, 64))


def test_what_checkpointing_makes_again_is_seen() -> None:
    block = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 32))
    with LiveBytes(known=block.parameters()) as live:
        out = checkpoint(block, torch.ones(8, 32, requires_grad=True), use_reentrant=False)
        kept = live.now
        out.sum().backward()
    assert live.peak > kept + 8 * 512 * 4


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_allocator_of_the_cpu_says_so() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 48)
    assert is_out_of_memory(raised.value)


def test_what_runs_while_it_is_paused_is_not_counted() -> None:
    with LiveBytes(limit=100) as live:
        live.paused = True
        x = torch.ones(1000) * 2
        live.paused = False
        assert live.now == 0
        y = torch.ones(4)
        assert live.now == y.nbytes
        live.add(x)
        with pytest.raises(torch.OutOfMemoryError):
            y + 1
