from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from examples.image_classification import data
from examples.image_classification.data import ImageData, read_fashion_mnist, read_mnist_5k
from lightning_accel.cli.compare import make_parser
from lightning_accel.cli.main import main
from lightning_accel.cli.recipes import recipe_names, recipe_path

FOLDER = Path("examples/image_classification")


@pytest.fixture(autouse=True)
def from_the_root(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)  # as the README says
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("COLUMNS", "140")


def fit(tmp_path: Path, *extra: str) -> None:
    small = ["--trainer.max_epochs=1", "--data.train_images=128", "--data.val_images=100", "--data.batch_size=32"]
    argv = ["fit", "--config", str(FOLDER / "plain.yaml"), *extra, *small, f"--trainer.default_root_dir={tmp_path}"]
    assert main([*argv, "--trainer.log_every_n_steps=1"]) == 0


@pytest.mark.parametrize("name", ["model.py", "data.py", "plain.yaml"])
def test_the_project_knows_nothing_of_the_package(name: str) -> None:
    code = re.sub("#.*", "", (FOLDER / name).read_text())
    assert "lightning_accel" not in code


def test_plain(tmp_path: Path) -> None:
    fit(tmp_path)


def test_accelerated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, "--config", str(FOLDER / "accelerated.yaml"))
    plan = capsys.readouterr().out
    for name in ("BatchAugmentation", "LabelSmoothing", "GradualPruning", "FusedOptimizer"):
        assert name in plan


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, "--recipe", name)
    plan = capsys.readouterr().out
    entries = yaml.safe_load(recipe_path(name).read_text())["trainer"]["callbacks+"]
    assert entries
    for entry in entries:
        assert entry["class_path"].rpartition(".")[2] in plan


def test_accelerated_only_adds_callbacks() -> None:
    added = yaml.safe_load((FOLDER / "accelerated.yaml").read_text())
    assert list(added) == ["trainer"] and list(added["trainer"]) == ["callbacks+"]


def test_demo_is_a_valid_comparison(repo: Path) -> None:
    recipe = (repo / "Makefile").read_text().replace("\\\n", " ")
    (line,) = [line for line in recipe.splitlines() if "lightning-accel compare" in line]
    options = make_parser().parse_args(line.split("lightning-accel compare")[1].split())
    assert options.config == [str(FOLDER / "plain.yaml")]
    assert options.overlays == [str(FOLDER / "accelerated.yaml")]
    assert int(options.seeds) >= 3  # two give intervals so wide that nothing shows


def test_mnist() -> None:
    images, labels = read_mnist_5k()
    assert images.shape == (5000, 1, 28, 28) and images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    assert labels.bincount().tolist() == [500] * 10
    assert labels[:1000].bincount(minlength=10).min() > 50  # the classes are mixed


def write_idx(folder: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = draw.integers(0, 10, count, dtype=np.uint8)
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
        file.write(b"\0" * 16 + images.tobytes())
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"\0" * 8 + labels.tobytes())
    return images, labels


def test_fashion_mnist_files(tmp_path: Path) -> None:
    raw_images, raw_labels = write_idx(tmp_path, "t10k", 5)
    images, labels = read_fashion_mnist(tmp_path, "t10k", 4)
    assert images.shape == (4, 1, 28, 28)
    assert torch.equal((images * 255).round().to(torch.uint8)[:, 0], torch.from_numpy(raw_images[:4]))
    assert labels.tolist() == raw_labels[:4].tolist()


def test_data_says_which_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "none")
    module = ImageData(train_images=100, val_images=50)
    module.setup("fit")
    assert str(module) == "MNIST, 5,000 images: 100 images to train with, 50 to validate with"
    write_idx(tmp_path, "train", 20)
    write_idx(tmp_path, "t10k", 10)
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path)
    module = ImageData()
    module.setup("fit")
    assert str(module) == "Fashion-MNIST: 20 images to train with, 10 to validate with"
    assert len(module.train) == 20 and len(module.val) == 10
