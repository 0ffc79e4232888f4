"""Importing the package imports Lightning and registers the strategies; no optional package is imported."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

import lightning_accel
from lightning_accel.strategies.registry import STRATEGY_NAMES, register_strategies
from tests.test_layers import LAZY, OPTIONAL

STEPS = """
import importlib, json, sys
found = []
def step(): found.append(sorted(sys.modules))
import lightning.pytorch, lightning.pytorch.cli
step()
import lightning_accel
step()
from lightning_accel import *
step()
importlib.reload(lightning_accel)
print(json.dumps(found))
"""
OURS_FIRST = """
import lightning_accel
import lightning
print(type(lightning.Trainer(strategy="accel_ddp", accelerator="cpu", devices=1, logger=False).strategy).__name__)
"""


def in_python(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def steps() -> list[set[str]]:
    """The modules after importing Lightning, the package beside it, and every public name."""
    return [set(modules) for modules in json.loads(in_python(STEPS))]


@pytest.mark.slow
def test_the_package_imports_lightning_and_no_method(steps: list[set[str]]) -> None:
    """Beside Lightning it is a few small modules, so that it costs no more than Lightning does."""
    lightning, package, _ = steps
    new = package - lightning
    assert {name for name in new if name.startswith("lightning_accel")} == {
        "lightning_accel",
        "lightning_accel.errors",
        "lightning_accel.strategies",
        "lightning_accel.strategies.registry",
        "lightning_accel.strategies.zero_config",
    }
    # The rest is of Python and Lightning themselves
    assert not {name.partition(".")[0] for name in new} & (OPTIONAL | LAZY | {"numpy", "torchmetrics"})


@pytest.mark.slow
def test_all_public_names_import_no_optional_package(steps: list[set[str]]) -> None:
    """What torch or Lightning import by themselves where it is installed does not count."""
    lightning, _, everything = steps
    assert "lightning_accel.pruning.gradual" in everything
    new = {name.partition(".")[0] for name in everything - lightning}
    assert not new & (OPTIONAL | {"matplotlib"})


@pytest.mark.slow
def test_the_names_are_known_where_the_package_is_imported_first() -> None:
    assert in_python(OURS_FIRST) == "RestartableDDPStrategy"


def test_the_names_are_known_and_another_import_leaves_them() -> None:
    assert set(STRATEGY_NAMES) <= set(StrategyRegistry.available_strategies())
    before = {name: StrategyRegistry[name] for name in STRATEGY_NAMES}
    register_strategies()
    assert all(StrategyRegistry[name] is before[name] for name in STRATEGY_NAMES)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("accel_ddp", "RestartableDDPStrategy"),
        ("accel_fsdp2", "FullyShardStrategy"),
        ("accel_fsdp2_offload", "FullyShardStrategy"),
    ],
)
def test_trainer_takes_the_names(name: str, made: str) -> None:
    trainer = Trainer(strategy=name, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is getattr(lightning_accel, made)
    assert getattr(trainer.strategy, "offload", False) is name.endswith("offload")


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_every_name_makes_a_public_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With deepspeed, and without it, where only the others name the extra."""
    if importlib.util.find_spec("deepspeed") or not name.startswith("accel_zero"):
        assert type(StrategyRegistry.get(name)).__name__ in lightning_accel.__all__
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    if name.startswith("accel_zero") and name != "accel_zero1":
        with pytest.raises(ImportError, match=r"pip install 'lightning-accel\[deepspeed\]'"):
            StrategyRegistry.get(name)
    else:
        assert type(StrategyRegistry.get(name)).__name__ in lightning_accel.__all__


@pytest.mark.parametrize("name", ["no_such_name", "torch"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'lightning_accel' has no attribute '{name}'"):
        getattr(lightning_accel, name)
    assert set(lightning_accel.__all__) <= set(dir(lightning_accel))
