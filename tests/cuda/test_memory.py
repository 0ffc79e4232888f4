"""Memory that really runs out, and what methods really save: on a CUDA device, where the allocator tells."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import Callback

from lightning_accel import BatchSizeFinder, FusedOptimizer, LowBitOptimizer, MicroBatching, OptimizerInBackward
from tests.cuda.wide import ACTIVATIONS, DEPTH, PARAMETERS, SAMPLES, loader, train, weights

pytestmark = [pytest.mark.cuda, pytest.mark.slow]

STATE = 4 * 4 * PARAMETERS
"""Weights, gradients and two moments in float32."""
BUDGET = STATE + 192 * 2**20
"""Less than the whole batch needs beside them, and more than a fourth of it does."""


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Have libraries make their workspaces, let go of what else the allocator holds, and take no limit along."""
    train(data=loader(16, 1), epochs=1)
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def limit_device(allowed: int) -> int:
    """Let this process have so many bytes more of the device: above that is CUDA's own error. Return the limit."""
    total, limit = torch.cuda.get_device_properties(0).total_memory, torch.cuda.memory_reserved() + allowed
    torch.cuda.set_per_process_memory_fraction(limit / total)
    return limit


def test_a_batch_that_does_not_fit_is_the_same_batch_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert SAMPLES * ACTIVATIONS > BUDGET - STATE
    limit_device(BUDGET)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        train()
    gc.collect()
    micro = MicroBatching()
    found, losses = train(micro)
    assert micro.size is not None and SAMPLES // 16 <= micro.size < SAMPLES
    assert losses.peak <= BUDGET
    torch.cuda.set_per_process_memory_fraction(1.0)
    same, again = train(MicroBatching(micro.size))
    assert losses.losses == again.losses
    assert torch.equal(weights(found), weights(same))
    _, plain = train()
    assert plain.peak > BUDGET
    # other random numbers for dropout in parts, otherwise the same batch
    torch.testing.assert_close(losses.losses, plain.losses, rtol=0.02, atol=0)


def test_a_budget_of_the_callback_holds_for_the_fit_alone() -> None:
    micro = MicroBatching(memory_budget=BUDGET + torch.cuda.memory_reserved())
    _, losses = train(micro)
    assert micro.size is not None and micro.size < SAMPLES
    assert losses.peak <= BUDGET
    _, plain = train()  # has no limit any more
    assert plain.peak > BUDGET


class OutInBackward(Callback):
    """Takes what is left of the device before the first backward, and gives it back before the next one."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0
        self.hold: torch.Tensor | None = None

    def on_before_backward(self, *_: object) -> None:
        self.hold = None
        if not self.taken:
            torch.cuda.empty_cache()
            self.taken = self.limit - torch.cuda.memory_reserved() - 2**21
            self.hold = torch.empty(self.taken, dtype=torch.uint8, device="cuda")


def test_memory_that_runs_out_in_the_backward_alone() -> None:
    """The backward runs in another thread, where the error is raised first."""
    take = OutInBackward(limit_device(STATE + 3 * SAMPLES * ACTIVATIONS))
    micro = MicroBatching()
    found, losses = train(micro, take)
    assert take.taken > 2**20 and micro.size is not None and SAMPLES // 8 <= micro.size < SAMPLES
    torch.cuda.set_per_process_memory_fraction(1.0)
    same, again = train(MicroBatching(micro.size))
    assert losses.losses == again.losses
    assert torch.equal(weights(found), weights(same))


@pytest.mark.parametrize("limited", ["by a budget", "by the device"])
def test_the_batch_size_that_fits_is_found(limited: str) -> None:
    if limited == "by the device":
        limit_device(BUDGET)
        search = BatchSizeFinder(mode="binsearch", max_size=SAMPLES, steps_per_trial=3)
    else:
        budget = BUDGET + torch.cuda.memory_allocated()
        search = BatchSizeFinder(mode="binsearch", max_size=SAMPLES, steps_per_trial=3, memory_budget=budget)
    found, losses = train(search, data=loader(64, 128), epochs=1)
    assert search.batch_size is not None and SAMPLES // 16 < search.batch_size < SAMPLES
    assert losses.peak <= BUDGET
    torch.cuda.set_per_process_memory_fraction(1.0)
    same, again = train(data=loader(search.batch_size, 128), epochs=1)
    assert losses.losses == again.losses
    assert torch.equal(weights(found), weights(same))
    _, more = train(data=loader(min(SAMPLES, 2 * search.batch_size), 128), epochs=3)
    assert more.peak > 0.9 * BUDGET


def test_gradients_do_not_all_exist_at_once() -> None:
    data = loader(16)
    plain, before = train(FusedOptimizer(), data=data)
    ours, after = train(FusedOptimizer(), OptimizerInBackward(), data=data)
    assert torch.equal(weights(plain), weights(ours))
    assert before.losses == after.losses
    saved = before.peak - after.peak
    # one gradient of DEPTH, and a little that is made in between, is there at a time
    assert saved > (1 - 3 / DEPTH) * 4 * PARAMETERS


def test_state_in_8_bits_takes_a_fourth() -> None:
    data = loader(64)
    _, before = train(FusedOptimizer(), data=data)
    for backend in ("bitsandbytes", "generic"):
        _, after = train(LowBitOptimizer(backend=backend), data=data)
        assert before.peak - after.peak > 0.9 * 2 * 3 * PARAMETERS, backend


def test_nothing_is_left_on_the_device() -> None:
    def held() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    train(data=loader(64), epochs=1)
    before = held()
    for callbacks in ([MicroBatching(16)], [OptimizerInBackward()], [LowBitOptimizer(backend="generic")]):
        train(*callbacks, data=loader(64), epochs=1)
        callbacks.clear()
        assert held() <= before
