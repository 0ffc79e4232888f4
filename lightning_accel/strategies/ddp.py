"""DDP that comes back: the same training, in a process group that a restarted run can join.

Stock DDP under ``torchrun --max-restarts`` on gloo fails again on most restarts, because the ranks find the addresses
of the dead ones; see :mod:`lightning_accel.strategies.process_group`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_accel.strategies.process_group import (
    DEFAULT_START_TIMEOUT,
    DEFAULT_TIMEOUT,
    explain_lost_peer,
    init_process_group,
)

__all__ = ["RestartableDDPStrategy"]


class RestartableDDPStrategy(DDPStrategy):
    """Lightning's DDPStrategy, with the same numbers bit for bit, that survives the loss of a rank.

    - ``torchrun --max-restarts`` comes back on the first restart.
    - When a rank dies the others stop within seconds, with an error that names it and says what comes next.
    - A port in use and a rank that never comes end in an error that says so, after ``start_timeout``.

    Args:
        timeout: How long a collective may take before it fails; a network that is down shows after this time.
        start_timeout: How long ranks wait for one another at the start.
        **kwargs: Those of Lightning's DDPStrategy, and through it of torch's DistributedDataParallel.
    """

    def __init__(
        self,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_timeout: timedelta = DEFAULT_START_TIMEOUT,
        **kwargs: Any,
    ) -> None:
        super().__init__(timeout=timeout, **kwargs)
        self._collective_timeout = timeout
        self._start_timeout = start_timeout

    def setup_distributed(self) -> None:
        """Make the process group; Lightning then finds it made."""
        self.set_world_ranks()
        assert self.cluster_environment is not None
        init_process_group(
            self.cluster_environment,
            self._get_process_group_backend(),
            timeout=self._collective_timeout,
            start_timeout=self._start_timeout,
            device_id=self.root_device if self.root_device.type != "cpu" else None,
        )
        super().setup_distributed()

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank is gone, where that is the cause."""
        explain_lost_peer(exception)
        super().on_exception(exception)
