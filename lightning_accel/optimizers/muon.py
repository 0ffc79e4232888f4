"""Muon: step the matrices of hidden layers along the orthogonalised momentum, the rest as the module's optimizer does.

Momentum of a matrix is dominated by few directions; making its singular values equal lets the rare ones be learned as
fast. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; with the learning rate and weight decay of AdamW
left as they are: Liu et al. 2025, "Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982. The maths is
that of ``torch.optim.Muon``.

One optimizer stays one optimizer: the object, its groups, schedulers and checkpoints are those of the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.errors import check_choice, check_int, check_number, check_patterns, matches_any
from lightning_accel.hooks import Contract, OptimizerTransform, parameter_names
from lightning_accel.optimizers.low_bit_plan import hooked, refusal, retype_, view_of, without_hooks

__all__ = ["Muon", "hidden_matrices", "use_muon_"]

_WHOLE = "orthogonalising needs whole matrices on every rank: use `strategy='ddp'` or `strategy='accel_ddp'`."


def hidden_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable matrices of hidden layers: all that are no embedding, nor tied to one, nor the last linear layer's.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))
        >>> list(hidden_matrices(net))
        ['1.weight']
    """
    outer = {layer.weight for layer in module.modules() if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))}
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    outer |= {layer.weight for layer in linear[-1:]}
    return {
        name: parameter
        for parameter, name in parameter_names(module).items()
        if parameter.dim() == 2 and parameter.requires_grad and parameter not in outer
    }


def use_muon_(optimizer: Optimizer, matrices: Sequence[Tensor], **options: Any) -> Optimizer:
    """Have an optimizer step some of its matrices as ``torch.optim.Muon`` does, in place.

    Learning rates are those of the parameter groups at each step, and so is decoupled weight decay.

    Args:
        optimizer: Any that takes one step at a time.
        matrices: Of two dimensions, from its groups.
        **options: Of ``torch.optim.Muon``: ``momentum``, ``nesterov``, ``ns_steps``, ``adjust_lr_fn`` ...; or
            ``weight_decay``, in the place of the groups' own.

    Returns:
        The same object.

    Raises:
        ImportError: If torch has no Muon.
        ValueError: If the optimizer can't be changed.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"Muon needs torch >= 2.9, but this is torch {torch.__version__}: pip install -U torch.")
    if isinstance(optimizer, MuonStep):
        raise ValueError(f"Expected an optimizer without Muon, but this {type(optimizer).__name__} has it already.")
    if reason := refusal(optimizer):
        raise ValueError(f"Expected an optimizer that Muon can be put beside, but {reason}.")
    inner = torch.optim.Muon(matrices, **options)
    for parameter in matrices:
        optimizer.state.pop(parameter, None)  # some make it at once
    base = type(optimizer)
    # The name stays, since loggers and LearningRateMonitor show it
    cls = type(base.__name__, (MuonStep, base), {"__module__": __name__, "_base": base})
    retype_(optimizer, cls, muon=inner, matrices=set(matrices), muon_decays="weight_decay" not in options)
    return optimizer


class MuonStep(Optimizer):
    """What :func:`use_muon_` puts before an optimizer's own class."""

    muon: Any
    matrices: set[Tensor]
    muon_decays: bool
    _base: type[Optimizer]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take both steps with the gradients of one closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [self._matrices_of(group) for group in self.param_groups]
        matrices = [parameter for group in groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in matrices]
        for parameter in matrices:
            parameter.grad = None  # an optimizer passes over parameters without a gradient
        without_hooks(self._base.step)(self)
        for parameter, gradient in zip(matrices, gradients, strict=True):
            parameter.grad = gradient
        without_hooks(torch.optim.Muon.step)(view_of(self.muon, torch.optim.Muon, groups, state=self.state))
        return loss

    def _matrices_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group of Muon's, with the matrices of one of the optimizer's, and its rate and decay."""
        (settings,) = self.muon.param_groups
        own = {**settings, "params": [item for item in group["params"] if item in self.matrices], "lr": group["lr"]}
        return {**own, "weight_decay": group.get("weight_decay", 0.0)} if self.muon_decays else own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; what an optimizer without Muon kept of a matrix is dropped, with a warning."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        ours = {number: item for number, item in zip(numbers, parameters, strict=False) if item in self.matrices}
        others = {number: state for number, state in state_dict["state"].items() if number not in ours}
        self._base.load_state_dict(self, {**state_dict, "state": others})  # which knows nothing of a matrix's state
        dropped = 0
        for number, parameter in ours.items():
            saved = state_dict["state"].get(number, {})
            if "momentum_buffer" in saved:
                self.state[parameter] = {"momentum_buffer": saved["momentum_buffer"].to(parameter, copy=True)}
            else:
                dropped += bool(saved)
        if dropped:
            rank_zero_warn(
                f"The checkpoint was saved without Muon: the momentum of {dropped} matrices begins afresh, and what "
                f"{type(self).__name__} had for them is dropped."
            )


MuonStep.step = hooked(MuonStep.step)  # type: ignore[method-assign]


class Muon(OptimizerTransform):
    """Step the matrices of hidden layers by Muon, and everything else by the module's own optimizer.

    Args:
        include: Regular expressions for the names of the matrices. ``None``: all but those of embeddings, what is tied
            to them, and the last linear layer. An empty list is off.
        exclude: Regular expressions for the names of matrices to leave to the module's optimizer.
        momentum: In [0, 1).
        nesterov: Whether the momentum looks ahead.
        weight_decay: Decoupled, as in AdamW; ``None``: that of the matrix's parameter group.
        adjust_lr: ``"match_rms_adamw"`` scales updates to the size of AdamW's, so that its learning rate serves;
            ``"original"`` scales by ``sqrt(max(1, rows / columns))``, for rates of about 0.02.
        ns_steps: Newton-Schulz iterations of a step.

    Attributes:
        choices: One line an optimizer: what Muon steps.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value, or (when training starts) a pattern matches no matrix.
        ImportError: If torch is older than 2.9 (when training starts).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Muon(exclude=["pos_emb"])], logger=False, enable_checkpointing=False)
    """

    contract: ClassVar[Contract] = Contract(
        purpose="Step the matrices of hidden layers along the orthogonalised momentum (Muon).",
        touches=frozenset({"optimizer"}),
        acts="every optimizer step",
        expects="fewer steps to a loss; half of Adam's state for the matrices",
        docs="methods/muon",
        after=frozenset({"FusedOptimizer"}),
        once=True,
        refuses={
            "FSDPStrategy": _WHOLE,
            "ModelParallelStrategy": _WHOLE,
            "DeepSpeedStrategy": _WHOLE,
            "ZeroRedundancyStrategy": _WHOLE,
            "LowBitOptimizer": "Muon keeps one moment in full precision, and no second one. Remove one of them.",
        },
    )

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float | None = None,
        adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        ns_steps: int = 5,
    ) -> None:
        self._include = None if include is None else check_patterns("include", include)
        self._exclude = () if exclude is None else check_patterns("exclude", exclude)
        if not isinstance(nesterov, bool):
            raise TypeError(f"Expected `nesterov` to be a bool, but got {nesterov!r}.")
        self.options: dict[str, Any] = {
            "momentum": check_number("momentum", momentum, 0, 1, open_high=True),
            "nesterov": nesterov,
            "adjust_lr_fn": check_choice("adjust_lr", adjust_lr, ("match_rms_adamw", "original")),
            "ns_steps": check_int("ns_steps", ns_steps, minimum=1),
        }
        if weight_decay is not None:
            self.options["weight_decay"] = check_number("weight_decay", weight_decay, 0, 1)
        super().__init__(
            include=include,
            exclude=exclude,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            adjust_lr=adjust_lr,
            ns_steps=ns_steps,
        )
        self.choices: list[str] = []

    @property
    def is_neutral(self) -> bool:
        """Whether no matrix is to be included."""
        return self._include == ()

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``configure_optimizers``, unless it is switched off."""
        self.choices = []
        if not self.is_neutral:
            super().install(trainer, pl_module)

    def transform_optimizer(self, optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Optimizer:
        """Put Muon beside one optimizer, in place; say what it steps, or warn that there is nothing."""
        chosen = self._choose(names)
        here = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter in chosen]
        name = type(optimizer).__name__
        if not here:
            self.warn_no_effect(f"{name} has no matrices of hidden layers. Name some with `include`.")
            return optimizer
        try:
            use_muon_(optimizer, here, **self.options)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__} can't work with {name}: {error}") from error
        count = sum(parameter.numel() for parameter in here)
        rest = sum(len(group["params"]) for group in optimizer.param_groups) - len(here)
        choice = f"{len(here)} matrices of {count:,} numbers by Muon, {rest} other parameters by {name}"
        self.choices.append(choice)
        rank_zero_info(f"Muon: {choice}")
        return optimizer

    def _choose(self, names: Mapping[nn.Parameter, str]) -> set[nn.Parameter]:
        assert self.module is not None
        if self._include is None:
            chosen = {parameter: name for name, parameter in hidden_matrices(self.module).items()}
        else:
            chosen = {parameter: name for parameter, name in names.items() if matches_any(self._include, name)}
            if wrong := [name for parameter, name in chosen.items() if parameter.dim() != 2]:
                raise ValueError(f"Expected `include` to match matrices, but {wrong[0]} has not two dimensions.")
        for argument, patterns in (("include", self._include or ()), ("exclude", self._exclude)):
            for pattern in patterns:
                if not any(pattern.search(name) for name in names.values()):
                    raise ValueError(
                        f"Expected `{argument}` to match parameters, but {pattern.pattern!r} matches none."
                    )
        return {parameter for parameter, name in chosen.items() if not matches_any(self._exclude, name)}
