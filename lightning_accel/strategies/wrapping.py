"""Which modules of a model become blocks: the units that fully sharded training gathers and frees one at a time.

A good block is a layer that the model repeats, and that is always *called*: its parameters are there only while its
``forward`` runs. So by size only the items of a ``Sequential``, ``ModuleList`` or ``ModuleDict`` are taken (whatever
uses them iterates over them and calls them), never a layer that stands alone, whose weight may be read by other code
without a call. What is in no block belongs to the root, whose parameters are there during the whole step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any, Literal

from torch import nn

from lightning_accel.errors import check_int, check_patterns

__all__ = ["AUTO_SIZE", "check_blocks", "choose_blocks", "group_parameters"]

AUTO_SIZE = 1_000_000
"""Parameters that a block of ``blocks="auto"`` has at least; gathering less at a time costs more than it saves."""

Blocks = Literal["auto"] | int | list[str]
_LISTS = (nn.ModuleList, nn.ModuleDict)  # without a forward, so that they can be no blocks themselves


def check_blocks(blocks: Any) -> Blocks:
    """Return ``blocks`` as it is kept.

    Raises:
        TypeError: If it is neither ``"auto"``, an int nor a list of strings.
        ValueError: If it is an int below 1, or an entry is neither a class's name nor a regular expression.
    """
    if blocks == "auto":
        return "auto"
    if isinstance(blocks, int):
        return check_int("blocks", blocks, minimum=1)
    if isinstance(blocks, str):
        raise ValueError(f"Expected `blocks` to be 'auto', an int or a list of names, but got {blocks!r}.")
    check_patterns("blocks", blocks)
    return list(blocks)


def choose_blocks(module: nn.Module, blocks: Blocks = "auto") -> tuple[dict[str, nn.Module], list[str]]:
    """Choose the blocks of a module.

    Args:
        module: The whole model, which is never a block itself.
        blocks: Names of classes and regular expressions for whole names of modules; or the number of parameters that a
            repeated layer must have at least; or ``"auto"``: the classes in ``_no_split_modules`` of models of
            transformers, and elsewhere repeated layers of at least :data:`AUTO_SIZE` parameters.

    Returns:
        The blocks by name, outer ones before those inside them; and one sentence for each part of ``blocks`` that could
        not be followed.
    """
    blocks = check_blocks(blocks)
    notes = []
    if blocks == "auto":
        blocks = sorted(_declared_classes(module)) or AUTO_SIZE
    if isinstance(blocks, int):
        chosen = dict(_repeated_layers(module, blocks))
        if not chosen:
            notes.append(f"no repeated layer (an item of a Sequential or ModuleList) has {blocks:,} parameters or more")
    else:
        matched: dict[str, set[str]] = {
            pattern: {name for name, item in _candidates(module) if _is_named(item, name, pattern)}
            for pattern in blocks
        }
        notes += [
            f"`blocks` {pattern!r} is neither the class nor the whole name of a module with parameters"
            for pattern in blocks
            if not matched[pattern]
        ]
        chosen = {name: item for name, item in module.named_modules() if name in set().union(*matched.values())}
    split = _split_sharers(module, chosen)
    if split:
        names = ", ".join(split)
        notes.append(f"parameters in {names} are shared with modules outside of it, without which it can't be gathered")
    return {name: item for name, item in chosen.items() if name not in split}, notes


def group_parameters(module: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, int]:
    """Count the parameters that are gathered together: those of each block without the blocks inside it, and the rest.

    The rest is at the key ``""``.
    """
    counted: set[nn.Parameter] = set()
    sizes = {}
    for name in reversed(["", *blocks]):  # inner blocks before outer ones
        parameters = set((blocks[name] if name else module).parameters()) - counted
        counted |= parameters
        sizes[name] = sum(parameter.numel() for parameter in parameters)
    return sizes


def _declared_classes(module: nn.Module) -> set[str]:
    """What models of transformers say of themselves: the layers that are not to be torn apart."""
    found: set[str] = set()
    for item in module.modules():
        found.update(getattr(item, "_no_split_modules", None) or ())
    return found & {type(item).__name__ for item in module.modules()}


def _candidates(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, item in module.named_modules():
        if name and not isinstance(item, _LISTS) and any(True for _ in item.parameters()):
            yield name, item


def _is_named(module: nn.Module, name: str, pattern: str) -> bool:
    return pattern == type(module).__name__ or re.fullmatch(pattern, name) is not None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _repeated_layers(module: nn.Module, size: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost repeated layers of at least ``size`` parameters.

    The outermost, since the parts of a layer (a mixture's experts) may be called on some ranks only, and a rank that
    gathers alone waits for ever.
    """
    items = dict(module.named_children())
    repeats = Counter(type(item) for item in items.values())
    for name, item in items.items():
        is_item = isinstance(module, (nn.Sequential, *_LISTS)) and not isinstance(item, _LISTS)
        is_leaf = not any(True for _ in item.children())
        if is_item and (is_leaf or repeats[type(item)] > 1) and _size(item) >= size:
            yield prefix + name, item
        else:
            yield from _repeated_layers(item, size, f"{prefix}{name}.")


def _split_sharers(module: nn.Module, blocks: dict[str, nn.Module]) -> list[str]:
    """The blocks that have some of the places of a shared parameter, or a shared module, but not all of them."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for item in module.modules():
        for parameter in item.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(item)
    inside = {name: set(block.modules()) for name, block in blocks.items()}
    split: set[str] = set()
    for places in owners.values():
        holders = [name for name in blocks if places & inside[name]]
        split.update(name for name in holders if not places <= inside[name])
        for one, other in combinations(holders, 2):
            if not (inside[one] <= inside[other] or inside[other] <= inside[one]):  # one module in two blocks
                split.update((one, other))
    return [name for name in blocks if name in split]
