"""What may import what, and who may touch the Trainer's private names, read from the source of every module.

The layers, from the bottom: ``errors``, ``schedules`` and pure functions (torch only) <- ``hooks`` <- the methods'
folders <- ``report``, ``tuning`` <- ``cli`` and the package's ``__init__``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

PACKAGE = "lightning_accel"
BASE = {"errors", "schedules"}
METHODS = {
    "accumulation",
    "augment",
    "compression",
    "durability",
    "finetuning",
    "optimizers",
    "pruning",
    "strategies",
}
ABOVE_METHODS = {"report", "tuning"}
TOP = {"", "cli", "__main__"}
OPTIONAL = {
    "bitsandbytes",
    "deepspeed",
    "kornia",
    "mlxtend",
    "onnx",
    "onnxruntime",
    "optuna",
    "peft",
    "ray",
    "schedulefree",
    "sklearn",
    "torchao",
    "torchdata",
}
# In the base dependencies, but slow to import, and most runs never need them; the report and the command line print
# with rich.
LAZY = {"matplotlib", "rich"}
TRAINER = {"trainer", "pl_module", "lightning_module", "datamodule", "strategy", "owner", "automatic_optimization"}


def part_of(module: str) -> str:
    """The first name below the package: ``lightning_accel.augment.mixup`` -> ``augment``."""
    return module.partition(".")[2].partition(".")[0]


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every name that import statements bring in, dotted: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: neither function bodies nor ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def names_in_chain(node: ast.AST) -> set[str]:
    """The names of ``a.b.c`` or ``a.b().c``."""
    names = set()
    while True:
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Name):
            return names | {node.id}
        else:
            return names


def of_trainer(node: ast.AST) -> bool:
    return any(name in TRAINER or name.endswith(("loop", "connector")) for name in names_in_chain(node))


def import_breaches(module: str, tree: ast.AST) -> Iterator[str]:
    """Imports that point up or sideways."""
    part = part_of(module)
    named = [name for _, name in imports(tree)]
    uses_lightning = any(name.split(".")[0] in {"lightning", "pytorch_lightning", "lightning_fabric"} for name in named)
    uses_hooks = any(part_of(name) == "hooks" for name in named if name.startswith(f"{PACKAGE}."))
    # a strategy is a subclass of one of Lightning's, and may need nothing of the hooks
    pure = part in BASE or (part in METHODS - {"strategies"} and not uses_hooks)
    if pure and uses_lightning:
        yield "imports Lightning, but is no callback: pure functions know torch only"
    for name in named:
        if name.split(".")[0] != PACKAGE or name == f"{PACKAGE}.__version__" or part in TOP:
            continue
        target = part_of(name)
        if part in BASE:
            allowed = BASE
        elif part == "hooks":
            allowed = BASE | {"hooks"}
        elif part in METHODS:
            allowed = BASE | {"hooks", part}
        elif part in ABOVE_METHODS:
            allowed = BASE | {"hooks", part} | METHODS
        else:
            yield f"{part!r} has no layer: add it to this test"
            return
        if target not in allowed:
            yield f"imports {name}, which is not below it"


def optional_breaches(module: str, tree: ast.AST) -> Iterator[str]:
    """Optional or heavy dependencies that load with the module."""
    forbidden = OPTIONAL | (LAZY - {"rich"} if part_of(module) in {"report", "cli"} else LAZY)
    for node in at_import(tree):
        named = [name for _, name in imports(node)] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "require"}:
            named = [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        for name in named:
            if name.split(".")[0] in forbidden:
                yield f"imports {name} when it is imported itself: do that where it is used"


def private_breaches(module: str, tree: ast.AST) -> Iterator[str]:
    """Private names of the Trainer and what belongs to it, outside ``hooks``."""
    if part_of(module) == "hooks":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and of_trainer(node.value):
            yield f"line {node.lineno}: touches {ast.unparse(node)}: that belongs in hooks"
        if isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            name = node.args[1].value
            if isinstance(name, str) and private(name) and of_trainer(node.args[0]):
                yield f"line {node.lineno}: touches {ast.unparse(node.args[0])}.{name}: that belongs in hooks"
    for node, name in imports(tree):
        if name.split(".")[0] == "lightning" and any(map(private, name.split("."))):
            yield f"line {node.lineno}: imports the private {name}: that belongs in hooks"


def breaches(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    return [*import_breaches(module, tree), *optional_breaches(module, tree), *private_breaches(module, tree)]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted((REPO / PACKAGE).rglob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_layers(module: str) -> None:
    assert breaches(module, FILES[module].read_text()) == []


WRONG = {
    "errors know no hooks": ("errors", "from lightning_accel.hooks import Moment", "not below it"),
    "schedules know no Lightning": ("schedules", "import lightning.pytorch", "no callback"),
    "nor inside a function": ("schedules", "def f():\n    from lightning import Trainer", "no callback"),
    "a pure function knows no Lightning": ("augment.mixup", "from lightning.pytorch import Trainer", "no callback"),
    "hooks know no method": ("hooks.plan", "from lightning_accel.pruning.masks import x", "not below it"),
    "methods do not know each other": ("pruning.gradual", "import lightning_accel.augment.mixup", "not below it"),
    "not for types either": (
        "pruning.gradual",
        "if TYPE_CHECKING:\n    from lightning_accel.optimizers.low_bit import LowBitOptimizer",
        "not below it",
    ),
    "methods do not know the report": ("pruning.gradual", "from lightning_accel.report import x", "not below it"),
    "the report does not know the command line": ("report.x", "from lightning_accel.cli.main import main", "not below"),
    "nothing imports the flat API from inside": (
        "report.x",
        "from lightning_accel import BatchAugmentation",
        "not below",
    ),
    "a new folder needs a layer": ("magic.x", "import lightning_accel.errors", "has no layer"),
    "optional at import": ("optimizers.low_bit", "import bitsandbytes as bnb", "imports bitsandbytes when"),
    "optional from": ("augment.x", "from kornia.augmentation import X", "imports kornia.augmentation.X when"),
    "optional in a class body": ("augment.x", "class X:\n    import kornia", "imports kornia when"),
    "optional through a call": ("augment.x", "k = require('kornia', 'kornia', 'X')", "imports kornia when"),
    "plots are lazy": ("report.plots", "import matplotlib.pyplot as plt", "imports matplotlib.pyplot when"),
    "rich is lazy below the report": ("hooks.plan", "from rich.table import Table", "imports rich.table.Table when"),
    "a private name of the Trainer": ("pruning.x", "trainer._data_connector", "belongs in hooks"),
    "of self.trainer": ("pruning.x", "self.trainer.fit_loop.epoch_loop._batches_that_stepped", "belongs in hooks"),
    "of a loop in a variable": ("pruning.x", "def f(epoch_loop):\n    epoch_loop._x()", "belongs in hooks"),
    "through getattr": ("pruning.x", "getattr(pl_module, '_fabric')", "belongs in hooks"),
    "through patch": ("pruning.x", "self.patch(trainer.strategy, '_setup_model', f)", "belongs in hooks"),
    "a private import": ("cli.x", "from lightning.pytorch.trainer.connectors import _a", "the private"),
    "a private module": ("cli.x", "from lightning._internal import a", "the private"),
}
RIGHT = {
    "a callback knows Lightning": ("augment.x", "from lightning_accel.hooks import X\nfrom lightning import Trainer"),
    "a strategy knows Lightning": ("strategies.x", "from lightning.pytorch.strategies import DDPStrategy"),
    "its own folder": ("augment.x", "from lightning_accel.augment.mixup import mixup_batch"),
    "optional where it is used": ("optimizers.low_bit", "def f():\n    import bitsandbytes"),
    "optional for types": ("optimizers.low_bit", "if TYPE_CHECKING:\n    import bitsandbytes"),
    "its own private names": ("pruning.gradual", "self._masks = self._trainer_state"),
    "hooks touch the Trainer": ("hooks.batch", "trainer._data_connector"),
    "the report prints with rich": ("report.text", "from rich.table import Table"),
    "the version": ("report.x", "from lightning_accel import __version__"),
    "the command line knows all": ("cli.x", "import lightning_accel.report.receipt, lightning_accel.pruning.gradual"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_breach_is_seen(what: str) -> None:
    module, source, message = WRONG[what]
    found = breaches(f"{PACKAGE}.{module}", source)
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_right_is_let_through(what: str) -> None:
    module, source = RIGHT[what]
    assert breaches(f"{PACKAGE}.{module}", source) == []
