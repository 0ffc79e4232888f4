"""The pages of the strategies name every argument, and every option."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.zero import ZeROStrategy
from lightning_accel.strategies.zero_config import (
    Communication,
    OffloadOptimizer,
    OffloadParameters,
    Section,
    Stage3,
    ZenFlow,
    ZeROPlusPlus,
)


def rows(repo: Path, page: str) -> list[list[str]]:
    """The cells of the tables' rows."""
    lines = (repo / "docs" / "strategies" / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


@pytest.mark.parametrize(("strategy", "page"), [(ZeROStrategy, "zero.md"), (FullyShardStrategy, "fully_shard.md")])
def test_every_argument_is_in_the_table(repo: Path, strategy: type, page: str) -> None:
    named = [name for cells in rows(repo, page) if len(cells) == 4 for name in cells[0].replace("`", "").split(", ")]
    assert sorted(named) == sorted(set(inspect.signature(strategy).parameters))


@pytest.mark.parametrize("section", [OffloadOptimizer, OffloadParameters, Communication, Stage3, ZeROPlusPlus, ZenFlow])
def test_every_option_is_named(repo: Path, section: type[Section]) -> None:
    found = [cells[1] for cells in rows(repo, "zero.md") if cells[0] == f"`{section.name}`" and len(cells) == 2]
    assert found == [", ".join(f"`{option.name}`" for option in section.options())]
