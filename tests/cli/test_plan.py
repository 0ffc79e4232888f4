"""`lightning-accel plan` on the example project, whose module and data are real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_accel.cli.main import main

CONFIG = ["--config", "examples/language_model/plain.yaml", "--devices", "2"]
PARAMETERS = 120_576 * 4  # bytes; the embedding and the output share one weight


@pytest.fixture(autouse=True)
def from_the_root(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def rows(path: Path) -> dict[str, dict[str, int]]:
    found = json.loads(path.read_text())["strategies"]
    return {row["strategy"]: row for row in found}


def test_the_cheapest_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", *CONFIG, "--device-memory", "8GiB", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "DDP is the cheapest that fits" in printed and "strategy: ddp" in printed
    ddp, fsdp2 = rows(out)["ddp"], rows(out)["accel_fsdp2"]
    assert ddp["parameters"] == ddp["gradients"] == PARAMETERS
    assert ddp["state"] == pytest.approx(2 * PARAMETERS, rel=0.001)
    assert fsdp2["parameters"] == pytest.approx(PARAMETERS / 2, rel=0.01)
    assert ddp["activations"] > 32 * 64 * 64 * 4 * 10


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *CONFIG, "--device-memory", "4MiB"]) == 1
    assert "fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "value"), [("--device-memory", "80 bananas"), ("--devices", "0"), ("--config", "no_such.yaml")]
)
def test_bad_arguments(argument: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"--config": CONFIG[1], "--devices": "2", "--device-memory": "8GiB", argument: value}
    try:
        status = main(["plan", *(word for pair in arguments.items() for word in pair)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert value in error and (argument in error or value.endswith(".yaml"))
