"""What importing the package costs: nothing until a name is used, and never an optional package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_layers import OPTIONAL


def imported(code: str) -> set[str]:
    """The modules that a new process has imported after running ``code``."""
    command = [sys.executable, "-W", "ignore", "-c", f"{code}\nimport sys\nprint('\\n', *sys.modules, sep=' ')"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_the_package_alone_imports_neither_torch_nor_lightning() -> None:
    modules = imported("import lightning_accel")
    assert "lightning_accel" in modules
    assert not modules & {"torch", "lightning", "numpy", "lightning_accel.hooks"}


def test_all_public_names_import_no_optional_package() -> None:
    modules = imported("from lightning_accel import *")
    assert "lightning_accel.pruning.gradual" in modules
    assert not {module.partition(".")[0] for module in modules} & (OPTIONAL - {"torchdata"})


@pytest.mark.parametrize("name", ["no_such_name", "torch"])
def test_an_unknown_name(name: str) -> None:
    import lightning_accel

    with pytest.raises(AttributeError, match=f"module 'lightning_accel' has no attribute '{name}'"):
        getattr(lightning_accel, name)
    assert set(lightning_accel.__all__) <= set(dir(lightning_accel))
