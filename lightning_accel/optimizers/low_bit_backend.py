"""Which backend keeps the low-bit state of an optimizer: what is asked, what each can do, and which one suits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_accel.errors import require
from lightning_accel.optimizers.adam_pieces import takes_pieces
from lightning_accel.optimizers.bitsandbytes_state import bitsandbytes_missing, bitsandbytes_refusal, paged_refusal
from lightning_accel.optimizers.kernels import triton_on
from lightning_accel.optimizers.low_bit_plan import BITS, say_bits
from lightning_accel.optimizers.torchao_state import TORCHAO_BLOCKS, fits_blocks, torchao_missing, torchao_refusal

__all__ = ["BACKENDS", "Wish", "asked_refusal", "choose_backend"]

BACKENDS = ("bitsandbytes", "generic", "torchao")
_OWN = "its own kernels take the step of Adam"


@dataclass(frozen=True)
class Wish:
    """What is asked of a backend besides the optimizer's maths.

    Attributes:
        low: The parameters whose state is to be in few bits, and those bits.
        rounds: Whether bfloat16 parameters are rounded at random.
        save_32bit: Whether checkpoints have the moments decoded.
        paged: Whether state is paged between the memory of the GPU and main memory.
    """

    low: Mapping[Tensor, int | str]
    rounds: bool = False
    save_32bit: bool = False
    paged: bool = False

    @property
    def bits(self) -> list[int | str]:
        """The numbers of bits that are asked for."""
        return [bits for bits in BITS if bits in self.low.values()]


def choose_backend(optimizer: Optimizer, wish: Wish) -> tuple[str, str]:
    """The backend that suits an optimizer, and why; only bitsandbytes pages."""
    backend = "bitsandbytes" if wish.bits == [8] else "torchao"
    if reason := _cannot(optimizer, backend, wish):
        return "generic", reason
    own = all(takes_pieces(type(optimizer), group) for group in optimizer.param_groups) and all(
        parameter.dtype is torch.float32 and triton_on(parameter.device) is not None for parameter in wish.low
    )
    if any(group.get("fused") for group in optimizer.param_groups):
        return "generic", _OWN if own else f"it keeps the fused step, which {backend} does not have"
    devices = sorted({parameter.device.type for parameter in _parameters(optimizer)})
    if "cpu" in devices:
        return "generic", "on the CPU it is as fast or faster"
    if own and backend == "torchao":
        return "generic", _OWN
    missing = bitsandbytes_missing if backend == "bitsandbytes" else torchao_missing
    for device in devices:
        if reason := missing(device):
            return "generic", reason
    if backend == "bitsandbytes":
        return backend, "its kernels compute the same maths"
    if not all(fits_blocks(parameter, bits) for parameter, bits in wish.low.items()):
        return "generic", "the blocks of torchao must be whole"
    return backend, "its compiled step computes the same maths"


def asked_refusal(optimizer: Optimizer, backend: str, wish: Wish) -> str:
    """Why a backend that was asked for can't do what is asked, and the way out; or an empty string.

    Raises:
        ImportError: If it is not installed.
    """
    if backend == "generic":
        return ""
    require(backend, backend, f"LowBitOptimizer(backend={backend!r})")
    reason = _cannot(optimizer, backend, wish)
    if wish.paged and (reason := reason or paged_refusal(optimizer)):
        return f"LowBitOptimizer(paged=True) can't work here: {reason}. Leave out `paged`."
    return f"LowBitOptimizer(backend={backend!r}) can't work here: {reason}. Use backend='generic'." if reason else ""


def _cannot(optimizer: Optimizer, backend: str, wish: Wish) -> str:
    """Why bitsandbytes or torchao can't do what is asked, or an empty string."""
    if not wish.low:
        return "nothing is in few bits"
    known = [8] if backend == "bitsandbytes" else TORCHAO_BLOCKS
    if others := [bits for bits in wish.bits if bits not in known]:
        return f"{backend} has no {say_bits(others[0])}"
    if wish.rounds:
        return f"{backend} does not round at random by a seed"
    if backend == "torchao":
        fits = any(fits_blocks(parameter, bits) for parameter, bits in wish.low.items())
        return torchao_refusal(optimizer) or ("" if fits else "no parameter is made of whole blocks of torchao")
    if wish.save_32bit:
        return "bitsandbytes saves its codes alone"
    if reason := bitsandbytes_refusal(optimizer):
        return reason
    sharded = any(isinstance(parameter, DTensor) for parameter in _parameters(optimizer))
    return "bitsandbytes has no kernels for sharded parameters" if sharded else ""


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
