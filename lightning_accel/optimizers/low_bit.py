"""LowBitOptimizer: the moments of the user's optimizer in 8 bits instead of 32, without changing its maths.

Adam keeps two numbers a parameter, 8 bytes; in blocks of 256 with one scale each they take 2.03 bytes ("8-bit
Optimizers via Block-wise Quantization", Dettmers et al. 2022, https://arxiv.org/abs/2110.02861). The user's optimizer
is changed in place when the strategy has it made, by the kernels of bitsandbytes where those compute the same maths, or
by a wrapper around the optimizer's own step, which works for every class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_accel.errors import NoEffectWarning, check_choice, check_int, check_patterns, matches_any, require
from lightning_accel.hooks import Contract, OptimizerTransform
from lightning_accel.optimizers.bitsandbytes_state import bitsandbytes_missing, bitsandbytes_refusal, use_bitsandbytes_
from lightning_accel.optimizers.quantized_state import LowBitPlan, quantize_optimizer_, refusal, without_moments

__all__ = ["LowBitOptimizer", "choose_backend"]

_SHARDED = (
    "it splits and gathers the optimizer's state by the shape of the parameters, which 8-bit blocks do not have. Use "
    "strategy='accel_fsdp2' or 'accel_ddp', or leave LowBitOptimizer out."
)
_NO_KERNELS = "bitsandbytes has no kernels for sharded parameters"


def choose_backend(optimizer: Optimizer) -> tuple[str, str]:
    """The backend that suits an optimizer, and why."""
    if reason := bitsandbytes_refusal(optimizer):
        return "generic", reason
    if _is_sharded(optimizer):
        return "generic", _NO_KERNELS
    if any(group.get("fused") for group in optimizer.param_groups):
        return "generic", "it keeps the fused step, which bitsandbytes does not have"
    devices = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
    if "cpu" in devices:
        return "generic", "on the CPU it is as fast or faster"
    for device in sorted(devices):
        if reason := bitsandbytes_missing(device):
            return "generic", reason
    return "bitsandbytes", "its kernels compute the same maths"


class LowBitOptimizer(OptimizerTransform):
    """Keep the moments of every optimizer in 8 bits, with that optimizer's own maths.

    Args:
        bits: Bits a moment; 8 is the only choice.
        backend: ``"bitsandbytes"``, ``"generic"`` (the wrapper of this package) or ``"auto"``, which takes bitsandbytes
            on a GPU where it is installed and computes the same maths, and the wrapper elsewhere. The choice is said in
            one line, and kept in :attr:`choices`.
        min_size: Parameters with fewer elements keep their state in 32 bits.
        keep_32bit: Regular expressions; parameters in whose name one is found keep their state in 32 bits. Layers whose
            gradients differ much from row to row, such as embeddings, are the ones to name.
        moments: For an optimizer that is not torch's own: more names of its state to quantise, and whether each may be
            negative. State under names that are neither here nor torch's is never quantised.

    Attributes:
        choices: One line an optimizer: what was done to it and why.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a wrong value.

    Example:
        >>> LowBitOptimizer(keep_32bit=["embedding"]).state_key
        "LowBitOptimizer{'bits': 8, 'backend': 'auto', 'min_size': 4096, 'keep_32bit': ['embedding'], 'moments': {}}"
    """

    contract = Contract(
        purpose="Keep the optimizer's moments in 8 bits instead of 32, with its own maths.",
        touches=frozenset({"optimizer"}),
        acts="every optimizer step",
        expects="optimizer memory / 4",
        docs="methods/low_bit_optimizer",
        after=frozenset({"FusedOptimizer"}),
        once=True,
        refuses={
            "FSDPStrategy": _SHARDED,
            "ModelParallelStrategy": _SHARDED,
            "DeepSpeedStrategy": "its flat partitions run across parameters, where `min_size` and `keep_32bit` can't "
            "hold, and its checkpoints are split by element, which 8-bit blocks are not. Use `strategy='ddp'`, or "
            "leave LowBitOptimizer out.",
        },
        accepts=frozenset({"FullyShardStrategy"}),
    )

    def __init__(
        self,
        bits: int = 8,
        backend: Literal["auto", "bitsandbytes", "generic"] = "auto",
        min_size: int = 4096,
        keep_32bit: list[str] | None = None,
        moments: dict[str, Literal["signed", "unsigned"]] | None = None,
    ) -> None:
        self.bits = check_choice("bits", check_int("bits", bits), (8,))
        self.backend = check_choice("backend", backend, ("auto", "bitsandbytes", "generic"))
        self.min_size = check_int("min_size", min_size, minimum=1)
        self._keep = check_patterns("keep_32bit", [] if keep_32bit is None else keep_32bit)
        for name, sign in (moments or {}).items():
            check_choice(f"moments[{name!r}]", sign, ("signed", "unsigned"))
        self._moments = {name: sign == "signed" for name, sign in (moments or {}).items()}
        self.choices: list[str] = []
        super().__init__(
            bits=bits, backend=backend, min_size=min_size, keep_32bit=keep_32bit or [], moments=moments or {}
        )

    def install(self, trainer: Any, pl_module: Any) -> None:
        """Start the list of choices anew and wrap ``configure_optimizers``."""
        self.choices = []
        super().install(trainer, pl_module)

    def transform_optimizer(self, optimizer: Optimizer, names: Mapping[torch.nn.Parameter, str]) -> Optimizer:
        """Quantise the state of one optimizer in place.

        Raises:
            ImportError: If bitsandbytes was asked for and is not installed.
            MisconfigurationException: If its state can't be quantised, or not by the backend that was asked for.
            ValueError: If an expression of ``keep_32bit`` matches no parameter.
        """
        for pattern in self._keep:
            if not any(pattern.search(name) for name in names.values()):
                raise ValueError(
                    f"Expected each of `keep_32bit` to match a parameter, but {pattern.pattern!r} matches none of them."
                )
        if type(optimizer).__module__.startswith("bitsandbytes."):
            self.warn_no_effect(f"{type(optimizer).__name__} is an optimizer of bitsandbytes itself.")
            return optimizer
        if reason := refusal(optimizer):
            raise MisconfigurationException(f"LowBitOptimizer can't work with this optimizer: {reason}.")
        if reason := without_moments(optimizer):
            self.warn_no_effect(f"{reason}.")
            return optimizer
        keep = {parameter for parameter, name in names.items() if matches_any(self._keep, name)}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        plan = LowBitPlan(self.min_size, set(keep))
        low = [parameter for parameter in parameters if plan.is_low_bit(parameter)]
        if not low:
            self.warn_no_effect(
                f"all {len(parameters)} parameters of {type(optimizer).__name__} have fewer than {self.min_size} "
                "elements (`min_size`) or are named by `keep_32bit`."
            )
            return optimizer
        backend, reason = self._backend(optimizer)
        if backend == "bitsandbytes":
            use_bitsandbytes_(optimizer, self.min_size, keep, names, rank_zero_info)
        else:
            quantize_optimizer_(
                optimizer, self.min_size, keep, self._moments, names, rank_zero_info, warn_without_moments
            )
        share = sum(map(torch.numel, low)) / sum(map(torch.numel, parameters))
        choice = (
            f"{type(optimizer).__name__} in {self.bits} bits by the {backend} backend ({reason}): "
            f"{len(low)} of {len(parameters)} parameters, {share:.1%} of the elements"
        )
        self.choices.append(choice)
        rank_zero_info(f"LowBitOptimizer: {choice}")
        return optimizer

    def _backend(self, optimizer: Optimizer) -> tuple[str, str]:
        if self.backend == "auto":
            return choose_backend(optimizer)
        if self.backend == "bitsandbytes":
            require("bitsandbytes", "bitsandbytes", "LowBitOptimizer(backend='bitsandbytes')")
            if reason := bitsandbytes_refusal(optimizer):
                raise MisconfigurationException(
                    f"LowBitOptimizer(backend='bitsandbytes') would change the maths of {type(optimizer).__name__}: "
                    f"{reason}. Use backend='generic', which keeps it."
                )
            if _is_sharded(optimizer):
                raise MisconfigurationException(
                    f"LowBitOptimizer(backend='bitsandbytes') can't work here: {_NO_KERNELS}. Use backend='generic'."
                )
        return self.backend, "as asked for"


def _is_sharded(optimizer: Optimizer) -> bool:
    return any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"])


def warn_without_moments(message: str) -> None:
    """Warn on rank 0 that an optimizer turned out to keep nothing to quantise."""
    rank_zero_warn(f"LowBitOptimizer has no effect: {message}", category=NoEffectWarning)
