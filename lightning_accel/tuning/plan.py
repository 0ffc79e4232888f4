"""What a training run needs on each device under each strategy, which of them fit, and the cheapest that does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_accel.hooks.memory import storage_key
from lightning_accel.hooks.optimizers import OptimizerTransform
from lightning_accel.optimizers.low_bit import LowBitOptimizer
from lightning_accel.strategies.wrapping import choose_blocks
from lightning_accel.tuning.fake import FakeStep, quiet
from lightning_accel.tuning.memory import STRATEGIES, Model, Parameter, Settings, Strategy, Usage, memory_usage
from lightning_accel.tuning.optimizer_state import measure_flat_state, measure_state

__all__ = [
    "PRECISIONS",
    "Advice",
    "Plan",
    "find_precision",
    "list_parameters",
    "make_plan",
    "measure_model",
    "takes_fsdp2",
]

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
NOT_ON_SHARDS = ("Adafactor", "LBFGS", "Rprop", "SparseAdam")
"""The optimizers that ``FullyShardStrategy`` refuses."""


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
class Advice:
    """Something that would need less memory.

    Attributes:
        text: What to change.
        strategy: Under which strategy the need is then looked at: the first that fits, or the one that needs least.
        total: Bytes of a device with it.
        enough: Whether that fits.
    """

    text: str
    strategy: Strategy
    total: int
    enough: bool


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
        settings: What the strategies are told.
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
    settings: Settings = field(default_factory=Settings)
    notes: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """All devices."""
        return self.devices * self.nodes

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
    def smallest(self) -> Usage:
        """The strategy that needs least of a device."""
        return min((usage for usage in self.usages if not usage.refusal), key=lambda usage: usage.total)

    @property
    def missing(self) -> int:
        """Bytes that the strategy with the smallest need has too many; 0 where one fits."""
        return 0 if self.choice else self.smallest.total - self.available

    def trainer_settings(self) -> dict[str, Any]:
        """What to set in the Trainer for the choice; empty where nothing fits."""
        if self.choice is None:
            return {}
        alone = self.world == 1 and self.choice.strategy == "ddp"
        strategy = "auto" if alone else self.settings.written.get(self.choice.strategy, self.choice.strategy)
        return {"devices": self.devices, "num_nodes": self.nodes, "precision": self.precision, "strategy": strategy}

    def advice(self) -> list[Advice]:
        """What would help where nothing fits, what is enough first."""
        return [] if self.choice else sorted(self._advice(), key=lambda advice: not advice.enough)

    def _advice(self) -> Iterator[Advice]:
        model = self.model
        if self.batch_size > 1 and model.activations + model.passing:
            fits, too_large = 1, self.batch_size
            while too_large - fits > 1:
                size = (fits + too_large) // 2
                fits, too_large = (size, too_large) if self._with_batch(size).enough else (fits, size)
            yield self._with_batch(fits)
        if not model.in_backward and not model.accumulates:
            text = "OptimizerInBackward, where gradients are not clipped by their norm"
            yield self._look(text, replace(model, in_backward=True))
        blocks = len({parameter.block for parameter in model.parameters} - {""})
        if blocks > 1 and model.activations:
            # a block's own activations come back in the backward pass, beside the inputs of all blocks
            left = replace(model, activations=int(1.5 * model.activations / blocks), frozen_inputs=0)
            yield self._look(f"activation checkpointing of the {blocks} blocks, about", left)
        if self.precision == "32-true":
            half = replace(
                model,
                parameters=tuple(replace(parameter, itemsize=2) for parameter in model.parameters),
                state=model.state // 2,
                sharded_state=model.sharded_state // 2,
                activations=model.activations // 2,
                frozen_inputs=model.frozen_inputs // 2,
                passing=model.passing // 2,
            )
            yield self._look("precision bf16-true", half)
        if not self.low_bit and model.state and not model.refusals.get("ddp"):
            small = memory_usage("ddp", replace(model, state=int(model.state * _LOW_BIT)), self.world, self.settings)
            yield Advice("LowBitOptimizer (8-bit state)", "ddp", small.total, self.fits(small))
        more = self.world
        while more < _MOST_DEVICES:
            more *= 2
            found = self._look(f"{more} devices instead of {self.world}", model, more)
            if found.enough:
                yield found
                return

    def _with_batch(self, size: int) -> Advice:
        model, now = self.model, self.batch_size
        text = f"a micro-batch of {size} instead of {now}, by MicroBatching(size={size})"
        text += " and without OptimizerInBackward" * model.in_backward
        # what comes and goes has a part that stays: the gradient that is being made
        passing = min(model.passing, model.passing * size // now + model.largest_gradient)
        smaller = replace(
            model,
            activations=model.activations * size // now,
            frozen_inputs=model.frozen_inputs * size // now,
            passing=passing,
            accumulates=True,
            in_backward=False,
        )
        return self._look(text, smaller)

    def _look(self, text: str, model: Model, world: int = 0) -> Advice:
        usages = [memory_usage(usage.strategy, model, world or self.world, self.settings) for usage in self.usages]
        possible = [usage for usage in usages if not usage.refusal]
        best = next(filter(self.fits, possible), None) or min(possible, key=lambda usage: usage.total)
        return Advice(text, best.strategy, best.total, self.fits(best))

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
            "advice": [dataclasses.asdict(advice) for advice in self.advice()],
            "notes": list(self.notes),
        }


def list_parameters(module: nn.Module, blocks: Any = "auto") -> tuple[Parameter, ...]:
    """The parameters of a module, shared ones once, with the block that ``FullyShardStrategy`` would put each into."""
    chosen, _ = choose_blocks(module, blocks)
    block_of = {}
    for name, block in chosen.items():  # outer ones first, so that inner ones win
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
    *,
    precision: str = "32-true",
    transforms: tuple[OptimizerTransform, ...] = (),
    blocks: Any = "auto",
    accumulates: bool = False,
    in_backward: bool = False,
) -> Model:
    """Measure what a module needs whose step was seen.

    Args:
        module: Of fake tensors.
        step: Its step.
        mode: Of the fake tensors.
        precision: As of the Trainer.
        transforms: What changes the optimizers, in its order.
        blocks: As of ``FullyShardStrategy``.
        accumulates: Whether gradients of several micro-batches are added.
        in_backward: Whether each parameter is stepped as its gradient arrives.

    Raises:
        ValueError: If an optimizer can't be planned.
    """
    parameters = list_parameters(module, blocks)
    state = sharded_state = flat_state = 0
    fused = True
    low_bits = [transform for transform in transforms if isinstance(transform, LowBitOptimizer)]
    with quiet():
        for optimizer in step.optimizers:
            plain = measure_state(optimizer, mode)
            flat = measure_flat_state(optimizer, mode)
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            own, single = sum(p.numel() * p.element_size() for p in trained), sum(p.numel() * 4 for p in trained)
            flat_state += plain * single // max(own, 1) if flat is None else flat
            for transform in transforms:
                optimizer = transform.transform(optimizer, module)
            fused = fused and all(group.get("fused") for group in optimizer.param_groups)
            changed = measure_state(optimizer, mode) if low_bits else plain
            state += changed
            sharded_state += changed if all(takes_fsdp2(transform) for transform in low_bits) else plain
    buffers = {storage_key(buffer): buffer.untyped_storage().nbytes() for buffer in module.buffers()}
    return Model(
        parameters=parameters,
        state=state,
        sharded_state=sharded_state,
        flat_state=flat_state,
        buffers=sum(buffers.values()),
        activations=step.kept,
        frozen_inputs=step.frozen_inputs,
        casts=step.casts,
        passing=step.passing,
        accumulates=accumulates,
        in_backward=in_backward,
        fused=fused,
        pure_fp16_under_zero=precision == "16-mixed",
        refusals=_refusals(module, step.optimizers, precision),
    )


def takes_fsdp2(transform: OptimizerTransform) -> bool:
    """Whether a callback works under ``FullyShardStrategy``."""
    return "FullyShardStrategy" in transform.contract.accepts


def _refusals(module: nn.Module, optimizers: list[Optimizer], precision: str) -> dict[str, str]:
    """Why strategies can't be used, by name; as the strategies themselves refuse it."""
    found = {}
    if len(optimizers) > 1:
        found["accel_zero"] = "several optimizers"
    whole = [type(optimizer).__name__ for optimizer in optimizers if type(optimizer).__name__ in NOT_ON_SHARDS]
    dtypes: set[torch.dtype] = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
    if precision == "16-mixed":
        found["accel_fsdp2"] = "not in 16-mixed"
    elif whole:
        found["accel_fsdp2"] = f"not with {whole[0]}"
    elif len(dtypes) > 1:
        found["accel_fsdp2"] = "several dtypes"
    return found


def make_plan(
    model: Model,
    devices: int,
    device_memory: int,
    nodes: int = 1,
    headroom: float = 0.1,
    precision: str = "32-true",
    batch_size: int = 0,
    low_bit: bool = False,
    settings: Settings | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Compare all strategies; the arguments are the attributes of :class:`Plan`."""
    settings = settings or Settings()
    usages = tuple(memory_usage(name, model, devices * nodes, settings) for name in STRATEGIES)
    return Plan(model, usages, devices, nodes, device_memory, headroom, precision, batch_size, low_bit, settings, notes)
