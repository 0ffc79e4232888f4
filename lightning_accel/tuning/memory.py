"""How many bytes a device needs for a training state under each strategy: formulas, without torch.

They are ZeRO's (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) and what real engines were measured to hold,
see ``docs/benchmarks/plan.md``. With N parameters of 4 bytes, Adam and W devices: DDP has 4N + 4N of gradients + 4N of
buckets that hold them once more + 8N of Adam's state. ZeRO divides the state by W (stage 1), then the gradients (2),
then the parameters (3), and adds a master copy of the parameters, divided by W, in fp32 as well. FSDP2 divides all of
it and has no master copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_accel.strategies.zero_config import BUCKET_ELEMENTS, zero_bytes

__all__ = ["STRATEGIES", "Model", "Parameter", "Settings", "Strategy", "Usage", "memory_usage"]

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
class Settings:
    """What the strategies are told, as far as it takes memory; the defaults are theirs.

    Attributes:
        bucket: The most elements of the buffer that ZeRO reduces gradients in; no more than there are.
        persistence: Parameters of no more elements stay whole at stage 3.
        live: Elements of parameters that stage 3 may keep gathered.
        sub_group: Elements that stage 3 steps at once.
        bucket_view: Whether DDP's gradients are views of its buckets.
        replicas: Groups of devices that each hold the whole model under FSDP2.
        reshard: Whether FSDP2 frees a block's parameters after its forward pass.
        blocks: What FSDP2 gathers at a time, as of ``FullyShardStrategy``.
        written: How a configuration says a strategy with all of this, by its name, where the name is not enough.
    """

    bucket: int = BUCKET_ELEMENTS
    persistence: int = 100_000
    live: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    bucket_view: bool = False
    replicas: int = 1
    reshard: bool = True
    blocks: Any = "auto"
    written: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """What one device has to hold without sharding, in bytes.

    Attributes:
        parameters: The parameters.
        state: Of the optimizers, as they are configured.
        sharded_state: As FSDP2 takes them, before it is divided.
        flat_state: As ZeRO takes them: never in 8 bits, and of fp32 copies of the parameters, flattened.
        buffers: Of the module.
        activations: What one micro-batch's forward pass keeps.
        frozen_inputs: What stage 3 keeps more: inputs of linear layers with a frozen weight.
        casts: Low-precision copies of the parameters that autocast keeps until the backward pass.
        passing: What comes and goes during both passes, at most.
        accumulates: Whether gradients of several micro-batches are added.
        in_backward: Whether each parameter is stepped as its gradient arrives, which is then gone.
        fused: Whether the optimizer's step makes no copies.
        pure_fp16_under_zero: Whether DeepSpeed makes the parameters fp16, as for ``precision="16-mixed"``.
        refusals: Why a strategy can't be used, by its name.
    """

    parameters: tuple[Parameter, ...]
    state: int = 0
    sharded_state: int = 0
    flat_state: int = 0
    buffers: int = 0
    activations: int = 0
    frozen_inputs: int = 0
    casts: int = 0
    passing: int = 0
    accumulates: bool = False
    in_backward: bool = False
    fused: bool = False
    pure_fp16_under_zero: bool = False
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(parameter.nbytes for parameter in self.parameters if parameter.trainable)

    @property
    def largest_gradient(self) -> int:
        """Bytes of the largest one."""
        return max((parameter.nbytes for parameter in self.parameters if parameter.trainable), default=0)


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
        working: During the forward and backward passes: communication buckets, and what comes and goes.
        stepping: During the optimizer's step: what comes and goes.
        gradients_late: Whether there are no gradients before the backward pass, in which activations go.
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
    stepping: int = 0
    gradients_late: bool = False
    host: int = 0
    refusal: str = ""

    @property
    def total(self) -> int:
        """The most on the device at a time."""
        passes = self.working + (
            max(self.gradients, self.activations) if self.gradients_late else self.gradients + self.activations
        )
        steady = self.parameters + self.state + self.master + self.buffers
        return steady + max(passes, self.gradients + self.stepping)


def memory_usage(strategy: Strategy, model: Model, world: int, settings: Settings | None = None) -> Usage:
    """The bytes of one of ``world`` devices.

    Args:
        strategy: Its registered name.
        model: What there is to hold.
        world: The number of devices that share it.
        settings: What the strategy is told.

    Example:
        >>> model = Model((Parameter((1000, 1000)),), state=8_000_000, sharded_state=8_000_000, flat_state=8_000_000)
        >>> usage = memory_usage("accel_zero2", model, world=4)
        >>> usage.parameters, usage.gradients, usage.state, usage.master
        (4000000, 1000000, 2000000, 1000000)
    """
    settings = settings or Settings()
    if strategy == "ddp":
        return _ddp(model, world, settings)
    if strategy in ("accel_fsdp2", "accel_fsdp2_offload"):
        return _fsdp2(strategy, model, world, settings)
    return _zero(strategy, model, world, settings)


def _adaptive(state: int, parameters: int) -> bool:
    """Whether the step divides by the root of a second moment, which takes copies: more than momentum is kept."""
    return state > 1.5 * parameters > 0


def _ddp(model: Model, world: int, settings: Settings) -> Usage:
    gradients = model.gradients
    # the buckets are copies, unless DDP is told otherwise; one device needs no DDP
    buckets = gradients if world > 1 and not settings.bucket_view else 0
    copies = gradients if _adaptive(model.state, gradients) and not model.fused else 0
    working, stepping = model.passing + buckets, buckets + copies
    if model.in_backward:  # with no buckets: a gradient is averaged while the next is made
        gradients = min(gradients, model.largest_gradient * min(world, 2))
        working, stepping = model.passing + min(copies, model.largest_gradient), 0
    return Usage(
        strategy="ddp",
        parameters=sum(parameter.nbytes for parameter in model.parameters),
        gradients=gradients,
        state=model.state,
        master=0,
        activations=model.activations + model.casts,
        buffers=model.buffers,
        working=working,
        stepping=stepping,
        refusal=model.refusals.get("ddp", ""),
    )


def _zero(strategy: Strategy, model: Model, world: int, settings: Settings) -> Usage:
    stage, offload = int(strategy.removeprefix("accel_zero")[0]), strategy.endswith("offload")
    fp16 = model.pure_fp16_under_zero
    sizes = [(p.numel, 2 if fp16 else p.itemsize, p.trainable) for p in model.parameters]
    elements = sum(numel for numel, _, _ in sizes)
    trained = sum(numel for numel, _, trainable in sizes if trainable)
    per_gradient = sum(numel * size for numel, size, trainable in sizes if trainable) / max(trained, 1)
    held = zero_bytes(
        elements,
        stage,
        world,
        parameter_bytes=sum(numel * size for numel, size, _ in sizes) / max(elements, 1),
        gradient_bytes=per_gradient,
        state_bytes=model.flat_state / max(trained, 1),
        trainable=trained,
    )
    parameters, gradients, master, state = map(math.ceil, held.values())
    bucket = math.ceil(min(settings.bucket, trained) * per_gradient)
    working = model.passing + bucket * (1 if stage == 1 else 2)  # stages 2, 3 copy a bucket to reduce it
    if stage == 2 and model.accumulates:
        working += gradients  # the new ones beside their sum
    if stage == 3:
        parameters += sum(numel * size for numel, size, _ in sizes if numel <= settings.persistence)
        working += math.ceil(min(elements, settings.live) * held["parameters"] * world / max(elements, 1))
    # The step is taken on a flat fp32 copy of the gradients, which stage 3 keeps beside it, with two more where Adam
    # divides by a root.
    stepped = math.ceil(min(trained / world, settings.sub_group if stage == 3 else math.inf))
    copy = 4 if stage == 3 else 4 - min(4, int(per_gradient))
    stepping = stepped * (copy + (8 if _adaptive(model.flat_state, 4 * trained) else 0))
    stepping = max(stepping, bucket if stage == 1 else 0) + (bucket if stage == 3 else 0)
    host = 0
    if offload:
        # gradients go to the host as they are reduced, and become fp32 there, beside what they were
        host = master + state + gradients + math.ceil(4 * trained / world)
        gradients = master = state = stepping = 0
        if stage == 3:
            host, parameters = host + parameters, 0
    return Usage(
        strategy=strategy,
        parameters=parameters,
        gradients=gradients,
        state=state,
        master=master,
        activations=model.activations + (model.frozen_inputs if stage == 3 else 0) + (0 if fp16 else model.casts),
        buffers=model.buffers,
        working=working,
        stepping=stepping,
        gradients_late=stage < 3 and not model.accumulates,
        host=host,
        refusal=model.refusals.get("accel_zero", "not with OptimizerInBackward" if model.in_backward else ""),
    )


def _fsdp2(strategy: Strategy, model: Model, world: int, settings: Settings) -> Usage:
    world //= settings.replicas
    parameters = sum(p.shard(world) * p.itemsize for p in model.parameters)
    gradients = sum(p.shard(world) * p.itemsize for p in model.parameters if p.trainable)
    state = -(-model.sharded_state * gradients // max(model.gradients, 1))
    stepping = gradients if _adaptive(model.sharded_state, model.gradients) and not model.fused else 0
    blocks: dict[str, int] = {"": 0}
    for parameter in model.parameters:
        blocks[parameter.block] = blocks.get(parameter.block, 0) + parameter.nbytes
    root = blocks.pop("")
    # The root is gathered for the whole step; of the blocks one is in use while the next is gathered, into a flat copy
    # first. Gradients are whole until they are reduced, which accumulation puts off.
    whole = max(blocks.values(), default=0)
    if model.in_backward:  # those of a block arrive together
        gradients = min(gradients, -(-max(whole, root) // world))
        stepping = min(stepping, gradients)
    working = model.passing + 2 * root + (3 * whole if settings.reshard else sum(blocks.values()) + 2 * whole)
    if model.accumulates:
        gradients = model.gradients
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
        stepping=0 if offload else stepping,
        host=host,
        refusal=model.refusals.get("accel_fsdp2", ""),
    )
