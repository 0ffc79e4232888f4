"""Which parameters of a module to prune, and how much of each is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.errors import check_patterns, matches_any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PrunedLayer", "Selection", "report_layers", "report_table", "select_weights"]

_PRUNED_MODULES = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class PrunedLayer:
    """One row of the report of what was pruned."""

    name: str
    """The parameter's dotted name."""
    shape: tuple[int, ...]
    """Its shape."""
    num_elements: int
    """How many elements it has."""
    num_nonzeros: int
    """How many of them are not zero."""
    frozen: bool = False
    """Whether it was left alone because it isn't trained."""

    @property
    def sparsity(self) -> float:
        """The fraction of its elements that are zero, in [0, 1]."""
        return 1 - self.num_nonzeros / self.num_elements if self.num_elements else 0.0


class Selection(NamedTuple):
    """What :func:`select_weights` found, by dotted name."""

    weights: dict[str, nn.Parameter]
    """The parameters to prune."""
    frozen: dict[str, nn.Parameter]
    """Those that match but are not trained, and are left alone."""
    unmatched: list[str]
    """The patterns of ``exclude`` that match no parameter."""


def select_weights(module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Selection:
    """Pick the parameters of ``module`` to prune; a shared parameter once, under its first name.

    Args:
        module: Any module. The ``_orig_mod.`` of compiled submodules is left out of the names.
        include: Regular expressions (``re.search``) for the names of floating-point parameters. ``None`` picks the
            weights (not the biases) of linear, bilinear, convolution and attention layers, except those shared with an
            embedding.
        exclude: Regular expressions for names to leave alone.

    Raises:
        ValueError: If a pattern of ``include`` matches no floating-point parameter.
    """
    included = None if include is None else check_patterns("include", include)
    excluded = check_patterns("exclude", exclude)
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            if parameter.is_floating_point():
                owners.setdefault(parameter, []).append((name.replace("_orig_mod.", ""), owner))
    names = [name for uses in owners.values() for name, _ in uses]
    for pattern in included or ():
        if not any(map(pattern.search, names)):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else ".")
            raise ValueError(
                f"Expected every pattern of `include` to match a parameter, but got {pattern.pattern!r}, which matches "
                f"none of: {shown}"
            )
    weights: dict[str, nn.Parameter] = {}
    frozen: dict[str, nn.Parameter] = {}
    for parameter, uses in owners.items():
        wanted = _is_default(parameter, uses) if included is None else any(matches_any(included, n) for n, _ in uses)
        if wanted and not any(matches_any(excluded, name) for name, _ in uses):
            (weights if parameter.requires_grad else frozen)[uses[0][0]] = parameter
    unmatched = [pattern.pattern for pattern in excluded if not any(map(pattern.search, names))]
    return Selection(weights, frozen, unmatched)


def _is_default(parameter: nn.Parameter, uses: Sequence[tuple[str, nn.Module]]) -> bool:
    return (
        parameter.dim() >= 2
        and any(isinstance(owner, _PRUNED_MODULES) for _, owner in uses)
        and not any(isinstance(owner, _EMBEDDINGS) for _, owner in uses)
    )


def report_layers(weights: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> list[PrunedLayer]:
    """Count what is zero in every parameter."""
    return [
        PrunedLayer(
            name, tuple(tensor.shape), tensor.numel(), int(torch.count_nonzero(tensor.detach())), kind is frozen
        )
        for kind in (weights, frozen)
        for name, tensor in kind.items()
    ]


def report_table(layers: Sequence[PrunedLayer], title: str) -> Table:
    """The report as a table for the terminal; the last row is the sum of the layers that were pruned."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("parameter", overflow="fold")
    for heading in ("shape", "non-zeros", "sparsity"):
        table.add_column(heading, justify="right")
    pruned = [layer for layer in layers if not layer.frozen]
    total = PrunedLayer(
        f"{len(pruned)} pruned", (), sum(x.num_elements for x in pruned), sum(x.num_nonzeros for x in pruned)
    )
    for layer in [*layers, total]:
        if layer is total:
            table.add_section()
        table.add_row(
            layer.name,
            "x".join(map(str, layer.shape)),
            f"{layer.num_nonzeros:,} of {layer.num_elements:,}",
            "frozen, left alone" if layer.frozen else f"{layer.sparsity:.4f}",
        )
    return table
