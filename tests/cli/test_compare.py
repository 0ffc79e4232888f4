"""The logic of `compare`, with runs that are made up; test_compare_processes.py makes real ones."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_accel.cli import compare
from lightning_accel.cli.compare import parse_seeds, parse_target, run_order
from lightning_accel.cli.main import main
from lightning_accel.cli.runner import Job
from lightning_accel.cli.usage import UsageError
from lightning_accel.report.receipt import Receipt
from lightning_accel.report.record import Run
from tests.report.synthetic import make_run

Execute = Callable[[Job], Run]


class Fake:
    """Stands in for the processes: makes runs up, and remembers which were asked for."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.then: Execute = lambda job: make_run(job.side, job.seed)

    def __call__(self, job: Job, on_progress: Callable[[float], None]) -> Run:
        self.jobs.append(job)
        on_progress(0.5)
        return self.then(job)

    @property
    def names(self) -> list[str]:
        return [f"{job.side[0]}{job.seed}" for job in self.jobs]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(compare, "execute", made)
    monkeypatch.setattr(compare, "warm_up", lambda: None)
    Path("plain.yaml").write_text("model: plain\n")
    Path("accel.yaml").write_text("trainer: accelerated\n")
    return made


def run(*extra: str, out: str = "out") -> int:
    return main(["compare", "--config", "plain.yaml", "--with", "accel.yaml", "--out", out, *extra])


def receipt(out: str = "out") -> Receipt:
    return Receipt.from_json(Path(out, "receipt.json").read_text())


def test_parse_seeds() -> None:
    assert parse_seeds("3") == [0, 1, 2]
    assert parse_seeds("5,7") == [5, 7]


@pytest.mark.parametrize("text", ["0", "-1", "x", "1,1", "", "1.5", "1,-2"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(UsageError, match="Expected --seeds to be a number of seeds"):
        parse_seeds(text)


def test_parse_target() -> None:
    assert parse_target("val_acc=0.9") == ("val_acc", 0.9, None)
    assert parse_target("val/loss <= 1e-3") == ("val/loss", 1e-3, "lower")
    assert parse_target("x>=-2") == ("x", -2.0, "higher")


@pytest.mark.parametrize("text", ["val_acc", "=0.9", "val_acc=", "val_acc=high", "0.9", "a==0.9"])
def test_bad_target(text: str) -> None:
    with pytest.raises(UsageError, match="Expected --target to be like"):
        parse_target(text)


def test_sides_take_turns_and_swap() -> None:
    found = [f"{side[0]}{seed}" for side, seed in run_order([0, 1, 2])]
    assert found == ["p0", "a0", "a1", "p1", "p2", "a2"]


def test_receipt_is_written_and_printed(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "2") == 0
    assert fake.names == ["p0", "a0", "a1", "p1"]
    assert {path.name for path in Path("out").iterdir()} == {
        "comparison.json",
        "receipt.html",
        "receipt.json",
        "receipt.md",
        "runs",
    }
    made = receipt()
    assert made.sides == {"plain": "plain.yaml", "accelerated": "plain.yaml + accel.yaml"}
    assert made.configs == {"plain.yaml": "model: plain\n", "accel.yaml": "trainer: accelerated\n"}
    assert made.command.startswith("lightning-accel compare --config plain.yaml")
    text = capsys.readouterr().out
    assert "Time to finish the fit" in text
    assert str(Path("out/receipt.html").absolute()) in text.splitlines()[-1]


def test_command_lines_of_both_sides(fake: Fake) -> None:
    assert run("--seeds", "1", "--recipe", "image-mild", "--", "--trainer.max_epochs=3") == 0
    plain, accelerated = (job.args for job in fake.jobs)
    assert plain == ["fit", "--config", "plain.yaml", "--trainer.max_epochs=3"]
    assert accelerated[:6] == ["fit", "--config", "plain.yaml", "--config", "accel.yaml", "--trainer.max_epochs=3"]
    assert accelerated[6] == "--config" and accelerated[7].endswith("recipes/image-mild.yaml")
    assert receipt().sides["accelerated"] == "plain.yaml + --trainer.max_epochs=3 + accel.yaml + recipe image-mild"


def test_recipe_alone_is_enough(fake: Fake) -> None:
    assert main(["compare", "--config", "plain.yaml", "--recipe", "image-mild", "--seeds", "1", "--out", "out"]) == 0


def test_default_folder_is_new(fake: Fake) -> None:
    assert main(["compare", "--config", "plain.yaml", "--with", "accel.yaml", "--seeds", "1"]) == 0
    assert len(list(Path("receipts").glob("*/receipt.html"))) == 1


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--config", "none.yaml", "--with", "accel.yaml"], "There is no configuration file none.yaml."),
        (["--config", "plain.yaml", "--with", "none.yaml"], "There is no configuration file none.yaml."),
        (["--config", "plain.yaml"], "give the accelerated side by --with or by --recipe"),
        (["--config", "plain.yaml", "--recipe", "image-wild"], "Did you mean 'image-mild'?"),
        (["--config", "plain.yaml", "--with", "accel.yaml", "--seeds", "0"], "Expected --seeds"),
        (
            ["--config", "plain.yaml", "--with", "accel.yaml", "--metric", "a", "--target", "b=1"],
            "--metric is a, but --target is one of b",
        ),
    ],
)
def test_bad_usage(fake: Fake, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *argv]) == 2
    assert sentence in capsys.readouterr().err
    assert fake.jobs == []


def test_metric_that_is_not_logged_stops_at_once(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--metric", "val_accuracy") == 2
    sentence = capsys.readouterr().err
    assert "plain-seed0 did not log 'val_accuracy'. Did you mean 'val_acc'?" in sentence
    assert "There are: train_loss, val_acc, val_loss." in sentence
    assert fake.names == ["p0"]
    assert Path("out/runs/plain-seed0.json").exists()


def test_target_and_mode(fake: Fake) -> None:
    assert run("--seeds", "1", "--target", "val_loss<=0.3") == 0
    assert (receipt().metric, receipt().better, receipt().target) == ("val_loss", "lower", 0.3)
    assert run("--seeds", "1", "--metric", "val_acc", "--mode", "min") == 0
    assert (receipt().metric, receipt().better) == ("val_acc", "lower")


def test_first_run_of_a_side_that_fails_stops(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.then = lambda job: Run(job.side, job.seed, "failed", error="KeyError: [/bold] 'x'")
    assert run() == 1
    text = capsys.readouterr().out
    assert "plain-seed0 failed" in text and "KeyError: [/bold] 'x'" in text
    assert "the plain side has not worked once" in text
    assert "No run finished, so there is no receipt." in text
    assert fake.names == ["p0"]


def test_later_failure_is_reported_and_left_out(fake: Fake) -> None:
    fake.then = lambda job: Run(job.side, job.seed, "failed") if job.seed == 1 else make_run(job.side, job.seed)
    assert run() == 1
    assert fake.names == ["p0", "a0", "a1", "p1", "p2", "a2"]
    assert "Failed and left out: accelerated-seed1, plain-seed1." in receipt().notes


def test_ctrl_c_keeps_what_is_done(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(job: Job) -> Run:
        if len(fake.jobs) == 4:
            raise KeyboardInterrupt
        return make_run(job.side, job.seed)

    fake.then = interrupt
    assert run() == 130
    assert [run.name for run in receipt().runs] == ["plain-seed0", "accelerated-seed0", "accelerated-seed1"]
    assert receipt().notes[0] == "Stopped before all runs were done."
    assert "The runs that are done are kept." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_do_the_same(fake: Fake, name: str) -> None:
    before = signal.getsignal(getattr(signal, name))

    def stop(job: Job) -> Run:
        if len(fake.jobs) == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return make_run(job.side, job.seed)

    fake.then = stop
    assert run() == 130
    assert len(receipt().runs) == 2
    assert signal.getsignal(getattr(signal, name)) is before


def test_same_folder_goes_on(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "1") == 0
    assert run("--seeds", "2") == 0
    assert fake.names == ["p0", "a0", "a1", "p1"]
    assert "Going on from 2 runs" in capsys.readouterr().out
    assert len(receipt().runs) == 4


def test_failed_runs_are_run_again(fake: Fake) -> None:
    fake.then = lambda job: Run(job.side, job.seed, "failed")
    assert run("--seeds", "1") == 1
    fake.then = lambda job: make_run(job.side, job.seed)
    assert run("--seeds", "1") == 0
    assert fake.names == ["p0", "p0", "a0"]


def test_other_settings_are_refused(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "1") == 0
    before = Path("out/receipt.json").read_text()
    Path("accel.yaml").write_text("trainer: something else\n")
    assert run("--seeds", "1") == 2
    assert "holds another comparison" in capsys.readouterr().err
    assert Path("out/receipt.json").read_text() == before


def test_changed_code_is_refused(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.py").write_text("a = 1\n")
    fake.then = lambda job: make_run(job.side, job.seed, sources={"model.py": "0123456789abcdef"})
    assert run("--seeds", "1") == 0
    assert run("--seeds", "1") == 2
    assert "model.py has changed since accelerated-seed0 in" in capsys.readouterr().err


def test_foreign_folder_is_refused(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    assert run() == 2
    assert "is not empty, and holds no comparison" in capsys.readouterr().err
    assert Path("out/thesis.tex").read_text() == "years of work"


def test_broken_run_file(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "1") == 0
    Path("out/runs/plain-seed0.json").write_text("{")
    assert run("--seeds", "1") == 2
    assert "Delete it to run that seed again." in capsys.readouterr().err


def test_folder_that_can_not_be_made(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("x")
    assert run(out="file/out") == 1
    assert "Could not make" in capsys.readouterr().out
    assert fake.jobs == []


def full_disk_for(monkeypatch: pytest.MonkeyPatch, match: str) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if match in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_disk_fills_while_a_run_is_kept(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk_for(monkeypatch, "accelerated-seed1")
    assert run() == 1
    out = capsys.readouterr().out
    assert "accelerated-seed1.json:Nospaceleftondevice." in "".join(out.split())  # a long path is wrapped anywhere
    assert "Time to finish the fit" in out  # the receipt of what was measured is printed all the same
    assert sorted(path.stem for path in Path("out/runs").glob("*.json")) == ["accelerated-seed0", "plain-seed0"]
    assert fake.names == ["p0", "a0", "a1"]


def test_disk_is_full_when_the_receipt_is_written(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        full_disk_for(patch, "receipt.")
        assert run("--seeds", "1") == 1
    text = capsys.readouterr().out
    assert "No space left on device" in text and "Time to finish the fit" in text
    assert not Path("out/receipt.json").exists()
    assert run("--seeds", "1") == 0  # as the message says, the same command writes it from the runs that were kept
    assert fake.names == ["p0", "a0"]
    assert Path("out/receipt.html").exists()


def test_digest_covers_versions(fake: Fake) -> None:
    assert run("--seeds", "1") == 0
    mark = json.loads(Path("out/comparison.json").read_text())
    assert set(mark["versions"]) == {"lightning-accel", "lightning", "torch"}
