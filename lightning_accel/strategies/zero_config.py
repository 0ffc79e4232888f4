"""The options of ZeRO as typed values, the names of its common settings, and how many bytes it takes on a rank.

Nothing here knows DeepSpeed or Lightning. How the options become DeepSpeed's configuration is in ``zero_merge``.

Papers: ZeRO (https://arxiv.org/abs/1910.02054), ZeRO-Offload (https://arxiv.org/abs/2101.06840), ZeRO-Infinity
(https://arxiv.org/abs/2104.07857), ZeRO++ (https://arxiv.org/abs/2306.10209), ZenFlow
(https://arxiv.org/abs/2505.12242).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from lightning_accel.errors import check_choice, check_int, check_number

__all__ = [
    "BUCKET_ELEMENTS",
    "ZERO_NAMES",
    "Communication",
    "OffloadOptimizer",
    "OffloadParameters",
    "Section",
    "Stage3",
    "ZeROPlusPlus",
    "ZenFlow",
    "with_path",
    "zero_bytes",
]

ZERO_NAMES: dict[str, dict[str, Any]] = {
    "accel_zero1": {"stage": 1},
    "accel_zero2": {"stage": 2},
    "accel_zero3": {"stage": 3},
    "accel_zero2_offload": {"stage": 2, "offload_optimizer": "cpu"},
    "accel_zero3_offload": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "accel_zero3_nvme": {
        "stage": 3,
        "offload_optimizer": "nvme",
        "offload_parameters": "nvme",
        "nvme_path": "/local_nvme",  # where Lightning's own strategy has it
    },
}
"""The registered names and the arguments of ``ZeROStrategy`` that each stands for."""

BUCKET_ELEMENTS = 200_000_000
"""The most elements of a communication bucket, where the user gives no size. DeepSpeed makes buckets in full."""

Check = Callable[[str, Any], Any]


def _at_least(minimum: int) -> Check:
    return lambda name, value: check_int(name, value, minimum)


def _between(low: float, high: float, **ends: bool) -> Check:
    return lambda name, value: check_number(name, value, low, high, **ends)


def _one_of(*choices: str) -> Check:
    return lambda name, value: check_choice(name, value, choices)


def _is_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be true or false, but got {value!r}.")


def _is_path(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"Expected `{name}` to be the path of a folder, but got {value!r}.")


def _option(key: str, check: Check, default: Any = None) -> Any:
    """A field: DeepSpeed's name of it, and what it may be; None leaves it to DeepSpeed."""
    return field(default=default, metadata={"key": key, "check": check})


class Section:
    """Options that belong together."""

    name: ClassVar[str]
    """The argument of ``ZeROStrategy`` that they are given as."""
    within: ClassVar[tuple[str, ...]] = ("zero_optimization",)
    """Where DeepSpeed reads them."""

    def __post_init__(self) -> None:
        for option, value in self.given():
            option.metadata["check"](f"{self.name}.{option.name}", value)

    @classmethod
    def options(cls) -> tuple[Field[Any], ...]:
        """The fields."""
        return fields(cls)  # type: ignore[arg-type]  # every subclass is a dataclass

    def given(self) -> Iterator[tuple[Field[Any], Any]]:
        """The fields that are set, and their values."""
        for option in self.options():
            if (value := getattr(self, option.name)) is not None:
                yield option, value

    def leaves(self) -> Iterator[tuple[tuple[str, ...], str, Any]]:
        """Where DeepSpeed reads each option that is set, the option's name here, and its value."""
        for option, value in self.given():
            key = option.metadata["key"]
            path = (key[1:],) if key.startswith("/") else (*self.within, key)  # "/": at the top
            yield path, f"{self.name}.{option.name}", value


@dataclass
class OffloadOptimizer(Section):
    """Where the optimizer's state and the fp32 master weights live, and the optimizer runs."""

    name = "offload_optimizer"
    within = ("zero_optimization", "offload_optimizer")

    device: Literal["none", "cpu", "nvme"] = _option("device", _one_of("none", "cpu", "nvme"), "cpu")
    """On the accelerator, in main memory, or (stage 3) on a disk. The optimizer then runs on the CPU."""
    nvme_path: str | None = _option("nvme_path", _is_path)
    """The folder for ``nvme``."""
    pin_memory: bool | None = _option("pin_memory", _is_bool)
    """Page-locked main memory: faster copies to a GPU, but it can't be swapped out. DeepSpeed's default: true."""
    buffer_count: int | None = _option("buffer_count", _at_least(1))
    """``nvme``: buffers; at least one for each number kept a parameter, 4 for Adam."""
    pipeline_read: bool | None = _option("pipeline_read", _is_bool)
    """``nvme``: read the next part while this one is stepped."""
    pipeline_write: bool | None = _option("pipeline_write", _is_bool)
    """``nvme``: write the last part while this one is stepped."""
    fast_init: bool | None = _option("fast_init", _is_bool)
    """``nvme``: start faster."""
    ratio: float | None = _option("ratio", _between(0, 1))
    """Stage 3: the fraction of the state that is offloaded."""
    super_offload: bool | None = _option("super_offload", _is_bool)
    """SuperOffload, for machines whose CPU and GPU share a fast link (stage 3, ``cpu``, CUDA only)."""
    cpu_cores: float | None = _option("cpuadam_cores_perc", _between(0, 1))
    """SuperOffload: the fraction of the CPU's cores for its optimizer."""


@dataclass
class OffloadParameters(Section):
    """Where the parameters live between their uses (stage 3)."""

    name = "offload_parameters"
    within = ("zero_optimization", "offload_param")

    device: Literal["none", "cpu", "nvme"] = _option("device", _one_of("none", "cpu", "nvme"), "cpu")
    """On the accelerator, in main memory, or on a disk."""
    nvme_path: str | None = _option("nvme_path", _is_path)
    """The folder for ``nvme``."""
    pin_memory: bool | None = _option("pin_memory", _is_bool)
    """Page-locked main memory. DeepSpeed's default: true."""
    buffer_count: int | None = _option("buffer_count", _at_least(1))
    """``nvme``: buffers."""
    buffer_size: int | None = _option("buffer_size", _at_least(1))
    """``nvme``: elements a buffer; at least as many as the largest parameter."""
    max_in_cpu: int | None = _option("max_in_cpu", _at_least(0))
    """``nvme``: elements kept in main memory."""


@dataclass
class Communication(Section):
    """How gradients and parameters travel between the ranks."""

    name = "communication"

    dtype: Literal["fp32", "bf16", "fp16"] | None = _option("/communication_data_type", _one_of("fp32", "bf16", "fp16"))
    """Of gradients on the wire; by default that of the gradients (fp32 under ``bf16-mixed``)."""
    overlap: bool | None = _option("overlap_comm", _is_bool)
    """Reduce while the backward goes on (stages 2, 3). DeepSpeed's default: true at stage 3."""
    reduce_bucket: int | None = _option("reduce_bucket_size", _at_least(1))
    """Elements reduced at once: a buffer of that size is kept. Default: 200 million, or all that there are."""
    allgather_bucket: int | None = _option("allgather_bucket_size", _at_least(1))
    """Elements gathered at once (stages 1, 2). Default: as above."""
    contiguous_gradients: bool | None = _option("contiguous_gradients", _is_bool)
    """Copy gradients to one buffer as they come, against fragmented memory. DeepSpeed's default: true."""
    reduce_scatter: bool | None = _option("reduce_scatter", _is_bool)
    """Reduce each part to its rank only. DeepSpeed's default: true."""
    round_robin_gradients: bool | None = _option("round_robin_gradients", _is_bool)
    """Spread the copying of gradients to main memory over the ranks (stages 1, 2, with offload)."""


@dataclass
class Stage3(Section):
    """How parameters are gathered and let go of (stage 3)."""

    name = "stage3"

    persistence_threshold: int | None = _option("stage3_param_persistence_threshold", _at_least(0))
    """Parameters with fewer elements are kept whole on every rank. DeepSpeed's default: 100,000."""
    max_live_parameters: int | None = _option("stage3_max_live_parameters", _at_least(0))
    """Elements that may be whole at once. DeepSpeed's default: 1 billion."""
    max_reuse_distance: int | None = _option("stage3_max_reuse_distance", _at_least(0))
    """Keep a parameter that is used again within so many elements. DeepSpeed's default: 1 billion."""
    prefetch_bucket: int | None = _option("stage3_prefetch_bucket_size", _at_least(0))
    """Elements fetched ahead of use. DeepSpeed's default: 50 million."""
    sub_group_size: int | None = _option("sub_group_size", _at_least(1))
    """Elements stepped at once; smaller ones bound what ``nvme`` keeps in memory. DeepSpeed's default: 1 billion."""
    module_granularity_threshold: int | None = _option("stage3_module_granularity_threshold", _at_least(0))
    """Modules with fewer parameters a submodule are fetched as one. DeepSpeed's default: 0, none."""


@dataclass
class ZeROPlusPlus(Section):
    """ZeRO++: less on the wire at stage 3."""

    name = "zero_plus_plus"

    quantized_weights: bool | None = _option("zero_quantized_weights", _is_bool)
    """Gather parameters in 8 bits (CUDA only; not with ``bf16-mixed``)."""
    quantized_nontrainable_weights: bool | None = _option("zero_quantized_nontrainable_weights", _is_bool)
    """Also keep frozen parameters in 8 bits (CUDA only)."""
    quantized_gradients: bool | None = _option("zero_quantized_gradients", _is_bool)
    """Reduce gradients in 4 bits (CUDA only)."""
    hpz_partition_size: int | None = _option("zero_hpz_partition_size", _at_least(1))
    """Ranks that hold a second copy of the parameters between them, for the backward: those of one machine."""


@dataclass
class ZenFlow(Section):
    """ZenFlow: with the optimizer offloaded, step the important gradients on the GPU and the rest later on the CPU."""

    name = "zenflow"
    within = ("zero_optimization", "zenflow")

    topk_ratio: float = _option("topk_ratio", _between(0, 1, open_low=True, open_high=True), 0.1)
    """The fraction of gradient columns that are important."""
    update_interval: int = _option("update_interval", _at_least(1), 4)
    """Batches between two steps of the rest."""
    select_interval: int = _option("select_interval", _at_least(1), 16)
    """Batches between two choices of what is important; at least ``update_interval``."""
    full_warm_up_rounds: int | None = _option("full_warm_up_rounds", _at_least(0))
    """Batches at the start in which everything is stepped."""
    overlap_step: bool | None = _option("overlap_step", _is_bool)
    """Step the rest while the GPU goes on."""
    offload: bool | None = _option("offload", _is_bool)
    """Keep the state of the important part in main memory too."""
    reserved_cores: float | None = _option("pt_reserved_cores_perc", _between(0, 1))
    """The fraction of the CPU's cores that stay with PyTorch."""

    def leaves(self) -> Iterator[tuple[tuple[str, ...], str, Any]]:
        """As in the other sections; DeepSpeed's own choice by epochs needs its data loader."""
        yield from super().leaves()
        yield (*self.within, "select_strategy"), f"{self.name}.select_strategy", "step"


def zero_bytes(
    parameters: int,
    stage: int,
    ranks: int,
    *,
    parameter_bytes: float = 4,
    gradient_bytes: float | None = None,
    state_bytes: float = 8,
    trainable: int | None = None,
    master: bool = True,
) -> dict[str, float]:
    """The bytes of a rank's states under ZeRO, by kind, without what is padding, buffers or offloaded.

    ``lightning-accel plan`` is made of it.

    Args:
        parameters: Elements of the whole module.
        stage: 0 (DDP), 1, 2 or 3.
        ranks: How many ranks share the states.
        parameter_bytes: Bytes an element: 4, or 2 under ``bf16-true``.
        gradient_bytes: The same of a gradient; None for as many.
        state_bytes: Bytes of optimizer state an element: 8 for Adam in fp32, 4 for SGD with momentum, 0 for SGD.
        trainable: Elements that are trained; None for all.
        master: Whether there is a fp32 master copy beside the parameters: ZeRO always keeps one, DDP none.

    Returns:
        ``parameters``, ``gradients``, ``master`` and ``state``, in bytes.
    """
    trainable = parameters if trainable is None else trainable
    split = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    return {
        "parameters": parameters * parameter_bytes / split[0],
        "gradients": trainable * (parameter_bytes if gradient_bytes is None else gradient_bytes) / split[1],
        "master": trainable * 4 / split[2] if stage and master else 0.0,
        "state": trainable * state_bytes / split[2],
    }


Offload = TypeVar("Offload", OffloadOptimizer, OffloadParameters)


def with_path(section: Offload | None, nvme_path: str | None) -> Offload | None:
    """The section with the folder that both share, where it needs one and has none."""
    if section is None or section.device != "nvme" or section.nvme_path:
        return section
    return replace(section, nvme_path=nvme_path)
