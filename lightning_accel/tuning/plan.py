"""What a training run needs on each device under each strategy, which of them fit, and the cheapest that does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_accel.optimizers.low_bit import LowBitOptimizer
from lightning_accel.strategies.wrapping import choose_blocks
from lightning_accel.tuning.activations import storage_key
from lightning_accel.tuning.fake import FakeStep, quiet
from lightning_accel.tuning.memory import STRATEGIES, Model, Parameter, Usage, memory_usage
from lightning_accel.tuning.optimizer_state import measure_state

__all__ = ["PRECISIONS", "Plan", "find_precision", "list_parameters", "make_plan", "measure_model"]

PRECISIONS = {
    "32-true": ("32-true", "32", 32),
    "bf16-mixed": ("bf16-mixed", "bf16"),
    "16-mixed": ("16-mixed", "16", 16),
    "bf16-true": ("bf16-true",),
    "16-true": ("16-true",),
}
"""The precisions that are understood, and the Trainer's spellings of each."""
_LOW_BIT = 2.04 / 8  # of Adam's state, see docs/benchmarks/low_bit.md
_MOST_DEVICES = 4096


def find_precision(value: Any) -> str:
    """Return the name of what a Trainer's ``precision`` says.

    Raises:
        ValueError: If it is another one.
    """
    for name, spellings in PRECISIONS.items():
        if value in spellings or (value is None and name == "32-true"):
            return name
    raise ValueError(f"Expected `precision` to be one of {', '.join(PRECISIONS)}, but got {value!r}.")


@dataclass(frozen=True)
class Plan:
    """The bytes of each strategy, and what they mean.

    Attributes:
        model: What one device has to hold without sharding.
        usages: One of each strategy, the cheapest in time first.
        devices: In one machine.
        nodes: Machines.
        device_memory: Bytes of a device.
        headroom: The fraction of it that is left free, for what is not counted.
        precision: As of the Trainer.
        batch_size: Of a micro-batch; 0 where it is not known.
        low_bit: Whether the plan of DDP has 8-bit optimizer state.
        notes: What a reader has to know.
    """

    model: Model
    usages: tuple[Usage, ...]
    devices: int
    nodes: int
    device_memory: int
    headroom: float
    precision: str
    batch_size: int = 0
    low_bit: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def available(self) -> int:
        """Bytes of a device that may be filled."""
        return int(self.device_memory * (1 - self.headroom))

    def fits(self, usage: Usage) -> bool:
        """Whether a strategy can be used and has enough memory."""
        return not usage.refusal and usage.total <= self.available

    @property
    def choice(self) -> Usage | None:
        """The cheapest strategy that fits."""
        return next(filter(self.fits, self.usages), None)

    @property
    def missing(self) -> int:
        """Bytes that the strategy with the smallest need has too many; 0 where one fits."""
        return 0 if self.choice else self._smallest.total - self.available

    @property
    def _smallest(self) -> Usage:
        return min((usage for usage in self.usages if not usage.refusal), key=lambda usage: usage.total)

    def trainer_settings(self) -> dict[str, Any]:
        """What to set in the Trainer for the choice; empty where nothing fits."""
        if self.choice is None:
            return {}
        alone = self.devices * self.nodes == 1 and self.choice.strategy == "ddp"
        strategy = "auto" if alone else self.choice.strategy
        return {"devices": self.devices, "num_nodes": self.nodes, "precision": self.precision, "strategy": strategy}

    def advice(self) -> list[tuple[str, bool]]:
        """What would help where nothing fits, and whether it alone is enough."""
        return [] if self.choice else list(self._advice())

    def _advice(self) -> Iterator[tuple[str, bool]]:
        model, world = self.model, self.devices * self.nodes
        if self.batch_size > 1 and model.activations:
            room = self.available - (self._smallest.total - model.activations)
            size = max(1, min(self.batch_size - 1, int(room * self.batch_size / model.activations)))
            factor = math.ceil(self.batch_size / size)
            text = f"a micro-batch of {size} instead of {self.batch_size}, and {factor} times the accumulation"
            yield text, self._would_fit(replace(model, activations=model.activations * size // self.batch_size), world)
        blocks = len({parameter.block for parameter in model.parameters} - {""})
        if blocks > 1 and model.activations:
            # a block's own activations come back in the backward pass, beside the inputs of all blocks
            left = replace(model, activations=int(1.5 * model.activations / blocks))
            yield f"activation checkpointing of the {blocks} blocks", self._would_fit(left, world)
        if self.precision == "32-true":
            half = replace(
                model,
                parameters=tuple(replace(parameter, itemsize=2) for parameter in model.parameters),
                state=model.state // 2,
                plain_state=model.plain_state // 2,
                activations=model.activations // 2,
            )
            yield "precision bf16-true", self._would_fit(half, world)
        if not self.low_bit and model.state:
            small = memory_usage("ddp", replace(model, state=int(model.state * _LOW_BIT)), world)
            yield "LowBitOptimizer (8-bit state) under DDP", self.fits(small)
        more = world
        while more < _MOST_DEVICES:
            more *= 2
            if self._would_fit(model, more):
                yield f"{more} devices instead of {world}", True
                return

    def _would_fit(self, model: Model, world: int) -> bool:
        return any(self.fits(memory_usage(usage.strategy, model, world)) for usage in self.usages)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        rows = []
        for usage in self.usages:
            rows.append({**dataclasses.asdict(usage), "total": usage.total, "fits": self.fits(usage)})
        return {
            "devices": self.devices,
            "nodes": self.nodes,
            "device_memory": self.device_memory,
            "headroom": self.headroom,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "parameters": sum(parameter.numel for parameter in self.model.parameters),
            "trainable": sum(parameter.numel for parameter in self.model.parameters if parameter.trainable),
            "casts": self.model.casts,
            "strategies": rows,
            "trainer": self.trainer_settings(),
            "missing": self.missing,
            "advice": [{"text": text, "enough": enough} for text, enough in self.advice()],
            "notes": list(self.notes),
        }


def list_parameters(module: nn.Module) -> tuple[Parameter, ...]:
    """The parameters of a module, shared ones once, with the block that ``FullyShardStrategy`` would put each into."""
    blocks, _ = choose_blocks(module)
    block_of = {}
    for name, block in blocks.items():  # outer ones first, so that inner ones win
        for parameter in block.parameters():
            block_of[parameter] = name
    return tuple(
        Parameter(tuple(tensor.shape), tensor.element_size(), tensor.requires_grad, block_of.get(tensor, ""))
        for tensor in module.parameters()
    )


def measure_model(
    module: LightningModule,
    step: FakeStep,
    mode: FakeTensorMode,
    precision: str = "32-true",
    low_bit: LowBitOptimizer | None = None,
) -> Model:
    """Measure what a module needs whose step was seen.

    Args:
        module: Of fake tensors.
        step: Its step.
        mode: Of the fake tensors.
        precision: As of the Trainer.
        low_bit: What makes the optimizers' state 8-bit.
    """
    plain = [measure_state(optimizer, mode) for optimizer in step.optimizers]
    state = sum(actual for actual, _ in plain)
    plain_state, master_state = state, sum(master for _, master in plain)
    if low_bit is not None:
        names = {parameter: name for name, parameter in module.named_parameters()}
        state = 0
        with quiet():
            for optimizer in step.optimizers:
                optimizer.state.clear()
                state += measure_state(low_bit.transform_optimizer(optimizer, names), mode)[0]
    buffers = {storage_key(buffer): buffer.untyped_storage().nbytes() for buffer in module.buffers()}
    return Model(
        parameters=list_parameters(module),
        state=state,
        plain_state=plain_state,
        master_state=master_state,
        buffers=sum(buffers.values()),
        activations=step.peak or 0,
        casts=step.casts or 0,
        pure_fp16_under_zero=precision == "16-mixed",
    )


def make_plan(
    model: Model,
    devices: int,
    device_memory: int,
    nodes: int = 1,
    headroom: float = 0.1,
    precision: str = "32-true",
    batch_size: int = 0,
    low_bit: bool = False,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Compare all strategies; the arguments are the attributes of :class:`Plan`."""
    usages = tuple(memory_usage(name, model, devices * nodes) for name in STRATEGIES)
    return Plan(model, usages, devices, nodes, device_memory, headroom, precision, batch_size, low_bit, notes)
