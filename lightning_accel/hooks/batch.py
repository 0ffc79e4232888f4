"""BatchTransform: replace the training batch, on the device, with random draws that a resumed run repeats exactly."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_accel.errors import check_int
from lightning_accel.hooks.callback import AccelCallback
from lightning_accel.hooks.clock import batches_done

__all__ = ["BatchTransform", "batch_generator"]


def batch_generator(seed: int, rank: int, batch: int, key: str) -> torch.Generator:
    """A CPU generator for one batch of one rank.

    Its state depends on the arguments alone, so there is nothing to save: a resumed run that is at the same batch draws
    the same values, at any number of workers and whatever else used the global random state.

    Args:
        seed: The run's seed.
        rank: The global rank: ranks draw different values.
        batch: How many training batches came before it, over all epochs.
        key: The callback's state key: two callbacks draw independently.
    """
    digest = hashlib.blake2b(f"{seed}/{rank}/{batch}/{key}".encode(), digest_size=8).digest()
    # `manual_seed` takes 64 bits; the CPU generator's own seeding spreads them
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


class BatchTransform(AccelCallback):
    """A callback that replaces each training batch after it was moved to the device.

    Validation, sanity checks, testing and prediction see their batches untouched. A LightningDataModule that overrides
    ``on_after_batch_transfer`` keeps its hook: this one acts on what that returned.

    Args:
        seed: Seed of its random draws; ``None`` takes the seed of the run (``seed_everything``, else a random one),
            which then travels in the checkpoint.
        **arguments: As for ``AccelCallback``.
    """

    def __init__(self, seed: int | None = None, **arguments: Any) -> None:
        if seed is not None:
            check_int("seed", seed, minimum=0)
        super().__init__(**arguments)
        self.seed = seed
        self._run_seed: int | None = None
        self._restored_seed: int | None = None

    def transform_batch(self, batch: Any, generator: torch.Generator) -> Any:
        """Return the batch to train on.

        Args:
            batch: What the loader gave, on the device.
            generator: A CPU generator, freshly seeded for this batch and rank.
        """
        raise NotImplementedError

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``on_after_batch_transfer`` of whichever of module and datamodule owns it; where not neutral."""
        self._run_seed = self._restored_seed = None
        if self.is_neutral:
            return
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{type(self).__name__} needs to see each batch, but `training_step` takes a `dataloader_iter` and "
                "fetches the batches by itself: give it the signature `training_step(self, batch, batch_idx)`."
            )
        seed = torch.initial_seed() if self.seed is None else self.seed
        self._run_seed = trainer.strategy.broadcast(seed)
        selector = trainer._data_connector._datahook_selector
        assert selector is not None  # attached with the data, before any callback's setup
        owner = selector.get_instance("on_after_batch_transfer")

        def after_transfer(original: Any, batch: Any, dataloader_idx: int) -> Any:
            batch = original(batch, dataloader_idx)
            if batch is None or not trainer.training:  # Lightning skips the step of a batch that is None
                return batch
            run_seed = self._run_seed if self._restored_seed is None else self._restored_seed
            assert run_seed is not None
            generator = batch_generator(run_seed, trainer.global_rank, batches_done(trainer), self.state_key)
            return self.transform_batch(batch, generator)

        self.patch(owner, "on_after_batch_transfer", after_transfer)

    def state_dict(self) -> dict[str, Any]:
        """The seed in use, so that a resumed run goes on drawing from the same stream."""
        seed = self._run_seed if self._restored_seed is None else self._restored_seed
        return {} if seed is None else {"seed": seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seed in use."""
        self._restored_seed = state_dict["seed"]
