"""From the options of ZeRO and a caller's own configuration to the configuration that DeepSpeed reads.

Dictionaries in, a new dictionary out: the caller's are left as they were.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_accel.errors import check_choice
from lightning_accel.strategies.zero_config import Section

__all__ = ["as_section", "engine_config", "read_config"]

_FREE: dict[str, Any] = {}  # a section whose keys are left to DeepSpeed


def _values(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split())


_OFFLOAD = "device nvme_path buffer_count pin_memory "
_ZERO = {
    **_values(
        "stage allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients elastic_checkpoint "
        "enable_sanity_checks ignore_unused_parameters load_from_fp32_weights log_trace_cache_warnings "
        "memory_efficient_linear overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint "
        "reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory "
        "stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_max_live_parameters "
        "stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold "
        "stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params "
        "sub_group_size use_multi_rank_bucket_allreduce zero_hpz_partition_size zero_quantized_gradients "
        "zero_quantized_nontrainable_weights zero_quantized_weights"
    ),
    "leaf_module": _values("classes names name_suffixes"),
    "offload_param": _values(_OFFLOAD + "buffer_size max_in_cpu"),
    "offload_optimizer": _values(
        _OFFLOAD + "pipeline_read pipeline_write fast_init ratio super_offload cpuadam_cores_perc"
    ),
    "zenflow": _values(
        "topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
        "full_warm_up_rounds pt_reserved_cores_perc"
    ),
}
KNOWN_KEYS: dict[str, Any] = {
    **_values(
        "communication_data_type disable_allgather disable_python_gc dump_state gradient_allreduce_op "
        "gradient_predivide_factor log_level memory_breakdown prescale_gradients steps_per_print "
        "train_micro_batch_size_per_gpu wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
    ),
    "zero_optimization": _ZERO,
    "activation_checkpointing": _values(
        "partition_activations number_checkpoints contiguous_memory_optimization synchronize_checkpoint_boundary "
        "profile cpu_checkpointing"
    ),
    "aio": _values("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    "bf16": _values("immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"),
    "fp16": _values(
        "auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale "
        "fp16_master_weights_and_grads"
    ),
    "torch_autocast": _values("lower_precision_safe_modules"),
    "data_types": _values("grad_accum_dtype buffer_dtype keep_in_fp32_modules"),
    "optimizer": _values("type params legacy_fusion"),
    "scheduler": _values("type params"),
    **dict.fromkeys(
        ("checkpoint", "comms_logger", "compile", "csv_monitor", "comet", "flops_profiler", "tensorboard", "timers"),
        _FREE,
    ),
    "wandb": _FREE,
}
"""What DeepSpeed 0.19 reads, without what Lightning decides; None for a value, a mapping for a section."""

_AUTO = {  # where DeepSpeed itself reads "auto"
    ("data_types", "keep_in_fp32_modules"),
    *(("zero_optimization", "zenflow", key) for key in ("select_strategy", "select_interval", "update_interval")),
}
BELONGS_TO_TRAINER = {
    ("gradient_accumulation_steps",): "Trainer(accumulate_grad_batches=...)",
    ("managed_gradient_accumulation",): "Trainer(accumulate_grad_batches=...)",
    ("gradient_clipping",): "Trainer(gradient_clip_val=...)",
    ("train_batch_size",): "the DataLoader's `batch_size`",
    ("bf16", "enabled"): "Trainer(precision='bf16-true')",
    ("fp16", "enabled"): "Trainer(precision='16-mixed')",
    ("torch_autocast", "enabled"): "Trainer(precision='bf16-mixed')",
    ("torch_autocast", "dtype"): "Trainer(precision='bf16-mixed')",
}
"""Keys that are refused, and what says the same."""

S = TypeVar("S", bound=Section)


def as_section(kind: type[S], value: Any, short: str = "") -> S | None:
    """An argument as a section: one already, a dictionary, or the value of its field ``short``; None stays None.

    Raises:
        TypeError: If it is something else.
        ValueError: If a value or a key is wrong.
    """
    if value is None or isinstance(value, kind):
        return value
    if isinstance(value, str) and short:
        return kind(**{short: value})
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected `{kind.name}` to be a mapping of its options, but got {value!r}.")
    known = [option.name for option in kind.options()]
    for key in value:
        if key not in known:
            raise ValueError(_unknown(f"{kind.name}.{key}", str(key), known))
    return kind(**value)


def engine_config(stage: int | None, *sections: Section | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration: the typed options over ``config``, over the defaults of this package.

    Args:
        stage: 1, 2 or 3; None for what ``config`` says, or 2.
        sections: The options; None for none.
        config: The caller's own DeepSpeed configuration; it is not changed.

    Raises:
        TypeError: If a section of ``config`` is no mapping.
        ValueError: If a key of ``config`` is unknown, belongs to the Trainer, or says something else than an option;
            or if options can't go together.
    """
    merged = _checked(config)
    if stage is not None:
        _put(merged, ("zero_optimization", "stage"), "stage", check_choice("stage", stage, (1, 2, 3)))
    for section in filter(None, sections):
        if getattr(section, "device", "") == "none":  # what the argument is without being given
            continue
        for path, option, value in section.leaves():
            _put(merged, path, option, value)
    zero = merged.setdefault("zero_optimization", {})
    zero.setdefault("stage", 2)
    check_choice("config['zero_optimization']['stage']", zero["stage"], (1, 2, 3))
    merged.setdefault("zero_allow_untested_optimizer", True)
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    merged.setdefault("train_micro_batch_size_per_gpu", 1)  # DeepSpeed only reports its speed by it
    _check_combinations(merged)
    return merged


def read_config(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """A caller's configuration, from a dictionary or a JSON file; a copy.

    Raises:
        TypeError: If it is neither.
        ValueError: If the file is missing or not JSON.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if not isinstance(config, (str, Path)):
        raise TypeError(f"Expected `config` to be a mapping or the path of a JSON file, but got {config!r}.")
    try:
        loaded = json.loads(Path(config).read_text())
    except OSError as error:
        raise ValueError(
            f"Expected `config` to be a file that can be read, but got {str(config)!r}: {error}."
        ) from None
    except ValueError as error:
        raise ValueError(f"Expected `config` to be a JSON file, but {str(config)!r} is none: {error}.") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"Expected `config` to hold a mapping, but {str(config)!r} holds {type(loaded).__name__}.")
    return loaded


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` under DeepSpeed's present names, with known keys only."""
    merged = copy.deepcopy(dict(config))
    zero = merged.get("zero_optimization")
    if isinstance(zero, dict):
        for key in list(zero):  # DeepSpeed takes these with and without the prefix
            if key not in _ZERO and f"stage3_{key}" in _ZERO:
                zero[f"stage3_{key}"] = zero.pop(key)
    _check_keys(merged, KNOWN_KEYS, ())
    return merged


def _check_keys(config: Mapping[str, Any], known: Mapping[str, Any], path: tuple[str, ...]) -> None:
    for key, value in config.items():
        here = (*path, key)
        name = "config" + "".join(f"[{part!r}]" for part in here)
        if here in BELONGS_TO_TRAINER:
            raise ValueError(f"Expected `config` without {name}: {BELONGS_TO_TRAINER[here]} says it.")
        if key not in known:
            raise ValueError(_unknown(name, str(key), known))
        if isinstance(known[key], dict):
            if not isinstance(value, Mapping):
                raise TypeError(f"Expected `{name}` to be a mapping, but got {value!r}.")
            if known[key]:
                _check_keys(value, known[key], here)
        elif value == "auto" and here not in _AUTO:
            raise ValueError(f"Expected `{name}` to be a value, but got 'auto', which other libraries replace.")


def _unknown(name: str, key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}."
    return f"Expected a known option, but got `{name}`: {hint}"


def _put(config: dict[str, Any], path: tuple[str, ...], option: str, value: Any) -> None:
    """Set a leaf, unless the caller's configuration has another value there."""
    *sections, key = path
    for name in sections:
        config = config.setdefault(name, {})
    if config.get(key, value) != value:
        raise ValueError(_disagree(option, value, path, config[key]))
    config[key] = value


def _disagree(option: str, value: Any, path: tuple[str, ...], other: Any) -> str:
    where = "config" + "".join(f"[{part!r}]" for part in path)
    return f"Expected `{option}` and `{where}` to agree, but got {value!r} and {other!r}: remove one of them."


def _check_combinations(config: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed refuses late, or takes without doing it."""
    zero = config["zero_optimization"]
    stage = zero["stage"]
    optimizer, parameters = zero.get("offload_optimizer", {}), zero.get("offload_param", {})
    for name, section in (("offload_optimizer", optimizer), ("offload_parameters", parameters)):
        if section.get("device") == "nvme":
            if stage != 3:
                raise ValueError(
                    f"Expected `{name}` 'nvme' with `stage` 3, but got stage {stage}, which would keep everything in "
                    "main memory: use 'cpu', or stage 3."
                )
            if not section.get("nvme_path"):
                raise ValueError(f"Expected `{name}.nvme_path` to be a folder on the disk, but got None.")
    only_stage_3 = {
        "`offload_parameters`": parameters.get("device", "none") != "none",
        "`offload_optimizer.ratio`": optimizer.get("ratio", 1) != 1,
        "`offload_optimizer.super_offload`": optimizer.get("super_offload"),
        "`zero_plus_plus.quantized_weights`": zero.get("zero_quantized_weights"),
        "`zero_plus_plus.quantized_nontrainable_weights`": zero.get("zero_quantized_nontrainable_weights"),
        "`zero_plus_plus.quantized_gradients`": zero.get("zero_quantized_gradients"),
        "`zero_plus_plus.hpz_partition_size`": zero.get("zero_hpz_partition_size", 1) != 1,
        **{f"`{key}`": True for key in zero if key.startswith("stage3_") and key != _SAVING},
    }
    for name, used in only_stage_3.items():
        if used and stage != 3:
            raise ValueError(f"Expected {name} with `stage` 3 only, but got stage {stage}.")
    if zero.get("overlap_comm") and stage == 1:
        raise ValueError(
            "Expected `communication.overlap` with `stage` 2 or 3, but got stage 1, which reduces in the step."
        )
    if optimizer.get("super_offload") and optimizer.get("device") != "cpu":
        raise ValueError("Expected `offload_optimizer.super_offload` with `device` 'cpu', but got another device.")
    if zenflow := zero.get("zenflow"):
        if optimizer.get("device") != "cpu":
            raise ValueError("Expected `zenflow` with `offload_optimizer` 'cpu', but got none.")
        if not isinstance(zenflow.get("update_interval"), int):
            raise ValueError(
                "Expected `zenflow.update_interval` to be an int of at least 1, but got "
                f"{zenflow.get('update_interval')!r}: by 'auto' DeepSpeed divides the loss by zero."
            )
        if zenflow.get("select_interval", 0) < zenflow["update_interval"]:
            raise ValueError(
                f"Expected `zenflow.select_interval` to be at least `update_interval` ({zenflow['update_interval']}), "
                f"but got {zenflow.get('select_interval')!r}."
            )


_SAVING = "stage3_gather_16bit_weights_on_model_save"  # says how to save, and does no harm elsewhere
