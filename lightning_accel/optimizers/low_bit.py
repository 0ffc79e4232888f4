"""LowBitOptimizer: the moments of the user's optimizer in few bits instead of 32, without changing its maths.

Adam keeps two numbers a parameter, 8 bytes; in blocks of 256 with one scale each they take 2.03 bytes ("8-bit
Optimizers via Block-wise Quantization", Dettmers et al. 2022, https://arxiv.org/abs/2110.02861). The user's optimizer
is changed in place when the strategy has it made, by the kernels of bitsandbytes where those compute the same maths, or
by a wrapper around the optimizer's own step, which works for every class. 4 bits are those of Li, Chen, Zhu 2023 (https://arxiv.org/abs/2309.01507).
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
from lightning_accel.optimizers.low_bit_plan import BITS, LowBitPlan, refusal, say_bits, without_moments
from lightning_accel.optimizers.quantized_state import quantize_optimizer_

__all__ = ["LowBitOptimizer", "choose_backend"]

_SHARDED = (
    "it splits and gathers the optimizer's state by the shape of the parameters, which the blocks do not have. Use "
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
    """Keep the moments of every optimizer in few bits, with that optimizer's own maths.

    Args:
        bits: Bits a moment: 8, 4, ``"fp8"`` (float8_e4m3fn) or ``"bf16"``. 32 leaves the run as it is, and turns the
            state of a low-bit checkpoint back when it is resumed.
        backend: ``"bitsandbytes"``, ``"generic"`` (the wrapper of this package) or ``"auto"``, which takes bitsandbytes
            on a GPU where it is installed and computes the same maths, and the wrapper elsewhere. The choice is said in
            one line, and kept in :attr:`choices`.
        min_size: Parameters with fewer elements keep their state in 32 bits.
        keep_32bit: Regular expressions; parameters in whose name one is found keep their state in 32 bits.
        bits_for: Regular expressions of names, and the bits of the parameters in whose name one is found; the first one
            counts. Anything but 8 bits or 32 needs the generic backend.
        keep_embeddings: Whether the weights of ``torch.nn.Embedding`` and ``EmbeddingBag`` keep their state in 32 bits,
            unless ``bits_for`` names them: their rows get gradients of very different sizes.
        stochastic_rounding: Whether parameters in bfloat16 are stepped in float32 and rounded up or down at random, so
            that small updates are not lost, without master weights.
        seed: Of that rounding; the draws follow from it and the step.
        save_32bit: Whether checkpoints have the moments decoded, in 32 bits, so that a run without this callback can go
            on from them.
        moments: For an optimizer that is not torch's own: more names of its state to quantise, and whether each may be
            negative. State under names that are neither here nor torch's is never quantised.

    Attributes:
        choices: One line an optimizer: what was done to it and why.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a wrong value.

    Example:
        >>> LowBitOptimizer(bits=4, bits_for={"head": 32}).bits
        4
    """

    contract = Contract(
        purpose="Keep the optimizer's moments in few bits instead of 32, with its own maths.",
        touches=frozenset({"optimizer"}),
        acts="every optimizer step",
        expects="optimizer memory / 4 in 8 bits, / 7.5 in 4",
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
        bits: Literal[8, 4, "fp8", "bf16", 32] = 8,
        backend: Literal["auto", "bitsandbytes", "generic"] = "auto",
        min_size: int = 4096,
        keep_32bit: list[str] | None = None,
        moments: dict[str, Literal["signed", "unsigned"]] | None = None,
        bits_for: dict[str, Literal[8, 4, "fp8", "bf16", 32]] | None = None,
        keep_embeddings: bool = True,
        stochastic_rounding: bool = False,
        seed: int = 0,
        save_32bit: bool = False,
    ) -> None:
        self.bits = _check_bits("bits", bits)
        self.backend = check_choice("backend", backend, ("auto", "bitsandbytes", "generic"))
        self.min_size = check_int("min_size", min_size, minimum=1)
        self._keep = check_patterns("keep_32bit", [] if keep_32bit is None else keep_32bit)
        if bits_for is not None and not isinstance(bits_for, dict):
            raise TypeError(f"Expected `bits_for` to be a dict of regular expressions to bits, but got {bits_for!r}.")
        patterns = check_patterns("bits_for", list(bits_for or {}))
        self._bits_for = {
            pattern: _check_bits(f"bits_for[{pattern.pattern!r}]", value)
            for pattern, value in zip(patterns, (bits_for or {}).values(), strict=True)
        }
        flags = {
            "keep_embeddings": keep_embeddings,
            "stochastic_rounding": stochastic_rounding,
            "save_32bit": save_32bit,
        }
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"Expected `{name}` to be a bool, but got {flag!r}.")
        self._seed = check_int("seed", seed, minimum=0) if stochastic_rounding else None
        self._keep_embeddings, self._save_32bit = keep_embeddings, save_32bit
        for name, sign in (moments or {}).items():
            check_choice(f"moments[{name!r}]", sign, ("signed", "unsigned"))
        self._moments = {name: sign == "signed" for name, sign in (moments or {}).items()}
        self.choices: list[str] = []
        super().__init__(
            bits=bits,
            backend=backend,
            min_size=min_size,
            keep_32bit=keep_32bit or [],
            moments=moments or {},
            bits_for=bits_for or {},
            seed=seed,
            **flags,
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
        for argument, patterns in (("keep_32bit", self._keep), ("bits_for", tuple(self._bits_for))):
            for pattern in patterns:
                if not any(pattern.search(name) for name in names.values()):
                    raise ValueError(
                        f"Expected each of `{argument}` to match a parameter, but {pattern.pattern!r} matches none of "
                        "them."
                    )
        if type(optimizer).__module__.startswith("bitsandbytes."):
            self.warn_no_effect(f"{type(optimizer).__name__} is an optimizer of bitsandbytes itself.")
            return optimizer
        if reason := refusal(optimizer):
            raise MisconfigurationException(f"LowBitOptimizer can't work with this optimizer: {reason}.")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        rounds = self._rounds(optimizer, parameters)
        reason = without_moments(optimizer)
        if reason and not rounds:
            self.warn_no_effect(f"{reason}.")
            return optimizer
        chosen = self._chosen(names)
        plan = LowBitPlan(self.min_size, self.bits, chosen)
        low = [parameter for parameter in parameters if plan.is_low_bit(parameter)]
        if self.bits != 32 and not low and not rounds:
            self.warn_no_effect(
                f"all {len(parameters)} parameters of {type(optimizer).__name__} have fewer than {self.min_size} "
                "elements (`min_size`) or are named by `keep_32bit`, or are embeddings (`keep_embeddings`)."
            )
            return optimizer
        found = [bits for bits in BITS if any(plan.bits_of(parameter) == bits for parameter in low)]
        only_generic = self._only_generic(found, bool(rounds))
        backend, reason = self._backend(optimizer, only_generic)
        if backend == "bitsandbytes":
            keep = {parameter for parameter in parameters if chosen.get(parameter) == 32}
            use_bitsandbytes_(optimizer, self.min_size, keep, names, rank_zero_info)
        else:
            quantize_optimizer_(
                optimizer,
                self.min_size,
                moments=self._moments,
                names=names,
                say=rank_zero_info,
                warn=warn_without_moments,
                bits=self.bits,
                chosen=chosen,
                seed=self._seed if rounds else None,
                save_32bit=self._save_32bit,
            )
        share = sum(map(torch.numel, low)) / max(1, sum(map(torch.numel, parameters)))
        choice = (
            f"{type(optimizer).__name__} in {' and '.join(map(say_bits, found or [32]))} by the {backend} backend "
            f"({reason}): {len(low)} of {len(parameters)} parameters, {share:.1%} of the elements"
        )
        if rounds:
            choice += f"; {len(rounds)} bfloat16 parameters rounded at random"
        self.choices.append(choice)
        rank_zero_info(f"LowBitOptimizer: {choice}")
        return optimizer

    def _chosen(self, names: Mapping[torch.nn.Parameter, str]) -> dict[torch.Tensor, int | str]:
        """The parameters whose bits are not ``bits``."""
        chosen: dict[torch.Tensor, int | str] = {}
        if self._keep_embeddings and self.module is not None:
            layers = self.module.modules()
            embeddings = (layer for layer in layers if isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag)))
            chosen = {layer.weight: 32 for layer in embeddings}
        for parameter, name in names.items():
            if matches_any(self._keep, name):
                chosen[parameter] = 32
            elif (bits := next((b for pattern, b in self._bits_for.items() if pattern.search(name)), None)) is not None:
                chosen[parameter] = bits
        return chosen

    def _rounds(self, optimizer: Optimizer, parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """The parameters that are rounded at random."""
        if self._seed is None:
            return []
        rounds = [parameter for parameter in parameters if parameter.dtype is torch.bfloat16]
        if not rounds:
            self.warn_no_effect(
                "`stochastic_rounding` is for parameters in bfloat16, and there are none. Use "
                "Trainer(precision='bf16-true')."
            )
        elif not type(optimizer).__module__.startswith("torch.optim."):
            raise MisconfigurationException(
                f"LowBitOptimizer(stochastic_rounding=True) can't work with {type(optimizer).__name__}: what else its "
                "step does to a parameter is not known. Use an optimizer of torch.optim, or leave it out."
            )
        return rounds

    def _only_generic(self, found: list[int | str], rounds: bool) -> str:
        """What only the generic backend can do, or an empty string."""
        if others := [bits for bits in found if bits != 8]:
            return f"only it has {say_bits(others[0])}"
        if not found:
            return "nothing is in few bits"
        if rounds:
            return "only it rounds at random"
        return "only it saves the moments in 32 bits" if self._save_32bit else ""

    def _backend(self, optimizer: Optimizer, only_generic: str) -> tuple[str, str]:
        if self.backend == "auto":
            return ("generic", only_generic) if only_generic else choose_backend(optimizer)
        if self.backend == "bitsandbytes":
            if only_generic:
                raise MisconfigurationException(
                    f"LowBitOptimizer(backend='bitsandbytes') can't do this: {only_generic}, the generic backend. Use "
                    "backend='generic'."
                )
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


def _check_bits(name: str, bits: Any) -> int | str:
    if isinstance(bits, bool) or not isinstance(bits, (int, str)) or (isinstance(bits, str) and bits.isdecimal()):
        raise TypeError(f"Expected `{name}` to be one of {', '.join(map(repr, BITS))}, but got {bits!r}.")
    checked: int | str = check_choice(name, bits, BITS)
    return checked


def _is_sharded(optimizer: Optimizer) -> bool:
    return any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"])


def warn_without_moments(message: str) -> None:
    """Warn on rank 0 that an optimizer turned out to keep nothing to quantise."""
    rank_zero_warn(f"LowBitOptimizer has no effect: {message}", category=NoEffectWarning)
