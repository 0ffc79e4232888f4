"""DDP that comes back: the same training, in a process group that a restarted run can join.

Stock DDP under ``torchrun --max-restarts`` on gloo fails again on most restarts, because the ranks find the addresses
of the dead ones; see :mod:`lightning_accel.strategies.process_group`.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_accel.hooks.atomic import write_beside
from lightning_accel.strategies.process_group import (
    DEFAULT_START_TIMEOUT,
    DEFAULT_TIMEOUT,
    check_timeouts,
    explain_lost_peer,
    init_process_group,
)

__all__ = ["AtomicCheckpointIO", "RestartableDDPStrategy"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint file beside its place and rename it, so that it is whole or not there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save to a local path; to a remote one (``s3://...``) as Lightning does."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with write_beside(Path(path)) as partial:
            torch.save(checkpoint, partial)


class RestartableDDPStrategy(DDPStrategy):
    """Lightning's DDPStrategy, with the same numbers bit for bit, that survives the loss of a rank.

    - ``torchrun --max-restarts`` comes back on the first restart.
    - When a rank dies the others stop within seconds, with an error that names it and says what comes next.
    - A checkpoint is written beside its place and then renamed, so that a kill leaves no half of one.
    - A port in use and a rank that never comes end in an error that says so, after ``start_timeout``.
    - Parameters that are unfrozen or added after training has started are reduced like the others, which stock DDP
      never does: its replicas then drift apart.

    Args:
        timeout: How long a collective may take before it fails, in seconds (or a ``timedelta``); a network that is
            down shows after this time.
        start_timeout: How long ranks wait for one another at the start, in seconds.
        **kwargs: Those of Lightning's DDPStrategy, and through it of torch's DistributedDataParallel.
    """

    def __init__(
        self,
        timeout: float | timedelta = DEFAULT_TIMEOUT,
        start_timeout: float = DEFAULT_START_TIMEOUT,
        **kwargs: Any,
    ) -> None:
        if isinstance(timeout, timedelta):  # as Lightning's strategies have it
            timeout = timeout.total_seconds()
        self._timeouts = check_timeouts(timeout, start_timeout)
        super().__init__(timeout=timedelta(seconds=timeout), **kwargs)
        self._reduced: set[Tensor] = set()

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes checkpoints: that of the Trainer's plugins, or :class:`AtomicCheckpointIO`."""
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    def setup_distributed(self) -> None:
        """Make the process group; Lightning then finds it made."""
        self.set_world_ranks()
        assert self.cluster_environment is not None
        init_process_group(
            self.cluster_environment,
            self._get_process_group_backend(),
            **self._timeouts,
            device_id=self.root_device if self.root_device.type != "cpu" else None,
        )
        super().setup_distributed()

    def configure_ddp(self) -> None:
        """Wrap the module, and remember whose gradients DDP reduces."""
        super().configure_ddp()
        assert self.lightning_module is not None
        self._reduced = {parameter for parameter in self.lightning_module.parameters() if parameter.requires_grad}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Wrap the module again where parameters are trained that were not when DDP looked at them."""
        module = self.lightning_module
        assert module is not None
        if any(parameter.requires_grad and parameter not in self._reduced for parameter in module.parameters()):
            self.model = module
            self.configure_ddp()

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank is gone, where that is the cause."""
        explain_lost_peer(exception)
        super().on_exception(exception)
