from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.report.meters import Meter
from lightning_accel.report.sizes import (
    PeakMemory,
    count_nonzeros,
    count_parameters,
    describe_environment,
    optimizer_state_bytes,
    state_dict_bytes,
    tensor_bytes,
)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Silent(Module):
    validation_step = None  # type: ignore[assignment]


def loader(shuffle: bool = False) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 4, generator=draw), torch.randint(3, (32,), generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def fit(module: LightningModule, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, **options},
    )
    trainer.fit(module, loader(shuffle=True), None if isinstance(module, Silent) else loader())
    return trainer


def test_measures() -> None:
    meter = Meter()
    fit(Module(), meter)
    assert meter.monitored == ["val_loss"]
    assert [(point.step, point.epoch) for point in meter.history["val_loss"]] == [(4, 0), (8, 1)]
    assert {"val_loss", "train_loss_step", "train_loss_epoch"} <= set(meter.history)
    seconds = [point.seconds for point in meter.history["val_loss"]]
    assert 0 < seconds[0] < seconds[1] <= meter.measured["seconds_fit"]
    assert meter.measured["steps"] == 8
    assert meter.measured["parameters"] == meter.measured["nonzeros"] == 15
    # Adam: two moments and a step counter for the weight (12) and the bias (3), 4 bytes each.
    assert meter.measured["optimizer_state_bytes"] == 4 * (2 * 12 + 2 * 3 + 2)
    assert meter.measured["metrics"]["val_loss"] == meter.history["val_loss"][-1].value
    assert meter.measured["model_bytes"] > 60
    assert meter.measured["peak_memory_bytes"] >= 0


def test_validation_within_the_epoch() -> None:
    meter = Meter()
    fit(Module(), meter, val_check_interval=2, max_epochs=1)
    assert [point.step for point in meter.history["val_loss"]] == [2, 4]


def test_without_validation() -> None:
    meter = Meter()
    fit(Silent(), meter)
    assert meter.monitored == []
    assert len(meter.history["train_loss_epoch"]) == 2


def test_run_is_bit_for_bit_the_same() -> None:
    weights = []
    for callbacks in ([], [Meter(lambda fraction: None, progress_every=0.0)]):
        torch.manual_seed(1)
        module = Module()
        fit(module, *callbacks)
        weights.append((copy.deepcopy(module.state_dict()), torch.random.get_rng_state()))
    (plain, plain_random), (metered, metered_random) = weights
    assert all(torch.equal(plain[key], metered[key]) for key in plain)
    assert torch.equal(plain_random, metered_random)


def test_tells_progress() -> None:
    told: list[float | None] = []
    fit(Module(), Meter(told.append, progress_every=0.0))
    assert told == pytest.approx([number / 8 for number in range(1, 9)])
    assert len(told) == 8


def test_progress_is_throttled() -> None:
    told: list[float | None] = []
    fit(Module(), Meter(told.append, progress_every=1000.0))
    assert len(told) == 1


def test_clock_covers_the_fit_and_not_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("lightning_accel.report.meters.time.perf_counter", lambda: float(next(clock)))
    meter = Meter()
    meter.begin()  # 0
    meter.on_fit_end(fit_stub(), Module())  # 1 and 2: the measuring took 1
    meter.end()  # 3
    assert meter.measured["seconds_fit"] == 2.0


def fit_stub() -> Any:
    return SimpleNamespace(global_step=0, callback_metrics={}, optimizers=[])


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    module = nn.Sequential(first, second)
    with torch.no_grad():
        first.weight[0] = 0
    assert count_parameters(module) == 16
    assert count_nonzeros(module) == 12


def test_shared_state_counts_once() -> None:
    base = torch.zeros(100)
    assert tensor_bytes([base, base[:10], torch.zeros(5, dtype=torch.uint8)]) == 405
    optimizer = torch.optim.SGD([torch.zeros(10, requires_grad=True)], lr=0.1)
    assert optimizer_state_bytes([optimizer]) == 0
    parameter = optimizer.param_groups[0]["params"][0]
    optimizer.state[parameter] = {"nested": [{"codes": torch.zeros(10, dtype=torch.uint8)}], "table": base, "step": 3}
    assert optimizer_state_bytes([optimizer, optimizer]) == 410


def test_wrapper_tensors_are_opened() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    pair = TwoTensor(torch.zeros(3), torch.zeros(3))
    optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"pair": pair}
    assert optimizer_state_bytes([optimizer]) == 24


def test_zeros_compress() -> None:
    dense, sparse = nn.Linear(64, 64), nn.Linear(64, 64)
    with torch.no_grad():
        sparse.weight.zero_()
    (dense_plain, dense_zipped), (sparse_plain, sparse_zipped) = map(state_dict_bytes, (dense, sparse))
    assert dense_plain == sparse_plain > 64 * 64 * 4
    assert dense_zipped > 0.8 * dense_plain
    assert sparse_zipped < 0.2 * sparse_plain


def test_saved_size_is_that_of_a_file(own_directory: Any) -> None:
    module = nn.Linear(64, 64)
    torch.save(module.state_dict(), "model.pt")
    assert state_dict_bytes(module)[0] == pytest.approx((own_directory / "model.pt").stat().st_size, abs=300)


@pytest.mark.parametrize("work", [lambda: None, lambda: bytearray(64 * 2**20)])
def test_peak_memory(work: Callable[[], object]) -> None:
    bytearray(128 * 2**20)  # an earlier, higher peak must not count
    memory = PeakMemory()
    memory.start()
    made = work() is not None
    peak = memory.stop()
    assert memory.kind == "resident"
    assert (60 * 2**20 < peak < 80 * 2**20) if made else peak < 16 * 2**20


def test_environment() -> None:
    found = describe_environment()
    assert found["torch"] == torch.__version__
    assert "1 torch threads" in found["processor"]
