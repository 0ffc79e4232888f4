from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_accel.cli.main import main
from lightning_accel.cli.run_one import describe_data, source_digests
from tests.cli.tiny import TinyData

CONFIG = """
seed_everything: 3
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  log_every_n_steps: 1
  callbacks:
    - class_path: GradientAccumulation
      init_args: {factor: 2}
model: {class_path: tests.cli.tiny.Tiny}
data: {class_path: tests.cli.tiny.TinyData}
"""


@pytest.fixture(autouse=True)
def config(own_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that what a fit leaves there is taken back
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("COLUMNS", "140")
    path = own_directory / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.filterwarnings("ignore:.*save_config_callback.*")
def test_recipes_append_to_the_users_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fit", "--config", "config.yaml", "--recipe", "image-mild", "--recipe=image-medium", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    names = [entry["class_path"].rsplit(".", 1)[-1] for entry in callbacks]
    mild = ["BatchAugmentation", "LabelSmoothing", "FusedOptimizer"]
    assert names == ["GradientAccumulation", *mild, *mild, "ExactResume"]


@pytest.mark.filterwarnings("ignore:LowBitOptimizer has no effect")
def test_equal_callbacks_are_kept_once_and_others_refused(
    own_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = "\n    - class_path: lightning_accel.FusedOptimizer"
    argv = ["fit", "--config", "config.yaml", "--recipe", "low-memory"]
    (own_directory / "config.yaml").write_text(CONFIG.replace("\nmodel:", f"{fused}\nmodel:"))
    assert main(argv) == 0
    plan = capsys.readouterr().out
    assert plan.count("FusedOptimizer") == 1 and "LowBitOptimizer" in plan
    (own_directory / "config.yaml").write_text(
        CONFIG.replace("\nmodel:", f"{fused}\n      init_args: {{enabled: false}}\nmodel:")
    )
    with pytest.raises(MisconfigurationException, match="FusedOptimizer is in the Trainer's callbacks twice"):
        main(argv)


def test_fit_with_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "config.yaml"]) == 0
    assert "GradientAccumulation" in capsys.readouterr().out  # the printed plan


def test_configuration_is_saved_and_never_overwritten(own_directory: Path) -> None:
    saved = own_directory / "logs/config.yaml"
    for seed in (3, 4):
        argv = ["fit", "--config", "config.yaml", "--trainer.default_root_dir=logs", f"--seed_everything={seed}"]
        assert main(argv) == 0
        assert yaml.safe_load(saved.read_text())["seed_everything"] == 3
    assert main(["fit", "--config", "config.yaml"]) == 0
    assert (own_directory / "config.yaml").read_text() == CONFIG


def test_modules_of_the_working_directory_are_found(own_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (own_directory / "my_own_module.py").write_text(
        "from tests.cli.tiny import Tiny\n\n\nclass Mine(Tiny):\n    pass\n"
    )
    (own_directory / "config.yaml").write_text(CONFIG.replace("tests.cli.tiny.Tiny}", "my_own_module.Mine}", 1))
    assert main(["fit", "--config", "config.yaml"]) == 0
    assert source_digests(own_directory).keys() == {"my_own_module.py"}


@pytest.mark.parametrize(
    ("name", "init_args"), [("MixUp", "{alpha: 0.1}"), ("RandomCrop", "{size: 2}"), ("CutMix", "{}")]
)
def test_transforms_have_short_names(name: str, init_args: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: BatchAugmentation\n      init_args:\n        transforms:\n"
        f"          - class_path: {name}\n            init_args: {init_args}\n"
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", "config.yaml", "--config", "more.yaml", "--print_config"])
    assert f"lightning_accel.augment.{name}" in capsys.readouterr().out.replace(f".{name.lower()}.", ".")


def test_describe_data() -> None:
    class Broken(TinyData):
        def __str__(self) -> str:
            raise RuntimeError

    class Long(TinyData):
        def __str__(self) -> str:
            return "x" * 1000

    class Plain(TinyData):
        __str__ = TinyData.__bases__[0].__str__

    assert describe_data(TinyData()) == "64 made-up points"
    assert describe_data(None) == describe_data(Broken()) == describe_data(Plain()) == ""
    assert len(describe_data(Long())) == 200
