"""Gradients in a DeepSpeed engine that no optimizer step has used: to be saved, put back, and let go of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["clear_gradients", "load_partial_gradients", "partial_gradients"]

_ACCUMULATED = " (accumulated)"  # stage 1, in another dtype than the parameter's
_STAGE_2, _STAGE_3 = " (stage 2)", "all (stage 3)"


def partial_gradients(engine: Any) -> dict[str, Tensor]:
    """Copies, on the CPU, of this rank's gradients that wait for the end of an accumulation window.

    At stage 1 whole ones, not yet reduced; at stages 2 and 3 this rank's part of the reduced ones.
    """
    return {key: gradient.detach().cpu().clone() for key, gradient in _gradients(engine)}


def _gradients(engine: Any) -> Iterator[tuple[str, Tensor]]:
    optimizer, names = engine.optimizer, engine.param_names
    if engine.zero_optimization_partition_weights():
        yield _STAGE_3, optimizer.grad_partitions_flat_buffer
        return
    if not engine.zero_optimization_partition_gradients():
        for parameter, name in names.items():
            for suffix, attribute in (("", "grad"), (_ACCUMULATED, "grad_accum")):
                if (gradient := getattr(parameter, attribute, None)) is not None:
                    yield name + suffix, gradient
        return
    for group, members in enumerate(optimizer.params_in_partition):
        if optimizer._use_compact_grad_partition_buffer(group):
            if (buffer := optimizer.averaged_gradients.get(group)) is not None:
                yield f"group {group}{_STAGE_2}", buffer.flat_partition
        elif optimizer.cpu_offload:
            for member in members:
                if (number := optimizer.get_param_id(member)) in optimizer._offload_accumulated_param_ids:
                    yield names[member] + _STAGE_2, optimizer.accumulated_grads_in_cpu[number]
        elif (found := optimizer.all_grad_tensors.get(group)) is not None:
            yield from ((names[member] + _STAGE_2, value) for member, value in zip(members, found, strict=True))


def load_partial_gradients(engine: Any, gradients: Mapping[str, Tensor]) -> bool:
    """Put back what :func:`partial_gradients` gave, in an engine of the same stage on as many ranks.

    Returns:
        Whether there was anything that belongs into this engine.
    """
    optimizer, names = engine.optimizer, engine.param_names
    if engine.zero_optimization_partition_weights():
        value, flat = gradients.get(_STAGE_3), optimizer.grad_partitions_flat_buffer
        if value is None or value.shape != flat.shape:
            return False
        flat.copy_(value)
        # An unused parameter's gradient is zero here, with which it would be stepped anyway
        used = [parameter.ds_id for group in optimizer.fp16_groups for parameter in group]
        optimizer._offload_boundary_param_ids.update(used)
        optimizer.micro_step_id = 1  # the next backward adds
        return True
    if not engine.zero_optimization_partition_gradients():
        for parameter, name in names.items():
            for suffix, attribute in (("", "grad"), (_ACCUMULATED, "grad_accum")):
                if (value := gradients.get(name + suffix)) is not None:
                    setattr(parameter, attribute, value.to(parameter.device))
        return any(name in gradients or name + _ACCUMULATED in gradients for name in names.values())
    loaded = False
    for group, members in enumerate(optimizer.params_in_partition):
        if optimizer._use_compact_grad_partition_buffer(group):
            if (value := gradients.get(f"group {group}{_STAGE_2}")) is not None:
                optimizer._get_compact_grad_partition_buffer(group).flat_partition.copy_(value)
                loaded = True
            found = {}
        else:
            found = {member: gradients[key] for member in members if (key := names[member] + _STAGE_2) in gradients}
        if optimizer.cpu_offload:
            for member, value in found.items():
                number = optimizer.get_param_id(member)
                optimizer.accumulated_grads_in_cpu[number] = value.flatten()
                optimizer._offload_accumulated_param_ids.add(number)
        elif found:
            optimizer.all_grad_tensors[group] = [found[member].to(member.device) for member in members]
        loaded = loaded or bool(found)
    if loaded:
        optimizer.micro_step_id = 0  # counted up before the next backward, which then adds
    return loaded


def clear_gradients(engine: Any) -> None:
    """Let no gradient up to here count in the next step, also not for a parameter that is not used there.

    Stage 3, and offload, write over the gradients of the parameters that are used: the others would be stepped by what
    was left.
    """
    optimizer = engine.optimizer
    if engine.zenflow:
        return
    left: list[Tensor | None] = []
    if engine.zero_optimization_partition_weights():
        left = [optimizer.grad_partitions_flat_buffer, *(flat.grad for flat in optimizer.fp32_partitioned_groups_flat)]
    elif getattr(optimizer, "cpu_offload", False):
        left = [*optimizer.accumulated_grads_in_cpu.values()]
        left += [flat.grad for flat in optimizer.single_partition_of_fp32_groups]
    else:
        for gradients in (getattr(optimizer, "all_grad_tensors", {}), getattr(optimizer, "averaged_gradients", {})):
            gradients.update(dict.fromkeys(gradients))
    for gradient in left:
        if gradient is not None:
            gradient.zero_()
    getattr(optimizer, "norm_for_param_grads", {}).clear()
