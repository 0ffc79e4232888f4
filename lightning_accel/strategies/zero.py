"""ZeROStrategy: DeepSpeed's ZeRO for any LightningModule, on the CPU and on CUDA, with the numbers of DDP.

Lightning's own strategy drives the engine so that the loss is divided twice under accumulation, the last window of an
epoch is lost, and a changed factor is ignored. Here the engine leaves accumulation to its caller: a backward adds to
the gradients, a step reduces and uses them, and Lightning decides when that is, as it does for DDP.

Paper: ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.errors import check_patterns, require
from lightning_accel.strategies import process_group
from lightning_accel.strategies.zero_checkpoints import ZeROCheckpoints
from lightning_accel.strategies.zero_checks import check_build_locks, check_device, check_same_module, only_one
from lightning_accel.strategies.zero_config import (
    BUCKET_ELEMENTS,
    Communication,
    OffloadOptimizer,
    OffloadParameters,
    Stage3,
    ZenFlow,
    ZeROPlusPlus,
    with_path,
)
from lightning_accel.strategies.zero_engine import (
    ModuleState,
    compiled_ops_explained,
    forget_stale_groups,
    mend_stage_3,
    partitions_of,
    run_config,
)
from lightning_accel.strategies.zero_later import FreezeWatch, LateGroups, all_trainable
from lightning_accel.strategies.zero_merge import as_section, engine_config, read_config
from lightning_accel.strategies.zero_precision import ZeROPrecision

__all__ = ["ZeROStrategy"]


class ZeROStrategy(ZeROCheckpoints):
    """DeepSpeed's ZeRO with the numbers of DDP, on the CPU (gloo) and on CUDA (nccl).

    An argument that is a class of options may be given as a mapping of them, as in YAML. What is left out is
    DeepSpeed's default.

    Args:
        stage: What is split over the ranks: 1 the optimizer's state and the fp32 master weights, 2 the gradients too,
            3 the parameters too. 2 where neither this nor ``config`` says.
        offload_optimizer: Where the optimizer's state lives and the optimizer runs: ``"none"``, ``"cpu"``, ``"nvme"``
            (stage 3), or :class:`OffloadOptimizer`. SuperOffload is there too.
        offload_parameters: Where the parameters live between their uses (stage 3): as above, or
            :class:`OffloadParameters`.
        nvme_path: The folder on the disk, where something is offloaded to ``"nvme"`` and says no other.
        communication: How gradients and parameters travel: :class:`Communication`.
        stage3: How parameters are gathered and let go of: :class:`Stage3`.
        zero_plus_plus: Less on the wire at stage 3: :class:`ZeROPlusPlus`.
        zenflow: A step of the important gradients on the GPU, of the rest on the CPU: :class:`ZenFlow`.
        trained_later: Regular expressions for the names of parameters that are frozen when training starts and
            unfrozen later. What one expression finds must be unfrozen at once; it takes optimizer memory from the
            start.
        config: More of DeepSpeed's configuration, as a mapping or the path of a JSON file. It is copied. It may not
            contradict the options above, nor say what belongs to the Trainer.
        timeout: How long a collective waits for the other ranks, in seconds.
        start_timeout: How long ranks wait for one another at the start, in seconds.
        accelerator: As in Lightning's ``DeepSpeedStrategy``.
        parallel_devices: As in Lightning's ``DeepSpeedStrategy``.
        cluster_environment: As in Lightning's ``DeepSpeedStrategy``.
        precision_plugin: As in Lightning's ``DeepSpeedStrategy``; the Trainer's ``precision`` sets it.
        process_group_backend: As in Lightning's ``DeepSpeedStrategy``.

    Raises:
        ImportError: If deepspeed is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is wrong, contradicts ``config``, or can't go with another.
    """

    strategy_name = "accel_zero"

    def __init__(
        self,
        stage: Literal[1, 2, 3] | None = None,
        offload_optimizer: OffloadOptimizer | Literal["none", "cpu", "nvme"] = "none",
        offload_parameters: OffloadParameters | Literal["none", "cpu", "nvme"] = "none",
        nvme_path: str | None = None,
        communication: Communication | None = None,
        stage3: Stage3 | None = None,
        zero_plus_plus: ZeROPlusPlus | None = None,
        zenflow: ZenFlow | None = None,
        trained_later: list[str] | None = None,
        config: dict[str, Any] | str | Path | None = None,
        timeout: float = 1800.0,
        start_timeout: float = 300.0,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
    ) -> None:
        base = engine_config(
            stage,
            with_path(as_section(OffloadOptimizer, offload_optimizer, short="device"), nvme_path),
            with_path(as_section(OffloadParameters, offload_parameters, short="device"), nvme_path),
            as_section(Communication, communication),
            as_section(Stage3, stage3),
            as_section(ZeROPlusPlus, zero_plus_plus),
            as_section(ZenFlow, zenflow),
            config=read_config(config),
        )
        self._trained_later = check_patterns("trained_later", trained_later or [])
        self._timeouts = process_group.check_timeouts(timeout, start_timeout)
        require("deepspeed", "deepspeed", "ZeROStrategy")
        super().__init__(
            accelerator=accelerator,
            config={},
            logging_level=logging.WARNING,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self._base_config = base
        self.config = copy.deepcopy(base)
        self._module_state: ModuleState | None = None
        self._late: LateGroups | None = None
        self._failed = False

    @property
    def precision_plugin(self) -> Precision:
        """The precision; Lightning's own for DeepSpeed is replaced by :class:`ZeROPrecision`."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) is DeepSpeedPrecision:
            plugin = ZeROPrecision(plugin.precision)
        if plugin is not None and not isinstance(plugin, ZeROPrecision):
            raise MisconfigurationException(
                f"ZeROStrategy can't work with {type(plugin).__name__}: its engine computes gradients and steps by "
                "itself. Leave the plugin out, and set Trainer(precision=...)."
            )
        self._precision_plugin = plugin

    @property
    def _plugin(self) -> ZeROPrecision:
        plugin = self.precision_plugin
        assert isinstance(plugin, ZeROPrecision)
        return plugin

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning counts windows and divides the loss, as it does for DDP."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to block: the engine reduces in its step, or per backward where gradients are split."""
        yield

    def setup_environment(self) -> None:
        """Join the other ranks, on the CPU or on CUDA.

        Raises:
            MisconfigurationException: If the device or what it can't do stands against it.
        """
        if not isinstance(self.accelerator, (CPUAccelerator, CUDAAccelerator)):
            raise MisconfigurationException(
                f"ZeROStrategy runs on the CPU and on CUDA, but the accelerator is {type(self.accelerator).__name__}. "
                "Set Trainer(accelerator='cpu') or Trainer(accelerator='cuda')."
            )
        check_device(self._base_config, self.root_device, self.parallel_devices or [], self.precision_plugin)
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Make the process group, and let DeepSpeed find it."""
        import deepspeed
        from deepspeed.accelerator import get_accelerator, set_accelerator

        reset_seed()
        self.set_world_ranks()
        self._linear = torch.nn.functional.linear  # stage 3 puts its own in its place, for every module
        # An op that only inference uses, but that is compiled (87 s) at every start on a CPU
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.root_device.type == "cpu" and get_accelerator().device_name() != "cpu":
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())
        self._init_process_group()
        forget_stale_groups()
        self._init_deepspeed_distributed()

    def _init_process_group(self) -> None:
        """Make the process group that DeepSpeed then finds: one that a restarted run can join."""
        assert self.cluster_environment is not None
        process_group.init_process_group(
            self.cluster_environment,
            self._get_process_group_backend(),
            **self._timeouts,
            device_id=self.root_device if self.root_device.type == "cuda" else None,
        )

    def _format_config(self) -> None:
        """The engine's configuration for this run, from a fresh copy of the strategy's own."""
        self._plugin.device_type = self.root_device.type
        self.config = run_config(self._base_config, self._plugin.precision)

    def setup(self, trainer: Any) -> None:
        """Make the engine around the module."""
        self._failed = False
        super().setup(trainer)
        process_group.apply_timeout()

    def init_deepspeed(self) -> None:
        """Make the engine for training, or for evaluation."""
        module = self.lightning_module
        assert module is not None
        if "zenflow" in self._base_config["zero_optimization"] and module.trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "ZenFlow has windows of its own (`update_interval`): remove `accumulate_grad_batches` from the Trainer."
            )
        check_same_module(module)
        check_build_locks(self._base_config, self.root_device)
        if module.trainer.training:
            self._initialize_deepspeed_train(module)
        else:
            self._initialize_deepspeed_inference(module)
        self._broadcast_buffers()

    def _initialize_deepspeed_train(self, model: torch.nn.Module) -> None:
        module = self.lightning_module
        assert module is not None
        assert isinstance(self.config, dict)
        optimizer: Optimizer | None = None
        self.optimizers, self.lr_scheduler_configs = [], []
        with compiled_ops_explained():
            if "optimizer" in self.config:
                rank_zero_info("The optimizer is that of DeepSpeed's `config`, not that of `configure_optimizers`.")
            else:
                super(DeepSpeedStrategy, self).setup_optimizers(module.trainer)
                optimizer = only_one(self.optimizers)
                # Lightning's wrapper shares `__del__`, which in DeepSpeedCPUAdam destroys what its step needs
                self._wrapped = self._lightning_optimizers
            if self.lr_scheduler_configs and "scheduler" in self.config:
                raise MisconfigurationException(
                    "`config['scheduler']` and `configure_optimizers` both bring a scheduler: remove one of them."
                )
            engine, zero_optimizer = self._setup_model_and_optimizer(model, optimizer)
        self._set_deepspeed_activation_checkpointing()
        if engine.lr_scheduler is not None:  # from `config`; Lightning steps it
            self.lr_scheduler_configs = [LRSchedulerConfig(engine.lr_scheduler, interval="step")]
            engine.lr_scheduler = None
        self.optimizers = [zero_optimizer]
        self.model = engine

    def _setup_model_and_optimizer(
        self, model: torch.nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        """Make the engine. Schedulers stay with Lightning."""
        assert isinstance(self.config, dict)
        names = {parameter: name for name, parameter in model.named_parameters()}
        late: LateGroups | None = None
        if optimizer is not None:
            no_trained = any(not any(p.requires_grad for p in group["params"]) for group in optimizer.param_groups)
            if self._trained_later or no_trained:
                late = LateGroups(optimizer, names, self._trained_later)
                optimizer = late.inner
        with all_trainable(late.parameters) if late else nullcontext():
            watch = FreezeWatch(optimizer.param_groups if optimizer else [{"params": list(names)}], names, late)
            trained = [parameter for parameter in names if parameter.requires_grad]
            # Buckets no larger than what there is to send: DeepSpeed allocates them in full
            elements = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in trained)
            for key in ("reduce_bucket_size", "allgather_bucket_size"):
                self.config["zero_optimization"].setdefault(key, min(BUCKET_ELEMENTS, elements + elements % 2))
            engine, zero_optimizer = self._make_engine(model, self.config, trained, optimizer)
        self._late = late
        self._plugin.before_step = watch.before_step
        self._plugin.watch(engine)
        return engine, zero_optimizer

    def _initialize_deepspeed_inference(self, model: torch.nn.Module) -> None:
        """Make an engine without an optimizer; the module's own hooks stay."""
        assert isinstance(self.config, dict)
        config = {key: value for key, value in self.config.items() if key not in ("optimizer", "scheduler")}
        zero = config.pop("zero_optimization")
        if self.zero_stage_3:
            left_out = ("offload_optimizer", "zenflow")
            config["zero_optimization"] = {key: value for key, value in zero.items() if key not in left_out}
        self.model, _ = self._make_engine(model, config, [], None)

    def _make_engine(
        self, model: torch.nn.Module, config: dict[str, Any], parameters: list[Any], optimizer: Optimizer | None
    ) -> tuple[Any, Any]:
        import deepspeed

        state = ModuleState(model)
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=config,
            model=model,
            model_parameters=parameters,
            optimizer=optimizer,
            dist_init_required=False,
        )
        if self.zero_stage_3:
            mend_stage_3(engine)
        state.made()
        self._module_state = state
        return engine, zero_optimizer

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, with what schedulers changed since the last step."""
        if self._late is not None:
            self._late.take_over_options()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the module its weights, and in a fit the optimizer its state and its groups' options."""
        super().load_model_state_dict(checkpoint, strict)
        if self._late is not None:
            self._late.give_back_options()

    def weigh_gradients(self, weight: float) -> None:
        """Multiply the gradients of the next optimizer step by ``weight``; no other place reaches all of them."""
        self._plugin.weigh_gradients(weight)

    def partial_gradients(self) -> dict[str, Tensor]:
        """This rank's gradients that wait for the end of an accumulation window, on the CPU."""
        return self._plugin.partial_gradients(self.model)

    def load_partial_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`partial_gradients` gave."""
        self._plugin.load_partial_gradients(self.model, gradients)

    def partitions_of(self, parameters: Sequence[Tensor]) -> list[tuple[int, Tensor, dict[str, Tensor]] | None]:
        """This rank's part of each parameter at stages 1 and 2: see the function of that name."""
        return partitions_of(self.optimizers[0], parameters)

    def _broadcast_buffers(self) -> None:
        """Give every rank the buffers of rank 0, as DDP does: running averages differ otherwise."""
        assert self.lightning_module is not None
        if self.world_size > 1:
            for buffer in self.lightning_module.buffers():
                torch.distributed.broadcast(buffer.data, 0)

    def on_validation_start(self) -> None:
        """Validate with the same running averages on every rank."""
        self._broadcast_buffers()
        super().on_validation_start()

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank is gone, where that is the cause."""
        self._failed = True
        process_group.explain_lost_peer(exception)
        super().on_exception(exception)

    def teardown(self) -> None:
        """Let go of the engine, and leave the module as it was: whole, without hooks.

        A module whose layers ``configure_model`` made split stays split, and so does one after an exception, when
        other ranks may be gone.
        """
        engine: Any = self.model
        if engine is not None and not isinstance(engine, LightningModule):
            state = self._module_state
            keep = state is None or (self.zero_stage_3 and (self._failed or state.split_before))
            whole = {} if keep or state is None else state.whole_parameters()
            engine.module_forward_pre_hook.remove()
            engine.module_forward_post_hook.remove()
            engine.destroy()
            if state is not None and not keep:
                state.restore(whole)
            self.model = self.lightning_module
            torch.nn.functional.linear = self._linear
        self._module_state = self._late = None
        self._config_initialized = False
        super().teardown()
