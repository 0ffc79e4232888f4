"""The same from a YAML file: by dotted path with LightningCLI, by short name with our own command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_accel.cli.main import main
from tests.conformance.cases import SAMPLE, cases
from tests.conformance.compare import assert_equal
from tests.conformance.toy import SETTINGS, TRAINED, DigitsData, run
from tests.conformance.wrong_methods import __name__ as WRONG
from tests.methods import METHODS, STACKS, Method, Spec, use


def by_dotted_path(arguments: list[str]) -> None:
    LightningCLI(args=arguments, save_config_callback=None)


def with_the_config_saved(arguments: list[str]) -> None:
    LightningCLI(args=arguments, save_config_kwargs={"config_filename": "saved.yaml"})


def by_short_name(arguments: list[str]) -> None:
    assert main(arguments) == 0


def bare_name(path: str) -> str:
    """The last part of a dotted path; the whole where Lightning has a callback of that name too."""
    name = path.split(".")[-1]
    return path if hasattr(lightning.pytorch.callbacks, name) else name


def short(value: Any) -> Any:
    """``value`` with every class by its bare name, where that is enough."""
    if isinstance(value, dict):
        return {key: bare_name(item) if key == "class_path" else short(item) for key, item in value.items()}
    return [short(item) for item in value] if isinstance(value, list) else value


def check_yaml(method: Method, front_end: Callable[[list[str]], None]) -> None:
    specs: list[Spec] = method.callbacks if front_end is by_dotted_path else short(method.callbacks)
    recorder = {"class_path": "tests.conformance.toy.Recorder", "init_args": {"final": "yaml.ckpt"}}
    config = {
        "seed_everything": 7,
        "trainer": {**SETTINGS, "callbacks": [*specs, recorder]},
        "model": {"class_path": "tests.conformance.toy.Digits"},
        "data": {"class_path": "tests.conformance.toy.DigitsData"},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    try:
        front_end(["fit", "--config", "config.yaml"])
    except SystemExit as error:
        raise AssertionError("the YAML can't be read") from error
    actual = torch.load("yaml.ckpt", weights_only=True)
    expected = run(method.make(), datamodule=DigitsData()).final
    for key in (*TRAINED, "callbacks"):
        assert_equal(actual[key], expected[key], f"from YAML, {key}")


@pytest.fixture(autouse=True)
def bare_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])  # LightningCLI warns about the test runner's


@pytest.mark.parametrize("front_end", [by_dotted_path, by_short_name])
@pytest.mark.parametrize("method", cases([*METHODS, STACKS[-1]], quick=SAMPLE))
def test_yaml(method: Method, front_end: Callable[[list[str]], None]) -> None:
    check_yaml(method, front_end)


def test_an_argument_of_another_type_than_said_is_flagged() -> None:
    with pytest.raises(AssertionError, match="the YAML can't be read"):
        check_yaml(Method("WrongType", [use(f"{WRONG}.WrongType", rate=0.5)]), by_dotted_path)


def test_another_run_than_in_python_is_flagged() -> None:
    with pytest.raises(AssertionError, match="from YAML, state_dict"):
        check_yaml(Method("OtherInYAML", [use(f"{WRONG}.OtherInYAML")]), with_the_config_saved)


def test_a_name_that_is_not_found_is_flagged() -> None:
    with pytest.raises(AssertionError, match="the YAML can't be read"):
        check_yaml(Method("NoSuch", [use(f"{WRONG}.NoSuch")]), by_short_name)
