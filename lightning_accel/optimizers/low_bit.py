"""LowBitOptimizer: the moments of the user's optimizer in few bits instead of 32, without changing its maths.

Adam keeps two numbers a parameter, 8 bytes; in blocks of 256 with one scale each they take 2.03 bytes ("8-bit
Optimizers via Block-wise Quantization", Dettmers et al. 2022, https://arxiv.org/abs/2110.02861). The user's optimizer
is changed in place when the strategy has it made, by the kernels of bitsandbytes or of torchao where those compute the
same maths, or by a wrapper around the optimizer's own step, which works for every class. 4 bits are those of Li, Chen,
Zhu 2023 (https://arxiv.org/abs/2309.01507).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_accel.errors import NoEffectWarning, check_choice, check_int, check_patterns, matches_any
from lightning_accel.hooks import Contract, OptimizerTransform
from lightning_accel.optimizers.bitsandbytes_state import use_bitsandbytes_
from lightning_accel.optimizers.kernels import why_no_triton
from lightning_accel.optimizers.low_bit_backend import BACKENDS, Wish, asked_refusal, choose_backend
from lightning_accel.optimizers.low_bit_plan import BITS, LowBitPlan, refusal, say_bits, without_moments
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from lightning_accel.optimizers.torchao_state import use_torchao_

__all__ = ["LowBitOptimizer"]

_SHARDED = (
    "it splits and gathers the optimizer's state by the shape of the parameters, which the blocks do not have. Use "
    "strategy='accel_fsdp2' or 'accel_ddp', or leave LowBitOptimizer out."
)


class LowBitOptimizer(OptimizerTransform):
    """Keep the moments of every optimizer in few bits, with that optimizer's own maths.

    Args:
        bits: Bits a moment: 8, 4, ``"fp8"`` (float8_e4m3fn) or ``"bf16"``. 32 leaves the run as it is, and turns the
            state of a low-bit checkpoint back when it is resumed.
        backend: ``"bitsandbytes"``, ``"torchao"``, ``"generic"`` (the wrapper of this package) or ``"auto"``, which on
            a GPU takes bitsandbytes for 8 bits and torchao for 4 and fp8, where they are installed and compute the same
            maths, and the wrapper elsewhere. The choice is said in one line, and kept in :attr:`choices`.
        min_size: Parameters with fewer elements keep their state in 32 bits.
        keep_32bit: Regular expressions; parameters in whose name one is found keep their state in 32 bits.
        bits_for: Regular expressions of names, and the bits of the parameters in whose name one is found; the first one
            counts.
        keep_embeddings: Whether the weights of ``torch.nn.Embedding`` and ``EmbeddingBag`` keep their state in 32 bits,
            unless ``bits_for`` names them: their rows get gradients of very different sizes.
        stochastic_rounding: Whether parameters in bfloat16 are stepped in float32 and rounded up or down at random, so
            that small updates are not lost, without master weights.
        seed: Of that rounding; the draws follow from it and the step.
        save_32bit: Whether checkpoints have the moments decoded, in 32 bits, so that a run without this callback can go
            on from them.
        moments: For an optimizer that is not torch's own: more names of its state to quantise, and whether each may be
            negative. State under names that are neither here nor torch's is never quantised.
        paged: Whether the state moves to main memory when the memory of a CUDA GPU is full, by bitsandbytes; for Adam
            and AdamW in 8 bits. It is an error where there is nothing to page.

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
            "hold, and its checkpoints are split by element, which 8-bit blocks are not. Use "
            "`ZeroRedundancyStrategy()`, which splits the state by whole parameters, or leave LowBitOptimizer out.",
        },
        accepts=frozenset({"FullyShardStrategy"}),
    )

    def __init__(
        self,
        bits: Literal[8, 4, "fp8", "bf16", 32] = 8,
        backend: Literal["auto", "bitsandbytes", "generic", "torchao"] = "auto",
        min_size: int = 4096,
        keep_32bit: list[str] | None = None,
        moments: dict[str, Literal["signed", "unsigned"]] | None = None,
        bits_for: dict[str, Literal[8, 4, "fp8", "bf16", 32]] | None = None,
        keep_embeddings: bool = True,
        stochastic_rounding: bool = False,
        seed: int = 0,
        save_32bit: bool = False,
        paged: bool = False,
    ) -> None:
        self.bits = _check_bits("bits", bits)
        self.backend = check_choice("backend", backend, ("auto", *BACKENDS))
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
            "paged": paged,
        }
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"Expected `{name}` to be a bool, but got {flag!r}.")
        self._seed = check_int("seed", seed, minimum=0) if stochastic_rounding else None
        if paged and (backend not in ("auto", "bitsandbytes") or bits != 8):
            raise ValueError(
                f"Expected `paged` to be False with backend={backend!r} and bits={bits!r}, but got True: bitsandbytes "
                "pages state in 8 bits."
            )
        self._keep_embeddings, self._save_32bit, self._paged = keep_embeddings, save_32bit, paged
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
            ImportError: If a library was asked for that is not installed.
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
        library = type(optimizer).__module__.partition(".")[0]
        if library in ("bitsandbytes", "torchao"):
            self.warn_no_effect(f"{type(optimizer).__name__} is an optimizer of {library} itself.")
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
        asked = {parameter: plan.bits_of(parameter) for parameter in parameters if plan.is_low_bit(parameter)}
        if self.bits != 32 and not asked and not rounds:
            self.warn_no_effect(
                f"all {len(parameters)} parameters of {type(optimizer).__name__} have fewer than {self.min_size} "
                "elements (`min_size`) or are named by `keep_32bit`, or are embeddings (`keep_embeddings`)."
            )
            return optimizer
        wish = Wish(asked, bool(rounds), self._save_32bit, self._paged)
        if self.backend == "auto" and not self._paged:
            backend, reason = choose_backend(optimizer, wish)
        else:
            backend, reason = self.backend, "as asked for"
            if self.backend == "auto":
                backend, reason = "bitsandbytes", "only it pages"
            if refused := asked_refusal(optimizer, backend, wish):
                raise MisconfigurationException(refused)
        # bits of small parameters, and of other optimizers', may be such as the backend does not have
        chosen = {parameter: bits for parameter, bits in chosen.items() if bits == 32 or parameter in asked}
        changed = self._apply(backend, optimizer, chosen, names, bool(rounds))
        low = [parameter for parameter in asked if changed.low_bit.is_low_bit(parameter)]
        share = sum(map(torch.numel, low)) / max(1, sum(map(torch.numel, parameters)))
        choice = (
            f"{type(optimizer).__name__} in {' and '.join(map(say_bits, wish.bits or [32]))} by the {backend} backend "
            f"({reason}): {len(low)} of {len(parameters)} parameters, {share:.1%} of the elements"
        )
        if len(low) < len(asked):
            choice += f"; {len(asked) - len(low)} stay in 32 bits, since they are no whole blocks of {backend}"
        slow = next((parameter.device for parameter in asked if parameter.device.type == "cuda"), None)
        if backend == "generic" and slow is not None and (reason := why_no_triton(slow)):
            choice += f"; coded by tensor operations, which are slow on a GPU: {reason}"
        if rounds:
            choice += f"; {len(rounds)} bfloat16 parameters rounded at random"
        self.choices.append(choice)
        rank_zero_info(f"LowBitOptimizer: {choice}")
        return optimizer

    def _apply(
        self,
        backend: str,
        optimizer: Optimizer,
        chosen: dict[torch.Tensor, int | str],
        names: Mapping[torch.nn.Parameter, str],
        rounds: bool,
    ) -> Any:
        """Change the optimizer in place, and return it."""
        common: dict[str, Any] = {"min_size": self.min_size, "names": names, "say": rank_zero_info}
        if backend == "bitsandbytes":
            keep = [parameter for parameter, bits in chosen.items() if bits == 32]
            return use_bitsandbytes_(optimizer, keep=keep, paged=self._paged, **common)
        common |= {"bits": self.bits, "chosen": chosen, "save_32bit": self._save_32bit}
        if backend == "torchao":
            return use_torchao_(optimizer, **common)
        seed = self._seed if rounds else None
        return quantize_optimizer_(optimizer, moments=self._moments, warn=warn_without_moments, seed=seed, **common)

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


def _check_bits(name: str, bits: Any) -> int | str:
    if isinstance(bits, bool) or not isinstance(bits, (int, str)) or (isinstance(bits, str) and bits.isdecimal()):
        raise TypeError(f"Expected `{name}` to be one of {', '.join(map(repr, BITS))}, but got {bits!r}.")
    checked: int | str = check_choice(name, bits, BITS)
    return checked


def warn_without_moments(message: str) -> None:
    """Warn on rank 0 that an optimizer turned out to keep nothing to quantise."""
    rank_zero_warn(f"LowBitOptimizer has no effect: {message}", category=NoEffectWarning)
