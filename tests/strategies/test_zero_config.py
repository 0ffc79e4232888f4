"""The options of ZeRO: checked, merged with a caller's configuration, and turned into DeepSpeed's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_accel.strategies.zero import ZeROStrategy
from lightning_accel.strategies.zero_config import (
    ZERO_NAMES,
    Communication,
    OffloadOptimizer,
    OffloadParameters,
    Section,
    Stage3,
    ZenFlow,
    ZeROPlusPlus,
    zero_bytes,
)
from lightning_accel.strategies.zero_merge import KNOWN_KEYS, as_section, engine_config, read_config

SECTIONS: list[type[Section]] = [OffloadOptimizer, OffloadParameters, Communication, Stage3, ZeROPlusPlus, ZenFlow]


def zero(strategy: ZeROStrategy) -> dict[str, Any]:
    return strategy.config["zero_optimization"]  # type: ignore[index,no-any-return]  # Lightning types it as optional


def test_defaults() -> None:
    config = engine_config(None, config={})
    assert config == {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,
    }


def test_every_option_is_read_by_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    strategy = ZeROStrategy(
        stage=3,
        offload_optimizer={"device": "cpu", "pin_memory": False, "ratio": 0.5, "super_offload": True, "cpu_cores": 0.5},
        offload_parameters={"device": "nvme", "buffer_count": 3, "buffer_size": 10, "max_in_cpu": 7},
        nvme_path="/disk",
        communication={"dtype": "bf16", "overlap": False, "reduce_bucket": 100, "allgather_bucket": 200},
        stage3={"persistence_threshold": 1, "max_live_parameters": 2, "max_reuse_distance": 3, "prefetch_bucket": 4},
        zero_plus_plus={"quantized_weights": True, "quantized_gradients": True, "hpz_partition_size": 2},
    )
    assert strategy.config["communication_data_type"] == "bf16"
    read = DeepSpeedZeroConfig(**zero(strategy))
    assert read.stage == 3 and read.overlap_comm is False
    assert (read.reduce_bucket_size, read.allgather_bucket_size) == (100, 200)
    assert (read.param_persistence_threshold, read.max_live_parameters) == (1, 2)
    assert (read.max_reuse_distance, read.prefetch_bucket_size) == (3, 4)
    assert read.zero_quantized_weights and read.zero_quantized_gradients and read.zero_hpz_partition_size == 2
    offload = read.offload_optimizer
    assert (offload.device, offload.ratio, offload.super_offload, offload.pin_memory) == ("cpu", 0.5, True, False)
    assert offload.cpuadam_cores_perc == 0.5
    assert str(read.offload_param.nvme_path) == "/disk" and read.offload_param.buffer_size == 10
    zenflow = ZeROStrategy(offload_optimizer="cpu", zenflow={"topk_ratio": 0.2, "update_interval": 2})
    read = DeepSpeedZeroConfig(**zero(zenflow)).zenflow
    assert (read.topk_ratio, read.update_interval, read.select_strategy) == (0.2, 2, "step")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_an_option_is_known_to_deepspeed(section: type[Section]) -> None:
    known: Any = KNOWN_KEYS
    for name in section.within:
        known = known[name]
    for option in section.options():
        key = option.metadata["key"]
        assert key.removeprefix("/") in (KNOWN_KEYS if key.startswith("/") else known)


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def names(model: Any) -> set[str]:
        fields = model.model_fields.items()
        return {field.alias or name for name, field in fields if not (field.json_schema_extra or {}).get("deprecated")}

    assert names(DeepSpeedZeroConfig) - {"legacy_stage1"} == set(KNOWN_KEYS["zero_optimization"])
    for name in ("offload_optimizer", "offload_param", "zenflow", "leaf_module"):
        annotation = DeepSpeedZeroConfig.model_fields[name].annotation
        model = next(
            (kind for kind in getattr(annotation, "__args__", ()) if hasattr(kind, "model_fields")), annotation
        )
        assert names(model) - {"steps_per_epoch"} == set(KNOWN_KEYS["zero_optimization"][name])
    assert names(DeepSpeedBF16Config) - {"enabled"} == set(KNOWN_KEYS["bf16"])
    assert names(DeepSpeedFP16Config) - {"enabled"} == set(KNOWN_KEYS["fp16"])


def test_config_is_merged_under_the_options_and_never_changed(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 7}, "steps_per_print": 5, "bf16": {}}
    before = copy.deepcopy(config)
    for _ in range(2):  # and it can be used again
        strategy = ZeROStrategy(config=config, stage3={"persistence_threshold": 9})
        assert zero(strategy) == {
            "stage": 3,
            "stage3_prefetch_bucket_size": 7,
            "stage3_param_persistence_threshold": 9,
        }
        assert strategy.config["steps_per_print"] == 5
    strategy.config["zero_optimization"]["stage"] = 1
    assert config == before
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert zero(ZeROStrategy(config=str(path)))["stage"] == 3
    assert zero(ZeROStrategy(stage=3, config=path))["stage3_prefetch_bucket_size"] == 7


WRONG = [
    ({"stage": 4}, ValueError, "Expected `stage` to be one of 1, 2, 3, but got 4."),
    ({"offload_optimizer": "gpu"}, ValueError, "`offload_optimizer.device` to be one of 'none', 'cpu', 'nvme'"),
    ({"offload_optimizer": 3}, TypeError, "Expected `offload_optimizer` to be a mapping of its options, but got 3."),
    ({"offload_optimizer": {"ration": 0.5}}, ValueError, "`offload_optimizer.ration`: did you mean 'ratio'?"),
    ({"stage": 3, "offload_optimizer": {"ratio": 1.5}}, ValueError, "`offload_optimizer.ratio` to be in [0, 1]"),
    ({"communication": {"overlap": "yes"}}, TypeError, "`communication.overlap` to be true or false, but got 'yes'."),
    ({"communication": {"reduce_bucket": 0}}, ValueError, "`communication.reduce_bucket` to be an int of at least 1"),
    ({"stage": 1, "communication": {"overlap": True}}, ValueError, "`communication.overlap` with `stage` 2 or 3"),
    ({"communication": {"dtype": "int8"}}, ValueError, "`communication.dtype` to be one of 'fp32', 'bf16', 'fp16'"),
    ({"stage": 2, "offload_optimizer": "nvme"}, ValueError, "'nvme' with `stage` 3, but got stage 2, which would keep"),
    ({"stage": 3, "offload_optimizer": "nvme"}, ValueError, "`offload_optimizer.nvme_path` to be a folder"),
    (
        {"stage": 2, "offload_parameters": "cpu"},
        ValueError,
        "`offload_parameters` with `stage` 3 only, but got",
    ),
    ({"stage": 2, "zero_plus_plus": {"hpz_partition_size": 2}}, ValueError, "hpz_partition_size` with `stage` 3 only"),
    ({"stage": 2, "stage3": {"prefetch_bucket": 2}}, ValueError, "`stage3_prefetch_bucket_size` with `stage` 3 only"),
    ({"zenflow": {}}, ValueError, "Expected `zenflow` with `offload_optimizer` 'cpu', but got none."),
    (
        {"offload_optimizer": "cpu", "zenflow": {"update_interval": 9, "select_interval": 3}},
        ValueError,
        "`zenflow.select_interval` to be at least `update_interval` (9), but got 3.",
    ),
    (
        {"offload_optimizer": "cpu", "config": {"zero_optimization": {"zenflow": {"update_interval": "auto"}}}},
        ValueError,
        "by 'auto' DeepSpeed divides the loss by zero",
    ),
    ({"trained_later": "head"}, TypeError, "Expected `trained_later` to be a list"),
    ({"start_timeout": -1}, ValueError, "Expected `start_timeout` to be in (0, inf), but got -1."),
    ({"timeout": 0}, ValueError, "Expected `timeout` to be in (0, inf), but got 0."),
    ({"config": 3}, TypeError, "Expected `config` to be a mapping or the path of a JSON file, but got 3."),
    ({"config": "nowhere.json"}, ValueError, "Expected `config` to be a file that can be read, but got 'nowhere.json'"),
    ({"config": {"zero_optimisation": {}}}, ValueError, "`config['zero_optimisation']`: did you mean 'zero_optimizat"),
    (
        {"config": {"zero_optimization": {"offload_optimizer": {"devize": "cpu"}}}},
        ValueError,
        "`config['zero_optimization']['offload_optimizer']['devize']`: did you mean 'device'?",
    ),
    (
        {"config": {"zero_optimization": True}},
        TypeError,
        "`config['zero_optimization']` to be a mapping, but got",
    ),
    ({"config": {"gradient_clipping": 1.0}}, ValueError, "Trainer(gradient_clip_val=...) says it."),
    ({"config": {"bf16": {"enabled": True}}}, ValueError, "Trainer(precision='bf16-true') says it."),
    ({"config": {"gradient_accumulation_steps": 2}}, ValueError, "Trainer(accumulate_grad_batches=...) says it."),
    ({"config": {"steps_per_print": "auto"}}, ValueError, "to be a value, but got 'auto'"),
    (
        {"stage": 3, "config": {"zero_optimization": {"stage": 2}}},
        ValueError,
        "`stage` and `config['zero_optimization']['stage']` to agree, but got 3 and 2: remove one of them.",
    ),
    (
        {"offload_optimizer": "cpu", "config": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
        ValueError,
        "`offload_optimizer.device` and `config['zero_optimization']['offload_optimizer']['device']` to agree",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        ZeROStrategy(**arguments)
    assert message in str(caught.value)


def test_a_json_file_must_hold_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ValueError, match=r"to hold a mapping, but .* holds list"):
        read_config(tmp_path / "list.json")
    with pytest.raises(ValueError, match="to be a JSON file, but"):
        read_config(tmp_path / "no.json")


@pytest.mark.parametrize("name", ZERO_NAMES)
def test_the_names_make_strategies(name: str) -> None:
    arguments = ZERO_NAMES[name]
    made = zero(ZeROStrategy(**arguments))
    assert made["stage"] == arguments["stage"] and str(made["stage"]) in name
    assert made.get("offload_optimizer", {}).get("device", "none") == arguments.get("offload_optimizer", "none")


def test_an_option_may_be_an_object_a_mapping_or_a_word() -> None:
    made = [
        as_section(OffloadOptimizer, value, short="device") for value in ("cpu", {"device": "cpu"}, OffloadOptimizer())
    ]
    assert made[0] == made[1] == made[2]
    assert as_section(Stage3, None) is None


def test_the_folder_is_shared_and_the_callers_options_stay_as_they_are() -> None:
    given = OffloadOptimizer(device="nvme")
    strategy = ZeROStrategy(3, given, OffloadParameters(device="nvme", nvme_path="/other"), nvme_path="/disk")
    assert zero(strategy)["offload_optimizer"]["nvme_path"] == "/disk"
    assert zero(strategy)["offload_param"]["nvme_path"] == "/other"
    assert given.nvme_path is None


def test_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ZeROStrategy, "strategy")
    path = tmp_path / "strategy.yaml"
    path.write_text(
        "stage: 3\noffload_optimizer: cpu\noffload_parameters:\n  device: cpu\n  pin_memory: false\n"
        "stage3:\n  persistence_threshold: 0\ncommunication:\n  dtype: fp32\n"
        "config:\n  steps_per_print: 10\n"
    )
    parsed = parser.parse_args([f"--strategy={path}"])
    strategy = parser.instantiate_classes(parsed).strategy
    assert zero(strategy) == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu", "pin_memory": False},
        "stage3_param_persistence_threshold": 0,
    }
    assert strategy.config["steps_per_print"] == 10


def test_bytes_by_the_formula() -> None:
    assert sum(zero_bytes(100, 0, 2).values()) == 1600  # DDP: 4 + 4 + 8 an element
    assert zero_bytes(100, 1, 2) == {"parameters": 400, "gradients": 400, "master": 200, "state": 400}
    assert zero_bytes(100, 2, 4, parameter_bytes=2) == {"parameters": 200, "gradients": 50, "master": 100, "state": 200}
    assert zero_bytes(100, 3, 4, trainable=40, state_bytes=4) == {
        "parameters": 100,
        "gradients": 40,
        "master": 40,
        "state": 40,
    }
