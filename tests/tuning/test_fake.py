"""A step on fake tensors against what the allocator of a real step counts."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.tuning.fake import FakeStep, run_fake_step

WIDTH, BATCH = 256, 512


class Net(LightningModule):
    """Some layers, checkpointed or not."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        self.mode = mode
        layers = [nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(4)]
        self.layers = nn.ModuleList(layers)
        self.norm, self.scale = nn.BatchNorm1d(WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale  # a reentrant checkpoint has gradients only where its input has
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=self.mode == "reentrant") if self.mode else layer(x))
        return self.norm(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(2 * BATCH, WIDTH), BATCH)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def fake(module: type[LightningModule] = Net, *arguments: Any, **options: Any) -> FakeStep:
    with torch.device("meta"):
        made = module(*arguments)
    return run_fake_step(made, **options)


class _Malloc(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated() -> int:
    """Bytes that the C library has handed out: what tensors on the CPU take, by no count of ours."""
    try:
        function = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        pytest.skip("this C library has no mallinfo2")
    function.restype = _Malloc
    gc.collect()  # what earlier tests left in cycles would go later
    found = function()
    return int(found.hblkhd + found.uordblks)


@pytest.mark.parametrize("mode", ["", "reentrant", "not reentrant"])
def test_activations_are_those_of_a_real_step(mode: str) -> None:
    module, batch = Net(mode), torch.ones(BATCH, WIDTH)
    module.training_step(batch, 0)  # what is made at the first call is no activation
    before = allocated()
    loss = module.training_step(batch, 0)
    kept = allocated() - before
    step = fake(Net, mode, batch=torch.empty(BATCH, WIDTH))
    whole = batch.numel() * 4
    assert step.kept - whole == pytest.approx(kept, rel=0.03), "without the batch, which was there before"
    assert step.failure == "" and loss.requires_grad
    if mode:  # one layer's come back in the backward pass
        assert step.kept < 8 * whole and step.passing > 4 * whole
    else:
        assert step.kept > 23 * whole


def test_accumulated_gradients_are_not_activations() -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(WIDTH, 200 * WIDTH, bias=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.wide(batch).mean()

    # in the backward pass a gradient as large as the weight is there once: as gradient, which is counted elsewhere
    step = fake(Wide, batch=torch.empty(1, WIDTH))
    assert step.kept + step.passing < 1.2 * 4 * 200 * WIDTH**2


def test_autocast_keeps_copies_of_the_weights() -> None:
    plain, mixed, half = (
        fake(batch=torch.empty(8, WIDTH), precision=precision) for precision in ("32-true", "bf16-mixed", "bf16-true")
    )
    weights = 4 * 2 * 2 * WIDTH**2
    assert plain.casts == half.casts == 0
    assert mixed.casts == pytest.approx(2 * weights, rel=0.01)
    assert half.kept == pytest.approx(plain.kept / 2, rel=0.05)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter({"x": torch.ones(WIDTH), "rest": {"ids": [torch.zeros(7)]}} for _ in range(10 * BATCH))


class Data(LightningDataModule):
    """Nested batches of unknown length, with a download."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers

    def prepare_data(self) -> None:
        raise AssertionError("it downloads")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), BATCH, num_workers=self.workers)


class Nested(Net):
    def prepare_data(self) -> None:
        raise AssertionError("so does this")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch["rest"]["ids"][0].shape == (len(batch["x"]), 7)
        return self(batch["x"]).square().mean()


def test_nested_batches_of_a_stream_whose_download_is_not_run() -> None:
    plain = fake()
    for options in ({}, {"batch_size": BATCH}):
        nested = fake(Nested, datamodule=Data(), **options)
        assert nested.batch_size == BATCH and nested.failure == ""
        assert nested.kept == pytest.approx(plain.kept, rel=0.01)
    assert fake(Nested, datamodule=Data(), batch_size=2 * BATCH).kept == pytest.approx(2 * plain.kept, rel=0.01)


def test_a_module_that_is_made_late() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.layers = self.layers, nn.ModuleList()

        def configure_model(self) -> None:
            del self.made
            self.layers = Net().layers

    assert fake(Late).kept == pytest.approx(fake().kept, rel=0.001)


def test_manual_optimization_and_two_optimizers() -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                loss = super().training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in self.layers[:2]]

    step = fake(Manual)
    assert step.failure == "" and len(step.optimizers) == 2
    assert step.kept == pytest.approx(fake().kept, rel=0.01)


def test_a_step_that_reads_values_leaves_the_activations_out() -> None:
    class Reads(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if loss.item() > 0 else 2 * loss

    step = fake(Reads)
    assert (step.kept, step.passing) == (0, 0) and "_local_scalar" in step.failure
    assert len(step.optimizers) == 1


def test_inputs_of_frozen_linear_layers_are_seen_that_stage_3_keeps() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.frozen = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))).requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.frozen(self.first(batch)).square().mean()

    # the first layer's output and what is between the three: autograd alone keeps the batch and the last one's output
    step, whole = fake(Frozen, batch=torch.empty(BATCH, WIDTH)), 4 * BATCH * WIDTH
    assert step.frozen_inputs == 3 * whole
    assert step.kept == pytest.approx(2 * whole, rel=0.01)
    assert fake(batch=torch.empty(BATCH, WIDTH)).frozen_inputs == 0
