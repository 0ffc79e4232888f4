"""A plain DataLoader that knows where it is, and can go back there without loading what was seen.

A pass over a map-style DataLoader is decided by the random numbers that its sampler drew. So its position is: the
random state when its iterator was asked for, the random state when the first index was drawn (a sampler draws as late
as that, after whatever else ran in between), and the number of batches handed out. To go back, both states are set as
they were, the indices that were seen are drawn again and dropped, and no sample is loaded.

The loader is changed in place, by giving it a small subclass of its own class, because Python looks special methods and
properties up on the class. While it is only watched it draws exactly what it would have drawn.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_accel.hooks.rng import get_rng_state, set_rng_state

__all__ = [
    "forget",
    "generator_states",
    "is_watched",
    "position",
    "rewind",
    "sampler_seeds",
    "set_generator_states",
    "set_sampler_seeds",
    "unwatch",
    "watch",
    "why_not_exact",
]


@dataclass
class _Pass:
    """One pass over the loader's samples."""

    start: dict[str, Any]
    """Random state when the iterator was asked for."""
    fresh: bool = True
    """Whether an iterator was built for it, which draws a base seed; persistent workers are only reset."""
    first: dict[str, Any] | None = None
    """Random state when the first index was drawn."""
    drawn: int = 0
    """Items that the sampler gave; :attr:`recent` has the last of them."""
    recent: deque[Any] = field(default_factory=deque)
    replayed: bool = False
    skip: int = 0
    """In a replay: batches that were seen. The sampler gave :attr:`drawn` at first, so the rest is still to come."""
    ahead: list[Any] = field(default_factory=list)
    """In a replay: that rest, where it could be saved."""
    iterator: Callable[[], _BaseDataLoaderIter | None] = lambda: None
    """A weak reference, or the workers would outlive their pass."""

    def seen(self) -> int:
        iterator = self.iterator()
        return self.skip + (iterator._num_yielded if iterator is not None else 0)


class _Tracker:
    """What is known about a watched loader."""

    def __init__(self, loader: DataLoader[Any], recording: Callable[[], bool]) -> None:
        self.original = type(loader)
        self.recording = recording
        self.generators = _generators(loader)
        self.prefetch = loader.num_workers * (loader.prefetch_factor or 0)
        self.current: _Pass | None = None
        self.building: _Pass | None = None
        self.pending: _Pass | None = None
        self.iterator: Callable[[], _BaseDataLoaderIter | None] = lambda: None

    def begin(self, *, fresh: bool) -> _Pass:
        this = self.pending or _Pass(self.snapshot(), fresh=fresh)
        self.pending, self.current = None, this
        return this

    def snapshot(self) -> dict[str, Any]:
        return {**get_rng_state(cuda=False), "generators": [generator.get_state() for generator in self.generators]}

    def restore(self, state: dict[str, Any]) -> None:
        set_rng_state(state)
        for generator, generator_state in zip(self.generators, state["generators"], strict=False):
            generator.set_state(generator_state.cpu())

    @contextmanager
    def replaying(self, state: dict[str, Any] | None) -> Iterator[None]:
        """Run the block under ``state``, if given, and set everything back after it."""
        before = self.snapshot()
        if state is not None:
            self.restore(state)
        try:
            yield
        finally:
            self.restore(before)


class _Watched(DataLoader[Any]):
    """The mixin that :func:`watch` puts in front of a loader's own class."""

    _accel_tracker: _Tracker

    def _get_iterator(self) -> _BaseDataLoaderIter:
        tracker = self._accel_tracker
        if not tracker.recording():
            return super()._get_iterator()
        this = tracker.building = tracker.begin(fresh=True)
        try:
            if this.replayed:
                with tracker.replaying(this.start):
                    iterator = super()._get_iterator()
            else:
                iterator = super()._get_iterator()
        finally:
            tracker.building = None
        this.iterator = tracker.iterator = weakref.ref(iterator)
        return iterator

    @property
    def _index_sampler(self) -> Any:
        indices = super()._index_sampler
        return indices if self._accel_tracker.building is None else _Indices(self._accel_tracker, indices)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: having the method tells Lightning that this loader can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: :func:`rewind` restores the position."""


class _Indices:
    """A loader's index sampler, watched."""

    def __init__(self, tracker: _Tracker, indices: Any) -> None:
        self.tracker = tracker
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        this = self.tracker.building
        if this is None:  # persistent workers begin their next pass
            if not self.tracker.recording():
                return iter(self.indices)
            this = self.tracker.begin(fresh=False)
            this.iterator = self.tracker.iterator
        elif this.fresh:  # in their turn among the draws of the iterator that is being built
            return self._draw(this, iter(self.indices))
        if not this.replayed:
            return self._draw(this, iter(self.indices))
        with self.tracker.replaying(this.start):
            indices = iter(self.indices)
        return self._draw(this, indices)

    def _draw(self, this: _Pass, indices: Iterator[Any]) -> Iterator[Any]:
        this.recent = deque(maxlen=self.tracker.prefetch)
        if this.replayed:
            with self.tracker.replaying(this.first):
                drawn_again = list(islice(indices, this.drawn))[this.skip :]
            this.recent.extend(this.ahead or drawn_again)
            yield from this.ahead or drawn_again
        if this.first is None:
            this.first = self.tracker.snapshot()
        for index in indices:
            this.drawn += 1
            this.recent.append(index)
            yield index


@functools.cache
def _watched_class(original: Hashable) -> Any:
    base: Any = original
    attributes = {"__doc__": base.__doc__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_Watched, base), attributes)


def is_watched(loader: object) -> bool:
    """Whether ``loader`` is watched at present."""
    return isinstance(loader, _Watched)


def watch(loader: Any, recording: Callable[[], bool] = lambda: True) -> None:
    """Follow the passes over ``loader`` from now on; its class becomes a subclass of its own class.

    Args:
        loader: A map-style loader. One that is watched already stays as it is.
        recording: Asked at the start of each pass; passes for which it is false (validation over the training loader)
            are not followed.
    """
    if is_watched(loader):
        return
    original: Any = type(loader)
    tracker = loader.__dict__["_accel_tracker"] = _Tracker(loader, recording)
    loader.__class__ = _watched_class(original)
    if isinstance(loader._iterator, _BaseDataLoaderIter):  # persistent workers that are running already
        tracker.iterator = weakref.ref(loader._iterator)
        if not isinstance(loader._iterator._index_sampler, _Indices):
            loader._iterator._index_sampler = _Indices(tracker, loader._iterator._index_sampler)
        loader._iterator._index_sampler.tracker = tracker


def unwatch(loader: Any) -> None:
    """Give ``loader`` its own class back."""
    if is_watched(loader):
        tracker: _Tracker = loader.__dict__.pop("_accel_tracker")
        tracker.recording = lambda: False
        loader.__class__ = tracker.original


def position(loader: DataLoader[Any], unused: int = 0) -> dict[str, Any] | None:
    """Where the present pass over a watched ``loader`` is.

    Args:
        loader: The loader.
        unused: How many of the batches that it handed out last have not been used, and are to come again.

    Returns:
        Tensors, lists and numbers for :func:`rewind`; None if no pass began.
    """
    this = loader._accel_tracker.current if isinstance(loader, _Watched) else None
    if this is None:
        return None
    seen = max(0, this.seen() - unused)
    ahead = this.drawn - seen
    return {
        "start": this.start,
        "first": this.first,
        "fresh": this.fresh,
        "seen": seen,
        "drawn": this.drawn,
        "ahead": _plain_indices(list(this.recent)[-ahead:]) if 0 < ahead <= len(this.recent) else [],
        "length": _length(loader),
    }


def rewind(loader: DataLoader[Any], state: dict[str, Any]) -> bool:
    """Make the next pass over a watched ``loader`` begin where :func:`position` was read.

    Beginning it leaves all random states as they were: set those of the save afterwards.

    Args:
        loader: The watched loader.
        state: What :func:`position` returned.

    Returns:
        False if the loader is not watched or has another number of batches than it had, so that its order is another.
    """
    if not isinstance(loader, _Watched) or state["length"] != _length(loader):
        return False
    loader._accel_tracker.pending = _Pass(
        start=state["start"],
        fresh=state["fresh"],
        first=state["first"],
        drawn=state["drawn"],
        skip=state["seen"],
        ahead=state["ahead"],
        replayed=True,
    )
    return True


def forget(loader: object) -> None:
    """Let the next pass over ``loader`` be an ordinary one, whatever :func:`rewind` was told."""
    if isinstance(loader, _Watched):
        loader._accel_tracker.pending = None


def why_not_exact(loader: object) -> str | None:
    """Say why the position in ``loader`` can't be restored, or None if it can."""
    if not isinstance(loader, DataLoader):
        return f"`{type(loader).__name__}` has no `state_dict` and `load_state_dict`"
    if isinstance(loader.dataset, IterableDataset):
        return f"`{type(loader.dataset).__name__}` is an IterableDataset, whose position its DataLoader does not know"
    return None


def generator_states(loader: object) -> list[torch.Tensor]:
    """The states of the ``torch.Generator`` objects that ``loader`` and its samplers were given."""
    return [generator.get_state() for generator in _generators(loader)]


def set_generator_states(loader: object, states: list[torch.Tensor]) -> None:
    """Set what :func:`generator_states` read."""
    for generator, state in zip(_generators(loader), states, strict=False):
        generator.set_state(state.cpu())


def sampler_seeds(loader: object) -> list[int]:
    """The seeds of the samplers of ``loader`` that shuffle by a seed and the epoch, such as a DistributedSampler."""
    return [sampler.seed for sampler in _seeded(loader)]


def set_sampler_seeds(loader: object, seeds: list[int]) -> None:
    """Set what :func:`sampler_seeds` read."""
    for sampler, seed in zip(_seeded(loader), seeds, strict=False):
        sampler.seed = seed


def _seeded(loader: object) -> list[Any]:
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    seeded = {id(sampler): sampler for sampler in samplers if isinstance(getattr(sampler, "seed", None), int)}
    return list(seeded.values())


def _generators(loader: object) -> list[torch.Generator]:
    batches = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def _plain_indices(items: list[Any]) -> list[Any]:
    """``items`` as ints and lists of ints; nothing if there is anything else, such as a dataset's own kind of key."""

    def plain(item: Any) -> Any:
        return [plain(part) for part in item] if isinstance(item, (list, tuple)) else item.__index__()

    try:
        return [plain(item) for item in items]
    except (AttributeError, TypeError):
        return []


def _length(loader: DataLoader[Any]) -> int:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return -1
