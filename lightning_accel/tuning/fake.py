"""One training step that computes nothing: tensors with shapes and dtypes, but no memory, through a real Trainer.

The module is made on the meta device. Its parameters then become fake tensors (``torch.compiler_fake_tensor`` in the
documentation of torch), which claim to be on the CPU: unlike the meta device, autocast and the choice of an attention
kernel work on them as on real ones, so that what is kept for the backward pass is the same.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer

from lightning_accel.tuning.activations import LiveTensors

__all__ = ["FakeStep", "fake_module_", "quiet", "run_fake_step"]

_CPU = torch.device("cpu")
_STEPS = 1000  # an epoch of made-up batches, for schedules that ask for its length


def fake_module_(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> None:
    """Replace what ``module`` has on the meta device by fake tensors, in place.

    Args:
        module: Tied parameters stay tied. What is not on the meta device, a small table made from data, becomes fake
            as well.
        mode: The mode of the fake tensors.
        dtype: What floating-point parameters and buffers are cast to.
    """
    done: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in done:
            target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            made: Tensor = FakeTensor(mode, tensor.detach().to("meta", target), _CPU)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            done[id(tensor)] = made
        return done[id(tensor)]

    keep = []  # an id is of a tensor that lives
    for part in module.modules():
        held: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        for tensors in held:
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    keep.append(tensor)
                    tensors[name] = fake(tensor)


@dataclass
class FakeStep:
    """What a step was seen to do.

    Attributes:
        optimizers: As ``configure_optimizers`` returned them, without state.
        kept: Bytes that the forward pass keeps for the backward pass, see :class:`LiveTensors`, with the batch.
        casts: Bytes of low-precision copies of parameters that are kept beside them.
        passing: Bytes that come and go, at most, beside both.
        frozen_inputs: Bytes that DeepSpeed's stage 3 keeps more, see :class:`LiveTensors`.
        failure: Why these could not be measured, and are 0.
        batch_size: The first dimension of the batch's first tensor; 0 where it has none.
    """

    optimizers: list[Optimizer]
    kept: int = 0
    casts: int = 0
    passing: int = 0
    frozen_inputs: int = 0
    failure: str = ""
    batch_size: int = 0


class _Done(Exception):
    """The step is over."""


class _Stop(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise _Done


class _Batches:
    """A loader of one made-up batch, over and over."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return _STEPS

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch, _STEPS)


class _FakeStrategy(SingleDeviceStrategy):
    """One device whose tensors have no memory.

    Args:
        mode: Of the fake tensors.
        dtype: What the module's parameters are cast to.
        batch_size: The batch is made that long in its first dimension; 0 leaves it.
        most: And then split into parts of at most that many, of which one is taken; 0 takes all.
        forward_only: The batch is for ``forward``, and not for ``training_step``.
        states_only: Stop when there are optimizers.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        dtype: torch.dtype | None,
        batch_size: int,
        most: int,
        forward_only: bool,
        states_only: bool,
    ) -> None:
        super().__init__(device="cpu")
        self.mode, self.dtype, self.forward_only, self.states_only = mode, dtype, forward_only, states_only
        self.batch_size, self.most = batch_size, most
        self.live: LiveTensors | None = None

    @property
    def module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        """Where ``configure_model`` builds."""
        return torch.device("meta")

    def setup(self, trainer: Trainer) -> None:
        """Make the optimizers; the module is neither cast nor moved."""
        fake_module_(self.module, self.mode, self.dtype)
        self.setup_optimizers(trainer)  # not in the mode: it may ask for the length of a real loader
        if self.states_only:
            raise _Done

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Make the batch fake, and of the size that was asked for."""
        sizes: list[int] = []
        apply_to_collection(batch, Tensor, lambda tensor: sizes.append(tensor.shape[0]) if tensor.dim() else None)
        size = sizes[0] if sizes else 0
        target = self.batch_size or size
        if 0 < self.most < target:
            target = -(-target // -(-target // self.most))
        self.batch_size = target if size else 0

        def fake(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            if shape and shape[0] == size:
                shape[0] = target
            return torch.empty(shape, dtype=tensor.dtype)

        with self.mode:
            return super().batch_to_device(apply_to_collection(batch, Tensor, fake), device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step, or ``forward`` on the example, and measure what is kept."""
        self.live = LiveTensors(self.module)
        apply_to_collection(args, Tensor, self.live.add)
        with self.mode, self.live:
            if not self.forward_only:
                return super().training_step(*args, **kwargs)
            with self.precision_plugin.forward_context():
                example = args[0]
                return _sum(self.module(**example) if isinstance(example, dict) else self.module(*example))

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backward pass, where checkpointed parts run once more."""
        assert self.live is not None
        self.live.forward_is_over()
        with self.mode, self.live:
            return super().backward(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *_: Any, **__: Any) -> Any:
        """Run the closure alone."""
        return closure()

    def teardown(self) -> None:
        """Leave the module as it is; it can't be moved."""


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for a method that is not to run."""


def _sum(output: Any) -> Tensor:
    found: list[Tensor] = []
    apply_to_collection(output, Tensor, lambda tensor: found.append(tensor.sum()) if tensor.requires_grad else None)
    return torch.stack(found).sum()


def run_fake_step(
    module: LightningModule,
    datamodule: LightningDataModule | None = None,
    batch: Any = None,
    *,
    mode: FakeTensorMode | None = None,
    precision: str = "32-true",
    batch_size: int = 0,
    most: int = 0,
    states_only: bool = False,
    callbacks: list[Callback] | None = None,
    trainer_options: dict[str, Any] | None = None,
) -> FakeStep:
    """Fit ``module`` for one batch with fake tensors, and see what it needs.

    Args:
        module: Made on the meta device; it is not usable afterwards.
        datamodule: Where a real batch comes from.
        batch: Or a batch, of meta tensors perhaps. Without both, the module's own ``train_dataloader`` is asked, or
            else its ``example_input_array``, which goes through ``forward`` alone.
        mode: That of parameters which are fake already.
        precision: As the Trainer's.
        batch_size: Change the batch's to this.
        most: Samples that go through the module at a time, at most; 0 for all.
        states_only: Stop when there are optimizers: no batch is needed.
        callbacks: Those that change what is trained.
        trainer_options: The length of the run and its accumulation, which schedules may ask for.

    Raises:
        ValueError: If there is no batch.
    """
    mode = mode or FakeTensorMode()
    example = getattr(module, "example_input_array", None)
    forward_only = False
    if batch is None and datamodule is None and not is_overridden("train_dataloader", module):
        if example is None and not states_only:
            raise ValueError("there is no batch to measure activations with")
        forward_only = example is not None
        batch = (example,) if isinstance(example, Tensor) else 0 if example is None else example
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision)
    strategy = _FakeStrategy(mode, dtype, batch_size, most, forward_only, states_only)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            # autocast of the CPU knows bf16 alone, whose sizes are the same
            precision="bf16-mixed" if precision == "16-mixed" else precision,  # type: ignore[arg-type]
            callbacks=[*(callbacks or []), _Stop()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            **(trainer_options or {}),
        )
        # values of fake tensors can't be logged
        module.log = module.log_dict = _nothing  # type: ignore[method-assign]
        module.prepare_data = _nothing  # type: ignore[method-assign]  # it may download for hours
        if datamodule is not None:
            datamodule.prepare_data = _nothing  # type: ignore[method-assign]
        failure = ""
        try:
            if batch is None:
                trainer.fit(module, datamodule=datamodule)
            else:
                trainer.fit(module, train_dataloaders=_Batches(batch))
        except _Done:
            pass
        except Exception as error:
            if strategy.live is None:  # not in the step
                raise
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
    live = strategy.live
    if live is None or failure:
        return FakeStep(strategy.optimizers, failure=failure, batch_size=strategy.batch_size)
    passing = live.peak - live.kept - live.casts
    return FakeStep(
        strategy.optimizers, live.kept, live.casts, passing, live.frozen_inputs, batch_size=strategy.batch_size
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on devices and loaders, which are about a real run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
