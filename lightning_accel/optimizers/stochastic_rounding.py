"""Rounding to bfloat16 at random, so that on average a small update is not lost.

bfloat16 has 8 bits of precision: rounded to the nearest, an update below 1/512 of a weight leaves it as it is. Rounded
up or down with the probability of its distance, the weight moves by the update on average ("Revisiting BFloat16
Training", Zamirai et al. 2020, https://arxiv.org/abs/2010.06192), without master weights in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_accel.optimizers.low_bit_plan import LowBitPlan

__all__ = ["generator_for", "round_to_bfloat16_"]


def generator_for(plan: LowBitPlan, parameter: Tensor, step: int) -> torch.Generator:
    """The draws of one parameter in one step: of the seed, the place of the parameter and the step alone.

    All ranks draw the same, so that replicas stay equal.
    """
    place = plan.order.setdefault(parameter, len(plan.order))  # where another was put into a group in its place
    mixed = ((plan.seed or 0) * 1_000_003 + place) * 1_000_003 + step
    return torch.Generator(parameter.device).manual_seed(mixed % 2**63)


@torch.no_grad()
def round_to_bfloat16_(target: Tensor, value: Tensor, generator: torch.Generator) -> Tensor:
    """Write float32 values into a bfloat16 tensor, each rounded up or down at random; on average it is the value.

    Args:
        target: Of dtype bfloat16.
        value: Of dtype float32, of the same shape.
        generator: For the draws, on the same device.

    Returns:
        ``target``.

    Example:
        >>> target, value = torch.zeros(10_000).bfloat16(), torch.full((10_000,), 1.001)
        >>> round(round_to_bfloat16_(target, value, torch.Generator().manual_seed(0)).double().mean().item(), 3)
        1.001
    """
    draws = torch.randint(2**16, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    # the bits below those of a bfloat16 carry into it with the probability that they stand for
    bits = value.contiguous().view(torch.int32) + draws
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return target.copy_(torch.where(value.isfinite(), rounded, value.bfloat16()))
