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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from lightning_accel.errors import require
from lightning_accel.strategies.process_group import explain_lost_peer, init_process_group
from lightning_accel.strategies.zero_checkpoints import ZeROCheckpoints
from lightning_accel.strategies.zero_config import OffloadOptimizer, OffloadParameters, engine_config, read_config

__all__ = ["ZeROStrategy"]


class ZeROPrecision(DeepSpeedPrecision):
    """Precision under DeepSpeed: real autocast for ``bf16-mixed``, and clipping whoever asks for it."""

    def __init__(self, precision: Any) -> None:
        super().__init__(precision)
        self.device_type = "cpu"
        self.clip: tuple[float, GradClipAlgorithmType] | None = None

    @property
    def autocast(self) -> bool:
        """Whether the module stays in fp32 and its operations run in bfloat16."""
        return self.precision == "bf16-mixed"

    def convert_input(self, data: Any) -> Any:
        """Autocast converts what it needs by itself."""
        return data if self.autocast else super().convert_input(data)

    def forward_context(self) -> AbstractContextManager[None]:
        """Autocast also for code that runs outside the engine's forward."""
        return torch.autocast(self.device_type, torch.bfloat16) if self.autocast else nullcontext()

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip in the step that follows, where the gradients are reduced and in fp32."""
        self.clip = (float(clip_val or 0.0), GradClipAlgorithmType(gradient_clip_algorithm or "norm"))

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the closure, then the engine's step."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException("LBFGS evaluates the loss several times in a step. Use strategy='ddp'.")
        result = closure()
        self._after_closure(model, optimizer)
        if model.automatic_optimization and result is None:
            raise MisconfigurationException(
                "`training_step` returned None. Ranks that skip a batch leave the others waiting in a collective: "
                "return a loss of zero instead, `sum(p.sum() for p in self.parameters()) * 0.0`."
            )
        norm = clip_value = 0.0
        if self.clip is not None:
            amount, algorithm = self.clip
            norm, clip_value = (amount, 0.0) if algorithm == GradClipAlgorithmType.NORM else (0.0, amount)
            self.clip = None
        engine: Any = model.trainer.model
        engine.optimizer.clip_grad = norm
        base = engine.basic_optimizer
        if not clip_value:
            engine.step()
            return result
        handle = base.register_step_pre_hook(lambda optimizer, args, kwargs: _clip_by_value(optimizer, clip_value))
        try:
            engine.step()
        finally:
            handle.remove()
        return result


def _clip_by_value(optimizer: Optimizer, clip_value: float) -> None:
    """Clip the fp32 partitions: reduced, unscaled, and elementwise, so a partition is as good as the whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_value_(parameters, clip_value)


class ZeROStrategy(ZeROCheckpoints):
    """DeepSpeed's ZeRO with the numbers of DDP, on the CPU (gloo) and on CUDA (nccl).

    Args:
        stage: What is split over the ranks: 1 the optimizer's state and master weights, 2 the gradients too, 3 the
            parameters too. 2 where neither this nor ``config`` says.
        offload_optimizer: Where optimizer state and master weights live.
        offload_parameters: Where parameters live between their uses (stage 3).
        config: More of DeepSpeed's configuration, a dictionary or the path of a JSON file; it is copied.
        accelerator: See Lightning's ``DeepSpeedStrategy``.
        parallel_devices: See Lightning's ``DeepSpeedStrategy``.
        cluster_environment: See Lightning's ``DeepSpeedStrategy``.
        precision_plugin: See Lightning's ``DeepSpeedStrategy``.
        process_group_backend: See Lightning's ``DeepSpeedStrategy``.
        timeout: How long a collective waits for the other ranks, in seconds.
    """

    strategy_name = "accel_zero"

    def __init__(
        self,
        stage: Literal[1, 2, 3] | None = None,
        offload_optimizer: OffloadOptimizer | Literal["none", "cpu", "nvme"] = "none",
        offload_parameters: OffloadParameters | Literal["none", "cpu", "nvme"] = "none",
        config: dict[str, Any] | str | Path | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        if isinstance(offload_optimizer, str):
            offload_optimizer = OffloadOptimizer(device=offload_optimizer)
        if isinstance(offload_parameters, str):
            offload_parameters = OffloadParameters(device=offload_parameters)
        base = engine_config(
            stage,
            {"offload_optimizer": offload_optimizer, "offload_param": offload_parameters},
            read_config(config),
        )
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
        self._seconds = timeout
        self._base_config = base
        self.config = copy.deepcopy(base)

    @property
    def precision_plugin(self) -> Precision:
        """The precision; Lightning's own for DeepSpeed is replaced by one with real autocast."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) is DeepSpeedPrecision:
            plugin = ZeROPrecision(plugin.precision)
        self._precision_plugin = plugin

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning counts windows and divides the loss, as it does for DDP."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to block: the engine reduces in its step, or per backward where gradients are split."""
        yield

    def setup_environment(self) -> None:
        """Start the processes' group on the CPU or on CUDA."""
        if not isinstance(self.accelerator, (CPUAccelerator, CUDAAccelerator)):
            raise MisconfigurationException(
                f"ZeROStrategy runs on the CPU and on CUDA, but the accelerator is {type(self.accelerator).__name__}. "
                "Set Trainer(accelerator='cpu') or Trainer(accelerator='cuda')."
            )
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Join the other ranks."""
        self.set_world_ranks()
        self._prepare_deepspeed()
        self._init_process_group()
        self._init_deepspeed_distributed()

    def _prepare_deepspeed(self) -> None:
        """Point DeepSpeed at this run's device, and let it forget what a finished run left behind."""
        import deepspeed
        from deepspeed.accelerator import get_accelerator, set_accelerator

        # An op that only inference uses, but that is compiled (87 s) at every start on a CPU
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.root_device.type == "cpu" and get_accelerator().device_name() != "cpu":
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())
        _forget_stale_groups()

    def _init_process_group(self) -> None:
        """Make the process group that DeepSpeed then finds: one that a restarted run can join."""
        assert self.cluster_environment is not None
        cuda = self.root_device.type == "cuda"
        init_process_group(
            self.cluster_environment,
            self._get_process_group_backend(),
            timeout=self._seconds,
            device_id=self.root_device if cuda else None,
        )

    def _format_config(self) -> None:
        """The engine's configuration for this run, from a fresh copy of the strategy's own."""
        config = self.config = copy.deepcopy(self._base_config)
        config["gradient_accumulation_steps"] = 1
        config["managed_gradient_accumulation"] = False  # `engine.step` reduces and steps, and only that
        config["gradient_clipping"] = 0.0  # set before each step, see ZeROPrecision
        precision = self.precision_plugin.precision
        if precision == "bf16-mixed":
            # no `safe modules`: their gradients would be reduced in bfloat16, unlike DDP's
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        elif precision == "bf16-true":
            config["bf16"] = {"enabled": True}
        elif precision in ("16-mixed", "16-true"):
            if self.root_device.type == "cpu":
                raise MisconfigurationException(
                    f"precision={precision!r} is float16 throughout in DeepSpeed, which it does not support on the "
                    "CPU. Use precision='bf16-mixed'."
                )
            config["fp16"] = {"enabled": True, **config.get("fp16", {})}
        if isinstance(self.precision_plugin, ZeROPrecision):
            self.precision_plugin.device_type = self.root_device.type

    def init_deepspeed(self) -> None:
        """Make the engine for training, or for evaluation."""
        assert self.lightning_module is not None
        assert isinstance(self.model, LightningModule)
        if self.lightning_module.trainer.training:
            self._initialize_deepspeed_train(self.model)
        else:
            self._initialize_deepspeed_inference(self.model)

    def _setup_model_and_optimizer(
        self, model: torch.nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        """Make the engine. Schedulers stay with Lightning."""
        import deepspeed

        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero_optimizer

    def _initialize_deepspeed_inference(self, model: torch.nn.Module) -> None:
        """Make an engine without an optimizer; the module's own hooks stay."""
        import deepspeed

        assert isinstance(self.config, dict)
        config = {key: value for key, value in self.config.items() if key != "optimizer"}
        if not self.zero_stage_3:
            config.pop("zero_optimization")
        else:
            config["zero_optimization"].pop("offload_optimizer", None)
        self.model, _, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=config,
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank is gone, where that is the cause."""
        explain_lost_peer(exception)
        super().on_exception(exception)

    def teardown(self) -> None:
        """Let go of the engine and of its hooks on the module."""
        if isinstance(self.model, torch.nn.Module) and not isinstance(self.model, LightningModule):
            engine: Any = self.model
            engine.module_forward_pre_hook.remove()
            engine.module_forward_post_hook.remove()
            engine.destroy()
            self.model = self.lightning_module
        self._config_initialized = False
        super().teardown()


def _forget_stale_groups() -> None:
    """Drop DeepSpeed's handles of process groups that ended with an earlier run in this process."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    if torch.distributed.is_initialized():
        try:
            torch.distributed.get_rank(groups._WORLD_GROUP)
            return
        except ValueError:  # made for a group that was destroyed since
            pass
    groups._release_process_group_references()
    comm.cdb = None
