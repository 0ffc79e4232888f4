"""The state of every global random number generator of this process, in a form that any checkpoint can carry.

Tensors, lists, numbers and strings only, so that ``torch.load(..., weights_only=True)`` reads it: NumPy's own state is
an array, which that refuses.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["get_rng_state", "keep_rng", "preserved_rng", "set_rng_state"]


def get_rng_state(*, cuda: bool = True) -> dict[str, Any]:
    """Read the state of Python's, NumPy's and torch's global generators, without drawing from any.

    Args:
        cuda: Whether to include the generator of every CUDA device that this process sees, if it has used CUDA.

    Returns:
        ``"python"``: version, words (int64 tensor of shape (625,)) and the stored Gaussian;
        ``"torch"``: uint8 tensor; ``"numpy"`` (if NumPy is imported): its name, words (int64 tensor of shape (624,))
        and three numbers; ``"cuda"`` (if initialised): one uint8 tensor a device.
    """
    version, words, gaussian = random.getstate()
    state: dict[str, Any] = {"python": [version, torch.tensor(words), gaussian], "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        import numpy

        legacy: Any = numpy.random.get_state(legacy=True)
        name, keys, place, has_gaussian, numpy_gaussian = legacy
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), int(place), int(has_gaussian), numpy_gaussian]
    in_use: Callable[[], bool] = torch.cuda.is_initialized
    if cuda and in_use():  # reading would start CUDA, and workers forked after that could not use it
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set every generator that ``state`` has, as :func:`get_rng_state` read it.

    CUDA devices that are no longer there are left out, and so is NumPy where it isn't installed.

    Args:
        state: What :func:`get_rng_state` returned.
    """
    version, words, gaussian = state["python"]
    random.setstate((version, tuple(words.tolist()), gaussian))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        try:
            import numpy
        except ImportError:
            pass
        else:
            name, keys, *numbers = state["numpy"]
            numpy.random.set_state((name, keys.numpy().astype("uint32"), *numbers))
    for device, device_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state.cpu(), device)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Run the block so that, seen from outside, it drew no random number on the CPU."""
    state = get_rng_state(cuda=False)
    try:
        yield
    finally:
        set_rng_state(state)


def keep_rng() -> Callable[[], None]:
    """Remember the state of every generator, for this process alone: sooner done than a state to be saved.

    Returns:
        A function that puts it back.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    in_use: Callable[[], bool] = torch.cuda.is_initialized
    device = torch.cuda.get_rng_state() if in_use() else None
    numpy: Any = sys.modules.get("numpy")
    arrays = None if numpy is None else numpy.random.get_state()

    def restore() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)
        if numpy is not None:
            numpy.random.set_state(arrays)

    return restore
