"""What `lightning-accel consolidate` refuses, and what it does with a plain checkpoint."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from lightning_accel.cli.main import main


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, "epoch": 2}, path)
    return path


def test_a_plain_checkpoint(plain: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert main(["consolidate", str(plain), str(tmp_path / "a.safetensors")]) == 0
    assert main(["consolidate", str(plain), str(tmp_path / "a.ckpt")]) == 0
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert loaded["epoch"] == 2
    for state in (loaded["state_dict"], load_file(tmp_path / "a.safetensors")):
        assert torch.equal(state["w"], torch.arange(6.0).view(2, 3)) and state["n"] == 3


def test_views_and_shared_memory(tmp_path: Path) -> None:
    """What is stored crosswise, in a part of a larger piece, or twice."""
    from safetensors.torch import load_file

    whole = torch.arange(12.0).view(3, 4)
    tensors = {"crosswise": whole.t(), "part": whole[1:, ::2], "tied": whole, "again": whole, "none": torch.zeros(0, 3)}
    tensors["bf16"] = whole.bfloat16()
    torch.save({"state_dict": tensors}, "views.ckpt")
    for out in ("a.ckpt", "a.safetensors"):
        assert main(["consolidate", "views.ckpt", str(tmp_path / out)]) == 0
    for state in (
        torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"],
        load_file(tmp_path / "a.safetensors"),
    ):
        assert state.keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(state[name], value) and state[name].dtype == value.dtype, name


def test_a_class_that_is_not_trusted_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"path": tmp_path}}, "odd.ckpt")
    assert main(["consolidate", "odd.ckpt", "a.ckpt"]) == 1
    assert "objects of pathlib." in capsys.readouterr().err


def test_nothing_is_overwritten_unless_told(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.ckpt"
    out.write_text("precious")
    assert main(["consolidate", str(plain), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err and out.read_text() == "precious"
    assert main(["consolidate", str(plain), str(out), "--overwrite"]) == 0
    assert torch.load(out, weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("out", ["a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("room", [50, 30_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, room: int) -> None:
    """Without room for the names, and with it but without room for the numbers."""
    plain = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(10_000)}}, plain)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        status = main(["consolidate", str(plain), str(tmp_path / out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert f"{tmp_path / out} could not be written, and nothing of it is left: " in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["plain.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["absent", "a.ckpt"], 1, "does not exist"),
        (["empty", "a.ckpt"], 1, "but not a checkpoint"),
        (["words.ckpt", "a.ckpt"], 1, "can't be read"),
        (["plain.ckpt", "a.bin"], 2, "end in .ckpt or .safetensors"),
        (["empty", "empty/a.ckpt"], 2, "outside of the checkpoint"),
        (["plain.ckpt"], 2, "takes CKPT and OUT"),
        (["plain.ckpt", "a.ckpt", "--overwrit"], 2, "--overwrite"),
        (["plain.ckpt", "words.ckpt/a.ckpt"], 1, "words.ckpt"),
    ],
)
def test_bad_input(
    plain: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    Path("empty").mkdir()
    Path("words.ckpt").write_text("no checkpoint")
    assert main(["consolidate", *arguments]) == status
    assert message in capsys.readouterr().err
