from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from examples.language_model.data import cut, read_reviews
from examples.language_model.model import GPT
from tests.forking import python

FOLDER = Path("examples/language_model")


@pytest.mark.parametrize("name", ["model.py", "data.py", "plain.yaml"])
def test_the_project_knows_nothing_of_the_package(name: str, repo: Path) -> None:
    assert "lightning_accel" not in re.sub("#.*", "", (repo / FOLDER / name).read_text())


def test_the_next_byte_is_the_target() -> None:
    text = read_reviews(1000)
    assert len(text) == 1000 and int(text.max()) < 256
    x, y = cut(text, 64)[3]
    assert torch.equal(x, text[192:256]) and torch.equal(y, text[193:257])


def test_the_model_sees_only_what_came_before() -> None:
    model, tokens = GPT().eval(), torch.randint(0, 256, (2, 64))
    later = tokens.clone()
    later[:, 40:] = 0
    assert torch.equal(model(tokens)[:, :40], model(later)[:, :40])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_train_alike_under_every_strategy(repo: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("plain", "zero2", "zero3", "fsdp2"):
        command = [python(), "-m", "lightning_accel", "fit", "--config", str(FOLDER / "plain.yaml")]
        command += ["--config", str(FOLDER / f"{name}.yaml")] * (name != "plain")
        command += ["--trainer.max_steps=4", "--data.num_bytes=20000", f"--trainer.default_root_dir={tmp_path / name}"]
        command += ["--trainer.log_every_n_steps=1", "--trainer.logger=lightning.pytorch.loggers.CSVLogger"]
        command += [f"--trainer.logger.save_dir={tmp_path / name}", "--trainer.enable_checkpointing=false"]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        rows = next((tmp_path / name).rglob("metrics.csv")).read_text().splitlines()
        column = rows[0].split(",").index("train_loss")
        losses[name] = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert len(losses["plain"]) == 4
    for name in ("zero2", "zero3", "fsdp2"):
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-5), name
