from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_accel
from lightning_accel.cli.main import main
from lightning_accel.cli.recipes import recipe_names, recipe_path, recipe_summary, split_recipes
from lightning_accel.cli.runner import log_tail
from lightning_accel.cli.usage import UsageError
from lightning_accel.hooks import AccelCallback


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        assert "lightning-accel COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-accel {lightning_accel.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["compar"], "There is no command 'compar'. Did you mean 'compare'?"),
        (["recipe", "image-mlid"], "There is no recipe 'image-mlid'. Did you mean 'image-mild'?"),
        (["recipe", "a", "b"], "Expected one recipe, but got a b."),
        (["methods", "--yaml"], "takes --json and nothing else, but got --yaml"),
        (["fit", "--recipe"], "Expected a name after --recipe."),
        (["fit", "--recipe", "nope", "--config", "a.yaml"], "There is no recipe 'nope'."),
        (["validate", "--recipe", "image-mild"], "--recipe goes with fit and compare, not with validate"),
    ],
)
def test_bad_usage(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["recipe", "methods"])
def test_help_of_the_small_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: lightning-accel {command}" in capsys.readouterr().out


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"image-mild", "image-medium"} <= set(recipe_names())
    assert main(["recipe"]) == 0
    assert "image-mild    Mild regularization" in capsys.readouterr().out
    assert main(["recipe", "image-mild"]) == 0
    assert capsys.readouterr().out == recipe_path("image-mild").read_text()


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_only_appends_callbacks_and_says_when_not_to_use_it(name: str) -> None:
    text = recipe_path(name).read_text()
    assert recipe_summary(name).endswith(".")
    assert "# Do not use it" in text
    data = yaml.safe_load(text)
    assert list(data) == ["trainer"] and list(data["trainer"]) == ["callbacks+"]
    for entry in data["trainer"]["callbacks+"]:
        assert issubclass(getattr(lightning_accel, entry["class_path"].removeprefix("lightning_accel.")), AccelCallback)


def test_split_recipes() -> None:
    mild, medium = str(recipe_path("image-mild")), str(recipe_path("image-medium"))
    args = ["--config", "a.yaml", "--recipe", "image-mild", "--x=1", "--recipe=image-medium"]
    assert split_recipes(args) == (["--config", "a.yaml", "--x=1"], [mild, medium])


@pytest.mark.parametrize("name", [None, "--x"])
def test_recipe_without_a_name(name: str | None) -> None:
    with pytest.raises(UsageError, match="Expected a name"):
        split_recipes(["--recipe", *([name] if name else [])])


def test_methods_lists_every_public_callback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    found = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    public = {name: getattr(lightning_accel, name) for name in lightning_accel.__all__}
    callbacks = {name for name, cls in public.items() if isinstance(cls, type) and issubclass(cls, AccelCallback)}
    assert set(found) == callbacks
    assert len(found) >= 7
    pruning = found["GradualPruning"]
    assert pruning["purpose"] == lightning_accel.GradualPruning.contract.purpose
    assert pruning["docs"] == "docs/methods/gradual_pruning.md"
    assert pruning["touches"] == sorted(lightning_accel.GradualPruning.contract.touches)


def test_methods_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert "GradualPruning" in text and "docs/methods/gradual_pruning.md" in text


def test_small_commands_load_no_more_than_the_package(repo: Path) -> None:
    """Which is Lightning, where the package registers its strategies: no method, no LightningCLI."""
    code = (
        "import sys, lightning_accel; before = set(sys.modules); from lightning_accel.cli.main import main; main([]);"
        "main(['recipe']); main(['recipe', 'image-mild'])\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "loaded = set(sys.modules) - before\n"
        "assert not loaded & {'jsonargparse', 'lightning_accel.hooks', 'lightning.pytorch.cli', 'deepspeed'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=repo)


def test_log_tail(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"first\n\x1b[31mred\x1b[0m\n\nEpoch 0: 1%\rEpoch 0: 50%\rEpoch 0: done\n" + b"x\xff\r\nlast\n")
    assert log_tail(log) == "first\nred\nEpoch 0: done\nx\ufffd\nlast"
    assert log_tail(log, lines=1) == "last"
    assert log_tail(tmp_path / "none") == ""
