"""How many bytes a device needs for a training state under each strategy: formulas, without torch.

With N parameters of 4 bytes, Adam and W devices (ZeRO, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, and
what real engines were measured to hold): DDP has 4N + 4N gradients + 4N of buckets that hold
them once more + 8N of Adam's state. ZeRO divides the state by W (stage 1), then the gradients (2), then the parameters
(3), and adds a master copy of the parameters, divided by W, in fp32 as well. FSDP2 divides all of it and has no master
copy.

What is counted is the moment when the gradients are complete, just before the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_accel.strategies.zero_config import BUCKET_ELEMENTS

__all__ = ["STRATEGIES", "Model", "Parameter", "Strategy", "Usage", "memory_usage"]

Strategy = Literal[
    "ddp",
    "accel_zero1",
    "accel_zero2",
    "accel_fsdp2",
    "accel_zero3",
    "accel_zero2_offload",
    "accel_fsdp2_offload",
    "accel_zero3_offload",
]
STRATEGIES: dict[Strategy, str] = {
    "ddp": "DDP",
    "accel_zero1": "ZeRO 1",
    "accel_zero2": "ZeRO 2",
    "accel_fsdp2": "FSDP2",
    "accel_zero3": "ZeRO 3",
    "accel_zero2_offload": "ZeRO 2, offload",
    "accel_fsdp2_offload": "FSDP2, offload",
    "accel_zero3_offload": "ZeRO 3, offload",
}
"""The strategies by what they cost in time: the least communication first, main memory last."""

ZERO_LIVE = 1_000_000_000
"""Elements of parameters that stage 3 keeps gathered at most: DeepSpeed's ``stage3_max_live_parameters``."""


@dataclass(frozen=True)
class Parameter:
    """One parameter, shared ones once.

    Attributes:
        shape: As of the whole parameter.
        itemsize: Bytes of an element.
        trainable: Whether it has a gradient.
        block: The block that FSDP2 gathers it with; the empty string for the root.
    """

    shape: tuple[int, ...]
    itemsize: int = 4
    trainable: bool = True
    block: str = ""

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.itemsize

    def shard(self, world: int) -> int:
        """The elements of the largest of ``world`` shards along the first dimension."""
        first = self.shape[0] if self.shape else 1
        return -(-first // world) * (self.numel // first if first else 0)


@dataclass(frozen=True)
class Model:
    """What one device has to hold without sharding, in bytes.

    Attributes:
        parameters: The parameters.
        state: Of the optimizers, as they are configured.
        plain_state: Without 8-bit state, which sharding strategies do not take.
        master_state: The same on fp32 copies of the parameters.
        buffers: Of the module.
        activations: What one micro-batch's forward pass keeps.
        casts: Low-precision copies of the parameters that autocast keeps until the backward pass.
        pure_fp16_under_zero: Whether DeepSpeed makes the parameters fp16, as for ``precision="16-mixed"``.
    """

    parameters: tuple[Parameter, ...]
    state: int = 0
    plain_state: int = 0
    master_state: int = 0
    buffers: int = 0
    activations: int = 0
    casts: int = 0
    pure_fp16_under_zero: bool = False

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(parameter.nbytes for parameter in self.parameters if parameter.trainable)


@dataclass(frozen=True)
class Usage:
    """The bytes of one device under one strategy.

    Attributes:
        strategy: Its registered name.
        parameters: What it holds of the parameters all the time.
        gradients: What it holds of the gradients at most.
        state: Of the optimizers.
        master: fp32 copies of parameters that are themselves in fewer bits, and ZeRO's always.
        activations: With low-precision copies of parameters.
        buffers: Of the module.
        working: Communication buckets, and what is gathered for the moment.
        host: Bytes of main memory that go with this device.
        refusal: Why this strategy can't be used here.
    """

    strategy: Strategy
    parameters: int
    gradients: int
    state: int
    master: int
    activations: int
    buffers: int
    working: int
    host: int = 0
    refusal: str = ""

    @property
    def total(self) -> int:
        """All on the device."""
        return (
            self.parameters + self.gradients + self.state + self.master + self.activations + self.buffers + self.working
        )


def memory_usage(
    strategy: Strategy, model: Model, world: int, *, bucket: int = BUCKET_ELEMENTS, live: int = ZERO_LIVE
) -> Usage:
    """The bytes of one of ``world`` devices.

    Args:
        strategy: Its registered name.
        model: What there is to hold.
        world: The number of devices that share it.
        bucket: The most elements of the buffer that ZeRO reduces gradients in; no more than there are.
        live: Elements of DeepSpeed's ``stage3_max_live_parameters``.

    Example:
        >>> model = Model((Parameter((1000, 1000)),), state=8_000_000, plain_state=8_000_000, master_state=8_000_000)
        >>> usage = memory_usage("accel_zero2", model, world=4, bucket=0)
        >>> usage.parameters, usage.gradients, usage.state, usage.master
        (4000000, 1000000, 2000000, 1000000)
    """
    if strategy == "ddp":
        return _ddp(model, world)
    if strategy in ("accel_fsdp2", "accel_fsdp2_offload"):
        return _fsdp2(strategy, model, world)
    return _zero(strategy, model, world, bucket, live)


def _ddp(model: Model, world: int) -> Usage:
    return Usage(
        strategy="ddp",
        parameters=sum(parameter.nbytes for parameter in model.parameters),
        gradients=model.gradients,
        state=model.state,
        master=0,
        activations=model.activations + model.casts,
        buffers=model.buffers,
        # gradient_as_bucket_view is False by default, so that the buckets are copies; one device needs no DDP
        working=model.gradients if world > 1 else 0,
    )


def _zero(strategy: Strategy, model: Model, world: int, bucket: int, live: int) -> Usage:
    stage, offload = int(strategy.removeprefix("accel_zero")[0]), strategy.endswith("offload")
    fp16 = model.pure_fp16_under_zero
    sizes = [(p.numel, 2 if fp16 else p.itemsize, p.trainable) for p in model.parameters]
    whole = sum(numel * size for numel, size, _ in sizes)
    trainable = sum(numel for numel, _, is_trainable in sizes if is_trainable)
    gradients = sum(numel * size for numel, size, is_trainable in sizes if is_trainable)
    itemsize = max((size for _, size, _ in sizes), default=4)
    part = -(-gradients // world)
    master, state = -(-4 * trainable // world), -(-model.master_state // world)
    working = min(bucket, trainable) * itemsize
    parameters = whole
    if stage == 3:
        parameters = -(-whole // world)
        working += min(sum(numel for numel, _, _ in sizes), live) * itemsize
    elif stage == 1:
        part += gradients  # whole until the backward pass is over
    host = 0
    if offload:
        # gradients go to the host as they are reduced, and become fp32 there, beside what they were
        host = master + state + part + -(-4 * trainable // world)
        part = master = state = 0
        if stage == 3:
            host, parameters = host + parameters, 0
    return Usage(
        strategy=strategy,
        parameters=parameters,
        gradients=part,
        state=state,
        master=master,
        activations=model.activations + (0 if fp16 else model.casts),
        buffers=model.buffers,
        working=working,
        host=host,
    )


def _fsdp2(strategy: Strategy, model: Model, world: int) -> Usage:
    parameters = sum(p.shard(world) * p.itemsize for p in model.parameters)
    gradients = sum(p.shard(world) * p.itemsize for p in model.parameters if p.trainable)
    state = -(-model.plain_state * gradients // max(model.gradients, 1))
    blocks: dict[str, int] = {"": 0}
    for parameter in model.parameters:
        blocks[parameter.block] = blocks.get(parameter.block, 0) + parameter.nbytes
    root = blocks.pop("")
    # The root is gathered for the whole step; of the blocks one is in use while the next is gathered. Their gradients
    # are whole until they are reduced.
    working = 2 * root + 3 * max(blocks.values(), default=0)
    offload = strategy.endswith("offload")
    host = parameters + gradients + state if offload else 0
    return Usage(
        strategy=strategy,
        parameters=0 if offload else parameters,
        gradients=0 if offload else gradients,
        state=0 if offload else state,
        master=0,
        activations=model.activations + model.casts,
        buffers=model.buffers,
        working=working,
        host=host,
        refusal="it does not do 16-mixed; bf16-mixed it does" if model.pure_fp16_under_zero else "",
    )
