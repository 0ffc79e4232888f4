"""Every code block of the README and of every page under docs/ is run, or checked for a reason that the page gives.

The convention is written down in CONTRIBUTING.md ("Code in the documentation"). In short: the blocks of a page run in
order, in one namespace and one empty directory; a block with ``title="file"`` is also written to that file first; and
``<!-- not run: REASON -->`` above a fence turns running into checking.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import itertools
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel
import lightning_accel.augment
from tests.conftest import REPO
from tests.forking import python

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

PAGES = [path.relative_to(REPO).as_posix() for path in sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md")])]
MODULES = [
    path.relative_to(REPO).with_suffix("").as_posix().replace("/", ".")
    for path in sorted(REPO.glob("lightning_accel/**/*.py"))
    if ">>>" in path.read_text()
]
NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>.*?)\s*-->")
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})\s*(?P<language>[\w+-]*)(?P<rest>.*)$")
# Not code of ours: what a command printed, a diagram.
PLAIN = {"text"}


@dataclass
class Block:
    """One fenced block. ``line`` is that of its first line of code, from 1."""

    page: str
    line: int
    language: str
    title: str | None
    not_run: str | None
    code: str

    def fail(self, message: str) -> None:
        pytest.fail(f"{self.page}:{self.line}: {message}", pytrace=False)


def read_blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a Markdown page."""
    blocks, lines, above, index = [], text.splitlines(), "", 0
    while index < len(lines):
        opening = FENCE.match(lines[index])
        if opening is None:
            above = lines[index] if lines[index].strip() else above
            index += 1
            continue
        end = next(
            (i for i in range(index + 1, len(lines)) if re.match(rf"^ *{opening['ticks']}\s*$", lines[i])), len(lines)
        )
        indent = len(opening["indent"])
        title = re.search(r'title="([^"]+)"', opening["rest"])
        reason = NOT_RUN.search(above)
        code = "\n".join(line[indent:] for line in lines[index + 1 : end]) + "\n"
        blocks.append(
            Block(page, index + 2, opening["language"], title and title[1], reason and reason["reason"], code)  # type: ignore[arg-type]
        )
        above, index = "", end + 1
    return blocks


def is_slow(page: str) -> bool:
    """Whether a page starts processes that import torch, and is left out of `make quick`."""
    blocks = read_blocks(page, (REPO / page).read_text())
    return any(re.search(r"^(lightning-accel|python) ", block.code, re.MULTILINE) for block in blocks)


class TinyModule(LightningModule):
    """The ``module`` of the pages: an ordinary classifier of 3x8x8 images into 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(288, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def ready_names() -> dict[str, Any]:
    """What a page may use without defining it."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(32, 3, 8, 8, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    )
    loader = DataLoader(data, batch_size=8)
    return {"module": TinyModule(), "train_loader": loader, "val_loader": loader}


class Page:
    """Runs the blocks of one page in the current directory."""

    def __init__(self, page: str) -> None:
        self.module = types.ModuleType(f"docs_page_{re.sub(r'[^a-z0-9]', '_', page.lower())}")
        vars(self.module).update(ready_names())

    def run(self, block: Block) -> None:
        if not block.language:
            block.fail("the fence names no language (`text` for what a command printed)")
        if block.not_run == "":
            block.fail("`not run` needs a reason")
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.code)
        kind = {"py": "python", "yml": "yaml", "sh": "bash", "shell": "bash", "console": "bash"}.get(
            block.language, block.language
        )
        if kind in PLAIN:
            return
        action = getattr(self, f"run_{kind}", None)
        if action is None:
            block.fail(f"no way to check a {block.language!r} block")
        else:
            action(block)

    def run_python(self, block: Block) -> None:
        tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
        code = compile(tree, block.page, "exec")
        if block.not_run:
            return
        if block.title:  # a file: import it, so that its classes have the dotted path that a YAML names
            sys.modules.pop(Path(block.title).stem, None)
            vars(self.module).update(vars(importlib.import_module(Path(block.title).stem)))
        else:
            sys.modules[self.module.__name__] = self.module
            exec(code, vars(self.module))

    def run_json(self, block: Block) -> None:
        json.loads(block.code)

    def run_toml(self, block: Block) -> None:
        if tomllib is not None:
            tomllib.loads(block.code)

    def run_yaml(self, block: Block) -> None:
        config = yaml.safe_load(block.code)
        if isinstance(config, list):  # an excerpt of the callbacks
            config = {"trainer": {"callbacks": config}}
        if not isinstance(config, dict):
            block.fail("neither a list of callbacks nor a configuration")
        try:
            check_config(config, instantiate=not block.not_run)
        except (SystemExit, ArgumentError) as error:
            block.fail(f"LightningCLI's parser refuses it: {error}")

    def run_bash(self, block: Block) -> None:
        for line in re.sub(r"\\\n\s*", " ", block.code).splitlines():
            command = re.sub(r"^\$ ", "", line.strip())
            if block.language == "console" and not line.strip().startswith("$ "):
                continue
            words = shlex.split(command, comments=True)
            if not words:
                continue
            while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            try:
                check_command(words, run=not block.not_run)
            except CommandError as error:
                block.fail(f"`{command}`: {error}")


def check_config(config: dict[str, Any], *, instantiate: bool) -> None:
    """Parse a configuration as LightningCLI does; build the Trainer and its callbacks if asked to."""
    for name in lightning_accel.__all__:  # as our own command does, so that short class names are known
        getattr(lightning_accel, name)
    trainer = config.get("trainer") or {}
    if "callbacks+" in trainer:  # a file that adds to another's list
        config = {**config, "trainer": {**trainer, "callbacks": trainer["callbacks+"]}}
        del config["trainer"]["callbacks+"]
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int)
    parser.add_argument("--ckpt_path", type=str | None)
    parser.add_lightning_class_args(Trainer, "trainer")
    if "model" in config:
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    if "data" in config:
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parsed = parser.parse_object(config)
    if instantiate:
        built = parser.instantiate_classes(parsed)
        assert all(isinstance(callback, Callback) for callback in built.trainer.callbacks or [])


class CommandError(Exception):
    """A shell command of a page that can't work."""


def check_command(words: list[str], *, run: bool) -> None:
    """Run or check one shell command."""
    program, arguments = words[0], words[1:]
    if program.startswith(".venv/bin/"):
        program = program.removeprefix(".venv/bin/")
    if program == "make":
        check_make(arguments)
    elif program == "pip" and arguments[:1] == ["install"]:
        check_pip(arguments[1:])
    elif program == "lightning-accel" or [program, *arguments[:2]] == ["python", "-m", "lightning_accel"]:
        arguments = arguments if program == "lightning-accel" else arguments[2:]
        command = [python(), "-m", "lightning_accel", *arguments]
        run_command(command) if run else check_options(command)
    elif program == "python" and arguments and arguments[0].endswith(".py"):
        if arguments[0].startswith("benchmarks/"):
            check_options([python(), str(REPO / arguments[0]), *arguments[1:]])
        else:
            run_command([python(), *arguments]) if run else check_options([python(), *arguments])
    elif program in {"mkdocs", "pytest", "pre-commit", "ruff", "mypy"}:
        pass  # other projects' tools
    elif program == "cd" or words[:2] == ["git", "clone"]:
        pass
    else:
        raise CommandError("no way to check this program")


def check_make(arguments: list[str]) -> None:
    targets = [word for word in arguments if not word.startswith("-") and "=" not in word]
    documented = set(re.findall(r"^([a-z-]+):.*##", (REPO / "Makefile").read_text(), re.MULTILINE))
    if unknown := set(targets) - documented:
        raise CommandError(f"the Makefile has no documented target {sorted(unknown)}")
    run_command(["make", "-n", *arguments], cwd=REPO)


def check_pip(arguments: list[str]) -> None:
    from packaging.requirements import Requirement

    assert tomllib is not None, "the documentation is checked on Python >= 3.11"
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    for argument in arguments:
        if argument.startswith("-") or argument == ".":
            continue
        requirement = Requirement(argument.replace(".[", "lightning-accel[", 1))
        if requirement.name == project["name"] and (
            unknown := requirement.extras - set(project["optional-dependencies"])
        ):
            raise CommandError(f"there is no extra {sorted(unknown)}")


def check_options(command: list[str]) -> None:
    """Check that a command that is not run could be: its script or subcommand, its options and its files exist."""
    script = 2 if command[1] != "-m" else 3
    head = command[:script] + [word for word in command[script : script + 1] if not word.startswith("-")]
    usage = run_command([*head, "--help"])
    for word, value in itertools.zip_longest(command[len(head) :], command[len(head) + 1 :], fillvalue=""):
        option = word.split("=")[0]
        if option.startswith("--") and not re.search(rf"{re.escape(option.split('.')[0])}\b", usage):
            raise CommandError(f"`{' '.join(head[1:])} --help` does not know {option}")
        for file in (word.partition("=")[2], value):
            if file.endswith((".yaml", ".py")) and not (Path(file).exists() or (REPO / file).exists()):
                raise CommandError(f"there is no file {file}")


def run_command(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=170)
    if done.returncode:
        raise CommandError(f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


@pytest.fixture
def quiet_trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Defaults for a Trainer of a page, where the page does not give the argument; and a clean `sys.modules` after."""
    defaults = {"ACCELERATOR": "cpu", "MAX_EPOCHS": "2", "LOGGER": "False", "ENABLE_PROGRESS_BAR": "False"}
    for name, value in defaults.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    monkeypatch.setattr(sys, "argv", ["page"])
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}:{REPO}")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if name.startswith("docs_page_") or (file and Path(file).is_relative_to(Path.cwd())):
            del sys.modules[name]


# Lightning's advice for large runs: workers, log intervals, a validation_step without a loader
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * is_slow(page)) for page in PAGES])
def test_page(page: str, own_directory: Path, quiet_trainer: None) -> None:
    runner = Page(page)
    # examples/ and benchmarks/ are named from the root of a checkout
    (own_directory / "examples").symlink_to(REPO / "examples")
    for block in read_blocks(page, (REPO / page).read_text()):
        runner.run(block)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert tried and not failed


BROKEN = {
    "a name that does not exist": (
        "```python\nfrom lightning_accel import Nothing\n```",
        "cannot import name 'Nothing'",
    ),
    "a name that no block defined": ("```python\nprint(never_defined)\n```", "name 'never_defined' is not defined"),
    "a failing assertion": ("```python\nassert 1 == 2, 'one is not two'\n```", "one is not two"),
    "a wrong argument in YAML": (
        "```yaml\n- class_path: lightning.pytorch.callbacks.ModelSummary\n  init_args: {max_deph: 1}\n```",
        "broken.md:2: .*max_deph",
    ),
    "an unknown key in YAML": ("```yaml\ntrainer:\n  max_epoch: 3\n```", "broken.md:2: .*max_epoch"),
    "an unknown make target": ("```bash\nmake faster\n```", "broken.md:2: .*no documented target"),
    "an unknown subcommand": ("```bash\nlightning-accel nothing\n```", "broken.md:2: .*exit status"),
    "an unknown extra": ("```bash\npip install 'lightning-accel[gold]'\n```", "no extra.*gold"),
    "an unknown program": ("```bash\nfrobnicate\n```", "no way to check this program"),
    "a missing benchmark": ("```bash\npython benchmarks/none.py\n```", "exit status"),
    "a fence without a language": ("```\nx\n```", "names no language"),
    "an unknown language": ("```perl\nx\n```", "no way to check a 'perl' block"),
    "not run without a reason": ("<!-- not run: -->\n```python\nx\n```", "needs a reason"),
    "not run, but it does not compile": ("<!-- not run: slow -->\n```python\nif\n```", "invalid syntax"),
    "not run, but a file is missing": (
        "<!-- not run: slow -->\n```bash\nlightning-accel compare --config none.yaml --with none.yaml\n```",
        "no file none.yaml",
    ),
    "not run, but an option is unknown": (
        "<!-- not run: slow -->\n```bash\nlightning-accel compare --sedes 3\n```",
        "does not know --sedes",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_page_fails(what: str, quiet_trainer: None) -> None:
    text, message = BROKEN[what]
    runner = Page("broken.md")
    with pytest.raises((Exception, pytest.fail.Exception), match=f"(?s){message}"):
        for block in read_blocks("broken.md", text):
            runner.run(block)


def test_blocks_are_read_with_their_places() -> None:
    text = '# Title\n\n<!-- not run: it takes an hour -->\n```python title="a.py"\nx = 1\n```\n'
    text += "\n- item\n\n    ```bash\n    make test\n    ```\n"
    first, second = read_blocks("page.md", text)
    assert (first.line, first.title, first.not_run, first.code) == (5, "a.py", "it takes an hour", "x = 1\n")
    assert (second.line, second.language, second.not_run, second.code) == (11, "bash", None, "make test\n")


def test_the_api_page_has_every_public_name() -> None:
    page = (REPO / "docs/api.md").read_text()
    elsewhere = {"Duration"}  # with the schedules
    assert {name for name in lightning_accel.__all__ if f"::: lightning_accel.{name}\n" not in page} == elsewhere
    names = set(lightning_accel.augment.__all__) - set(lightning_accel.__all__)
    assert {name for name in names if not re.search(rf"\b{name}\b", page)} == set()
