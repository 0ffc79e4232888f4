"""FullyShardStrategy: torch's FSDP2 over any LightningModule, which needs no ``configure_model`` and no edits.

Parameters, gradients and optimizer state are split over the ranks ("ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054; "PyTorch FSDP", Zhao et al. 2023,
https://arxiv.org/abs/2304.11277). A block's parameters are gathered before its forward and again before its backward;
those of no block are gathered for the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_accel.errors import NoEffectWarning, check_choice, check_int
from lightning_accel.strategies import sharding
from lightning_accel.strategies.fully_shard_checkpoints import FullyShardCheckpoints
from lightning_accel.strategies.process_group import (
    apply_timeout,
    check_timeouts,
    explain_lost_peer,
    init_process_group,
)
from lightning_accel.strategies.wrapping import check_blocks, choose_blocks

__all__ = ["FullyShardStrategy"]

_WHOLE_MATRICES = ("Adafactor", "LBFGS", "Rprop", "SparseAdam")
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")


class FullyShardStrategy(FullyShardCheckpoints):
    """Split parameters, gradients and optimizer state over all ranks, with the numbers of DDP.

    Args:
        blocks: What is gathered and freed one at a time: a list of class names and regular expressions for whole names
            of modules; an int, for repeated layers of at least so many parameters; or ``"auto"``, see
            :func:`~lightning_accel.strategies.wrapping.choose_blocks`.
        reshard_after_forward: Whether a block frees its parameters after its forward, and gathers them again in the
            backward. ``False`` saves that at the price of memory.
        offload: Whether parameters, gradients and optimizer state live in the memory of the host.
        param_dtype: What parameters are gathered and used in under ``precision="bf16-mixed"``: ``"bfloat16"`` halves
            that traffic. ``None``: their own dtype, with which the numbers are those of DDP.
        reduce_dtype: What gradients are reduced in. ``None``: their own dtype.
        replicas: How many groups of ranks there are that each hold the whole model (HSDP).
        save_distributed_checkpoint: ``True``: a checkpoint is a directory into which each rank writes its shards, and
            that any number of ranks resumes from. ``False``: one file, as of DDP, made on rank 0.
        process_group_backend: ``None``: gloo on the CPU, nccl on CUDA.
        timeout: How long a collective waits for the other ranks, in seconds.
        start_timeout: How long ranks wait for one another at the start, in seconds.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = FullyShardStrategy(blocks=["TransformerBlock"])
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
    """

    def __init__(
        self,
        blocks: Literal["auto"] | int | list[str] = "auto",
        reshard_after_forward: bool = True,
        offload: bool = False,
        param_dtype: Literal["bfloat16"] | None = None,
        reduce_dtype: Literal["float32", "bfloat16"] | None = None,
        replicas: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
        start_timeout: float = 300.0,
    ) -> None:
        self.blocks = check_blocks(blocks)
        self.reshard_after_forward = check_choice("reshard_after_forward", reshard_after_forward, (True, False))
        self.offload = check_choice("offload", offload, (True, False))
        self.param_dtype = check_choice("param_dtype", param_dtype, (None, "bfloat16"))
        self.reduce_dtype = check_choice("reduce_dtype", reduce_dtype, (None, "float32", "bfloat16"))
        self.replicas = check_int("replicas", replicas, minimum=1)
        self._timeouts = check_timeouts(timeout, start_timeout)
        self._in_manual_step = False
        self._order: sharding.CallOrder | None = None  # while ranks predict different numbers of batches
        self._batches_left: float = 0
        self._batches_missing = 0
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )

    # --------------------------------------------------------------------------------------------------- starting

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has its own part of the data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Join the other ranks, and lay them out."""
        assert self.accelerator is not None
        assert self.cluster_environment is not None
        self.accelerator.setup_device(self.root_device)
        reset_seed()
        self.set_world_ranks()
        on_cpu = self.root_device.type == "cpu"
        backend = self._process_group_backend or ("gloo" if on_cpu else "nccl")
        if self.offload and backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"  # the norm of gradients in the host's memory is reduced there
        self._process_group_backend = backend
        init_process_group(
            self.cluster_environment,
            backend,
            **self._timeouts,
            device_id=None if on_cpu else self.root_device,
        )
        if self.world_size % self.replicas:
            raise MisconfigurationException(
                f"FullyShardStrategy(replicas={self.replicas}) can't divide {self.world_size} ranks into equal groups: "
                "set `replicas` to a divisor of the number of ranks."
            )
        if self.replicas == 1:
            self._device_mesh = init_device_mesh(self.root_device.type, (self.world_size,), mesh_dim_names=("shard",))
        else:
            shape = (self.replicas, self.world_size // self.replicas)
            self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        apply_timeout()

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, load the weights that wait, and make the optimizers."""
        assert self.accelerator is not None
        module = self._module
        self.accelerator.setup(trainer)
        self._check_precision()
        settings = [self.blocks, self.reshard_after_forward, self.offload, self.replicas, self.param_dtype]
        settings += [self.reduce_dtype, self.precision_plugin.precision]
        if not self._is_sharded:
            self._root = self._shard(module)
            self._root.settings = settings
        elif self._root.settings != settings:
            rank_zero_warn(
                f"{type(module).__name__} was sharded by an earlier Trainer, and stays so: other arguments of "
                "FullyShardStrategy, or another precision, have no effect on it. Make a new module to use them."
            )
        self.model = self._root
        if hasattr(self._root, "reset_iter_state"):  # not in older torch
            self._root.reset_iter_state()  # of a step that an exception ended
        sharding.forget_partial_gradients(self._root)
        self._units = sharding.units(self._root)
        if self._root.replicated:
            self.precision_plugin.clip_grad_by_norm = sharding.clip_mixed_norm_  # type: ignore[method-assign,assignment]
        self._load_waiting_weights()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, module: LightningModule) -> Any:
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise MisconfigurationException(
                f"{type(module).__name__} has parameters that are sharded already, perhaps in its `configure_model`: "
                "remove that, since FullyShardStrategy does it; or keep it, with Lightning's ModelParallelStrategy."
            )
        if any(parameter.is_meta for parameter in module.parameters()):
            raise MisconfigurationException(
                f"{type(module).__name__} has parameters on the meta device, which have no values to shard: build it "
                "on the CPU, where each rank needs room for one copy."
            )
        module = self.precision_plugin.convert_module(module)  # type: ignore[assignment]
        if self._layer_sync is not None:
            module = self._layer_sync.apply(module)  # type: ignore[assignment]
        sharding.check_same_modules(module)
        dtypes = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
        if len(dtypes) > 1:
            raise MisconfigurationException(
                f"FullyShardStrategy needs trainable parameters of one dtype, but {type(module).__name__} has "
                f"{', '.join(sorted(map(str, dtypes)))}: convert them, or freeze those of the other dtype."
            )
        sharding.broadcast_values([*module.parameters(), *module.buffers()], self.root_device)
        blocks, notes = choose_blocks(module, self.blocks)
        for note in notes:
            rank_zero_warn(
                f"FullyShardStrategy: {note}: what is in no block is sharded, but gathered all at once.",
                category=NoEffectWarning,
            )
        root = sharding.shard(
            module,
            blocks.values(),
            self.device_mesh,
            reshard_after_forward=self.reshard_after_forward,
            offload=self.offload,
            param_dtype=getattr(torch, self.param_dtype) if self.param_dtype else None,
            reduce_dtype=getattr(torch, self.reduce_dtype) if self.reduce_dtype else None,
        )
        if self.offload:
            module._device = self.root_device  # moving the module would move its shards
            for metric in (item for item in module.modules() if isinstance(item, Metric)):
                metric.to(self.root_device)
        else:
            module.to(self.root_device)
        return root

    def _check_precision(self) -> None:
        precision = str(self.precision_plugin.precision)
        if precision not in _PRECISIONS:
            why = "gradients in float16 are scaled as a whole, which is not made for shards. " * (
                precision == "16-mixed"
            )
            raise MisconfigurationException(
                f"FullyShardStrategy can't work with precision={precision!r}: {why}Set the Trainer's precision to one "
                f"of {', '.join(map(repr, _PRECISIONS))}."
            )
        if self.param_dtype is not None and precision != "bf16-mixed":
            raise MisconfigurationException(
                f"FullyShardStrategy(param_dtype={self.param_dtype!r}) uses parameters in another dtype than they are "
                f"kept in, for which operations need autocast, but precision={precision!r}: set precision='bf16-mixed'."
            )

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizers of the shards."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer).__name__ in _WHOLE_MATRICES:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} does not run on shards: torch has no sharded form of its operations. "
                    "Use an optimizer such as AdamW or SGD, or strategy='ddp'."
                )
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if len({isinstance(parameter, DTensor) for parameter in group["params"]}) > 1 and not group.get("foreach"):
                group["foreach"] = False  # its kernels do not take sharded and whole parameters together

    # --------------------------------------------------------------------------------------------------- stepping

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step with everything gathered that is in no block."""
        self._sync_buffers()
        step = partial(self._module.training_step, *args, **kwargs)
        with self.precision_plugin.train_step_context():
            return self._root(step) if self._module.automatic_optimization else self._manual_step(step)

    def _manual_step(self, step: Callable[[], Any]) -> Any:
        """A step with backwards and optimizer steps inside, after each of which the root is gathered anew.

        So it is when ``toggle_optimizer`` changed what requires gradients.
        """
        module, names = self._module, ("toggle_optimizer", "untoggle_optimizer")

        def gathering_anew(function: Callable[[Any], None]) -> Callable[[Any], None]:
            def call(optimizer: Any) -> None:
                function(optimizer)
                self._gather_anew()

            return call

        before = dict(vars(module))
        for name in names:
            vars(module)[name] = gathering_anew(getattr(module, name))
        self._in_manual_step = True
        self._gather_anew()
        try:
            return step()
        finally:
            self._in_manual_step = False
            self._reshard()
            for name in names:
                if name in before:
                    vars(module)[name] = before[name]
                else:
                    del vars(module)[name]

    def _gather_anew(self) -> None:
        self._reshard()
        if self._in_manual_step:
            self._root.unshard()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Go backward from the loss; one that did not come out of the root is passed through it."""
        if not self._in_manual_step:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        loss = super().backward(self._root(lambda: closure_loss), optimizer, *args, **kwargs)
        self._gather_anew()
        return loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Step, and let go of parameters that were gathered before."""
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        self._gather_anew()
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients wait, unreduced, for the last batch of a window."""
        self._set_gradient_sync(False)
        try:
            yield
        finally:
            self._set_gradient_sync(True)

    def _set_gradient_sync(self, sync: bool) -> None:
        self._root.sync_gradients = sync
        for unit in self._units:
            unit.set_requires_gradient_sync(sync, recurse=False)

    def _evaluate(self, step: Callable[[], Any]) -> Any:
        # what is gathered under inference mode could not be used for training afterwards
        with torch.inference_mode(False), torch.no_grad():
            return self._root(step)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step with everything gathered that is in no block."""
        with self.precision_plugin.val_step_context():
            return self._evaluate(partial(self._module.validation_step, *args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step with everything gathered that is in no block."""
        with self.precision_plugin.test_step_context():
            return self._evaluate(partial(self._module.test_step, *args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step with everything gathered that is in no block."""
        if self._order is not None:
            self._order.called.clear()
        with self.precision_plugin.predict_step_context():
            result = self._evaluate(partial(self._module.predict_step, *args, **kwargs))
        self._batches_left -= 1
        if self._order is not None and self._batches_left == 0:
            for _ in range(self._batches_missing):  # the other ranks can't gather without this one
                self._order.repeat()
        return result

    def on_validation_start(self) -> None:
        """Evaluate with the buffers of rank 0 everywhere, as DDP does."""
        self._sync_buffers()

    def on_test_start(self) -> None:
        """Evaluate with the buffers of rank 0 everywhere, as DDP does."""
        self._sync_buffers()

    def on_predict_start(self) -> None:
        """See how many batches the other ranks have: the data is not padded for prediction, so some have one less."""
        self._sync_buffers()
        own = sum(self._module.trainer.num_predict_batches)
        everyone: list[Any] = [own] * self.world_size
        dist.all_gather_object(everyone, own)
        self._batches_left = own
        self._batches_missing = int(max(everyone) - own) if max(everyone) < float("inf") else 0
        if self._batches_missing and self.reshard_after_forward:
            self._order = sharding.CallOrder(self._units[1:])

    def on_validation_end(self) -> None:
        """Free what was gathered."""
        self._reshard()

    def on_test_end(self) -> None:
        """Free what was gathered."""
        self._reshard()

    def on_predict_end(self) -> None:
        """Free what was gathered."""
        if self._order is not None:
            self._order.remove()
            self._order = None
        self._reshard()

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank is gone, where that is the cause."""
        explain_lost_peer(exception)
        super().on_exception(exception)

    def partial_gradients(self) -> dict[str, Tensor]:
        """This rank's gradients that wait for the end of an accumulation window, on the CPU."""
        return sharding.partial_gradients(self._root)

    def waiting_gradients(self) -> list[Tensor]:
        """Those gradients themselves, where none was reduced yet."""
        return [gradient for _, gradient in sharding.waiting_gradients(self._root)]

    def load_partial_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`partial_gradients` gave."""
        sharding.load_partial_gradients(self._root, gradients)
