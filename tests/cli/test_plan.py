"""`lightning-accel plan` on the example project, and on modules and arguments that are hard to plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_accel import LowBitOptimizer
from lightning_accel.cli.main import main

EXAMPLE = ["--config", "examples/language_model/plain.yaml", "--devices", "2"]
PARAMETERS = 120_576 * 4  # bytes; the embedding and the output share one weight
LAYER = 2 * 512 * 4 * 512 + 5 * 512  # parameters of one layer of `plan_modules.Net`
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def from_the_root(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def rows(path: Path) -> dict[str, dict[str, Any]]:
    found = json.loads(path.read_text())["strategies"]
    return {row["strategy"]: row for row in found}


class Planner:
    """Runs the command on a configuration of a test."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.config = folder / "config.yaml"

    def __call__(
        self, *arguments: str, model: str = "Net", data: str | None = "Data", devices: int = 2, **trainer: Any
    ) -> dict[str, Any]:
        self.write(model, data, **trainer)
        command = ["plan", "--config", str(self.config), "--devices", str(devices), "--device-memory", "8GiB"]
        self.status = main([*command, "--json", "-", *arguments])
        printed = self.capsys.readouterr()
        self.error = printed.err
        return json.loads(printed.out) if printed.out else {}

    def write(self, model: str = "Net", data: str | None = "Data", **trainer: Any) -> None:
        config: dict[str, Any] = {"model": {"class_path": f"tests.cli.plan_modules.{model}"}, "trainer": trainer}
        if data:
            config["data"] = {"class_path": f"tests.cli.plan_modules.{data}"}
        self.config.write_text(yaml.safe_dump(config))

    def pasted(self, memory: str, **trainer: Any) -> dict[str, Any]:
        """What the command prints to paste, which is then in the file `paste`."""
        self.write(**trainer)
        command = ["plan", "--config", str(self.config), "--devices", "2", "--headroom", "0"]
        assert main([*command, "--device-memory", memory]) == 0
        printed = self.capsys.readouterr().out
        self.paste = self.folder / "paste.yaml"
        self.paste.write_text(printed[printed.index("trainer:") :])
        found: dict[str, Any] = yaml.safe_load(self.paste.read_text())["trainer"]
        return found

    def row(self, name: str, *arguments: str, **options: Any) -> dict[str, Any]:
        return next(row for row in self(*arguments, **options)["strategies"] if row["strategy"] == name)


def accepted(*configs: Path | str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `fit` makes of the configurations."""
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *(word for path in configs for word in ("--config", str(path))), "--print_config"])
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["trainer"]
    return found


@pytest.fixture
def planner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Planner:
    return Planner(tmp_path, capsys)


def test_the_cheapest_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", *EXAMPLE, "--device-memory", "8GiB", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "DDP is the cheapest that fits" in printed and "strategy: ddp" in printed
    ddp, fsdp2 = rows(out)["ddp"], rows(out)["accel_fsdp2"]
    assert ddp["parameters"] == ddp["gradients"] == PARAMETERS
    assert ddp["state"] == pytest.approx(2 * PARAMETERS, rel=0.001)
    assert fsdp2["parameters"] == pytest.approx(PARAMETERS / 2, rel=0.01)
    assert ddp["activations"] > 32 * 64 * 64 * 4 * 10


CHOICES = {160: "ddp", 125: "accel_zero1", 82: "accel_fsdp2", 30: "accel_fsdp2_offload"}  # MiB


@pytest.mark.parametrize("memory", CHOICES)
def test_what_it_prints_can_be_pasted(memory: int, planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    expected = planner.pasted(f"{memory}MiB")
    assert expected == {"devices": 2, "num_nodes": 1, "precision": "32-true", "strategy": CHOICES[memory]}
    whole = accepted(planner.config, planner.paste, capsys=capsys)
    assert {name: whole[name] for name in expected} == expected


def test_a_strategy_with_options_keeps_them(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = {
        "class_path": "lightning_accel.ZeROStrategy",
        "init_args": {"communication": {"reduce_bucket": 1000}, "stage3": {"persistence_threshold": 0}},
    }
    plain, told = planner(), planner(strategy=strategy)
    working = {row["strategy"]: row["working"] for row in plain["strategies"]}
    for row in told["strategies"]:
        if row["strategy"] == "accel_zero3":
            assert row["parameters"] == (4 * LAYER * 4) // 2
        if "zero" in row["strategy"]:
            saved = 3 * LAYER * 4 - 4000
            assert working[row["strategy"]] - row["working"] == saved * (1 if "zero1" in row["strategy"] else 2)
    assert told["trainer"]["strategy"] == "ddp"

    written = planner.pasted("107MiB", strategy=strategy)["strategy"]
    assert written["class_path"] == "lightning_accel.ZeROStrategy"
    assert written["init_args"] == {"stage": 2, "communication": {"reduce_bucket": 1000}}
    found = accepted(planner.config, planner.paste, capsys=capsys)["strategy"]["init_args"]
    assert (found["stage"], found["offload_optimizer"]) == (2, "none")


def test_fsdp2_with_options(planner: Planner) -> None:
    strategy = {"class_path": "lightning_accel.FullyShardStrategy", "init_args": {"replicas": 2, "blocks": ["Linear"]}}
    plain, told = (planner.row("accel_fsdp2", devices=4, **more) for more in ({}, {"strategy": strategy}))
    assert told["parameters"] == 2 * plain["parameters"]
    assert told["working"] < plain["working"]
    assert planner(devices=3, strategy=strategy) == {} and "2 replicas can't share 3 devices" in planner.error


def test_frozen_parameters_and_buffers(planner: Planner) -> None:
    row = planner.row("ddp")
    assert (row["parameters"], row["gradients"]) == (4 * LAYER * 4, 3 * LAYER * 4)
    assert row["state"] == pytest.approx(2 * 3 * LAYER * 4, rel=1e-4)
    assert row["buffers"] == 4000


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EXAMPLE, "--device-memory", "4MiB"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits. FSDP2, offload needs least" in printed and "trainer:" not in printed
    assert "a micro-batch of 3 instead of 32" in printed and "by MicroBatching(size=3)" in printed and "fits" in printed


def test_advice_says_by_how_much(planner: Planner) -> None:
    found = planner("--device-memory", "40MiB", "--batch-size", "4096")
    assert planner.status == 1 and found["trainer"] == {} and found["missing"] > 0
    advice = {" ".join(item["text"].split()[:2]): item for item in found["advice"]}
    assert advice.keys() >= {
        "a micro-batch",
        "activation checkpointing",
        "precision bf16-true",
        "OptimizerInBackward, where",
        "LowBitOptimizer (8-bit",
    }
    batch = advice["a micro-batch"]
    assert batch["enough"] and batch["total"] <= 0.9 * 40 * MIB
    size = int(batch["text"].split()[3])
    again = planner("--device-memory", "40MiB", "--batch-size", str(size), accumulate_grad_batches=2)
    assert planner.status == 0
    assert next(row for row in again["strategies"] if row["strategy"] == batch["strategy"])["fits"]
    flags = [item["enough"] for item in found["advice"]]
    assert flags == sorted(flags, reverse=True)


def test_one_device(planner: Planner) -> None:
    found = planner(devices=1)
    assert found["trainer"]["strategy"] == "auto"
    ddp, zero = found["strategies"][0], found["strategies"][2]
    assert ddp["working"] < 5 * MIB and zero["state"] == pytest.approx(ddp["state"], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_precision(precision: str, planner: Planner) -> None:
    plain, found = planner(), planner(precision=precision)
    size = 2 if precision == "bf16-true" else 4
    ddp, zero, fsdp2 = (found["strategies"][number] for number in (0, 2, 3))
    assert ddp["parameters"] == 4 * LAYER * size
    assert zero["parameters"] == 4 * LAYER * (4 if precision == "bf16-mixed" else 2)
    assert zero["master"] == 3 * LAYER * 4 // 2 and zero["state"] == pytest.approx(3 * LAYER * 8 // 2, rel=1e-3)
    assert ddp["state"] == pytest.approx(3 * LAYER * 2 * size, rel=1e-3)
    assert bool(found["casts"]) == precision.endswith("mixed")
    assert bool(fsdp2["refusal"]) == (precision == "16-mixed")
    kept = ddp["activations"] - found["casts"]
    assert kept < plain["strategies"][0]["activations"]


def test_low_bit_and_fused_optimizers(planner: Planner) -> None:
    low = {"class_path": "LowBitOptimizer", "init_args": {"keep_32bit": ["layers.0"]}}
    found = planner(callbacks=[{"class_path": "FusedOptimizer"}, low])
    state = {row["strategy"]: row["state"] for row in found["strategies"]}
    assert state["ddp"] == pytest.approx(LAYER * (8 + 2 * 2.04), rel=0.02)
    assert state["accel_zero2"] == pytest.approx(3 * LAYER * 8 / 2, rel=0.001)
    takes = "FullyShardStrategy" in LowBitOptimizer.contract.accepts
    assert state["accel_fsdp2"] == pytest.approx(state["ddp"] / 2 if takes else state["accel_zero2"], rel=0.001)
    where = "DDP and FSDP2" if takes else "DDP alone"
    assert any(f"LowBitOptimizer counts under {where}" in note for note in found["notes"])
    assert not any("not counted" in note for note in found["notes"])
    found = planner(callbacks=[{"class_path": "GradualPruning", "init_args": {"amount": 0.5}}])
    assert any("not counted: GradualPruning" in note for note in found["notes"])


def test_embeddings_keep_32_bits_and_muon_finds_its_matrices(tmp_path: Path) -> None:
    sides = {"low": [{"class_path": "LowBitOptimizer"}], "muon": [{"class_path": "Muon"}]}
    embeddings = (256 + 64) * 64
    state = {}
    for name, callbacks in sides.items():
        config, out = tmp_path / f"{name}.yaml", tmp_path / f"{name}.json"
        config.write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
        command = ["plan", *EXAMPLE, "--config", str(config), "--device-memory", "8GiB", "--states-only"]
        assert main([*command, "--json", str(out)]) == 0
        state[name] = rows(out)["ddp"]["state"]
    assert state["low"] == pytest.approx(embeddings * 8 + (PARAMETERS / 4 - embeddings) * 2.03, rel=0.04)
    assert state["muon"] <= 2.001 * PARAMETERS


def test_accumulation_keeps_gradients(planner: Planner) -> None:
    once, more = planner.row("accel_fsdp2"), planner.row("accel_fsdp2", accumulate_grad_batches=4)
    assert more["gradients"] == 3 * LAYER * 4 == pytest.approx(2 * once["gradients"], rel=1e-3)
    for factor, gradients in ((1, once["gradients"]), (2, more["gradients"])):
        callback = {"class_path": "GradientAccumulation", "init_args": {"factor": factor}}
        assert planner.row("accel_fsdp2", callbacks=[callback])["gradients"] == gradients


def test_micro_batches(planner: Planner) -> None:
    def micro(size: Any) -> dict[str, Any]:
        return {"class_path": "MicroBatching", "init_args": {"size": size}}

    whole = planner.row("ddp")
    for size, fraction in ((4, 1 / 4), (12, 1 / 2), (64, 1)):  # 16 samples are two micro-batches of 8 for a size of 12
        row = planner.row("ddp", callbacks=[micro(size)])
        assert row["activations"] == pytest.approx(fraction * whole["activations"], rel=1e-3)
    found = planner("--batch-size", "32", callbacks=[micro(8)])
    assert found["batch_size"] == 8 and found["strategies"][3]["gradients"] == 3 * LAYER * 4
    found = planner(callbacks=[micro("auto")])
    assert found["strategies"][0]["activations"] == whole["activations"]
    assert any("MicroBatching learns its size" in note for note in found["notes"])


def test_the_optimizer_in_the_backward_pass(planner: Planner) -> None:
    inside, largest = {"class_path": "OptimizerInBackward"}, 4 * 512 * 512 * 4
    plain, found = planner(devices=1), planner(callbacks=[inside], devices=1)
    before, after = plain["strategies"][0], found["strategies"][0]
    assert after["gradients"] == largest and before["total"] > after["total"] + 2 * LAYER * 4
    assert {row["refusal"] for row in found["strategies"] if "zero" in row["strategy"]} == {
        "not with OptimizerInBackward"
    }
    advice = planner("--device-memory", "10MiB", callbacks=[inside])["advice"]
    assert any("and without OptimizerInBackward" in item["text"] for item in advice)
    assert not any(item["text"].startswith("OptimizerInBackward") for item in advice)
    off = {"class_path": "OptimizerInBackward", "init_args": {"enabled": False}}
    assert planner(callbacks=[off], devices=1)["strategies"] == plain["strategies"]


def test_batches_from_the_command_line(planner: Planner) -> None:
    own = planner.row("ddp")["activations"]
    for shape in ("16x512", "x=32x512:float32"):
        scale = 2 if "32x" in shape else 1
        found = planner.row("ddp", "--input", shape, data=None)
        assert found["activations"] == pytest.approx(scale * own, rel=1e-3)
    assert planner.row("ddp", "--batch-size", "32")["activations"] == pytest.approx(2 * own, rel=1e-3)
    assert planner.row("ddp", "--states-only", data="Missing")["activations"] == 0


def test_what_strategies_refuse(planner: Planner) -> None:
    refusals = {row["strategy"]: row["refusal"] for row in planner(model="TwoOptimizers")["strategies"]}
    assert refusals["accel_zero2"] == "several optimizers" and not refusals["ddp"] and not refusals["accel_fsdp2"]
    refusals = {row["strategy"]: row["refusal"] for row in planner(model="WithAdafactor")["strategies"]}
    assert refusals["accel_fsdp2"] == "not with Adafactor" and not refusals["accel_zero2"]


def test_a_module_that_needs_values_is_made_on_the_cpu(planner: Planner) -> None:
    found, plain = planner(model="RealWork"), planner()
    assert found["strategies"] == plain["strategies"]
    assert any("made on the CPU" in note and "device='cpu'" in note for note in found["notes"])


def test_without_deepspeed(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("deepspeed" in note for note in planner()["notes"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert any("pip install 'lightning-accel[deepspeed]'" in note for note in planner()["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "NoStep"}, "NoStep has no training_step"),
        ({"model": "Broken"}, "Broken can't be made (ValueError: nothing works)"),
        ({"model": "WithLBFGS"}, "LBFGS keeps a history"),
        ({"data": "Missing"}, "no data/train.bin"),
        ({"data": None}, "--input 8x1024:int64"),
        ({"precision": "64-true"}, "`precision`"),
        ({"strategy": {"class_path": "lightning_accel.ZeROStrategy", "init_args": {"stage3": {"nope": 1}}}}, "nope"),
    ],
    ids=str,
)
def test_what_can_not_be_planned(options: dict[str, Any], message: str, planner: Planner) -> None:
    try:
        planner(**options)
        status = planner.status
    except SystemExit as stop:
        status = stop.code
        planner.error = planner.capsys.readouterr().err
    assert status == 2 and message in " ".join(planner.error.split())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("--device-memory", value) for value in ("80", "80 bananas", "abc", "0GiB", "-1GiB")),
        *(("--devices", value) for value in ("0", "-1", "two")),
        *(("--nodes", "0"), ("--headroom", "1"), ("--batch-size", "-1"), ("--config", "no_such.yaml")),
        *(("--input", value) for value in ("8x", "8x8:int65", "x")),
    ],
)
def test_bad_arguments(argument: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"--config": EXAMPLE[1], "--devices": "2", "--device-memory": "8GiB", argument: value}
    try:
        status = main(["plan", *(f"{name}={word}" for name, word in arguments.items())])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert value in error and (argument in error or value.endswith(".yaml"))


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), (" 1.5 MiB", 1.5 * MIB)])
def test_sizes(text: str, size: float) -> None:
    from lightning_accel.cli.plan import parse_memory

    assert parse_memory(text) == size
