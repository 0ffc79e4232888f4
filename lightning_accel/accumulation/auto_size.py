"""How large micro-batches may be, learnt from where memory ran out."""

from __future__ import annotations

__all__ = ["AutoSize"]


class AutoSize:
    """The size of micro-batches: halved where memory ran out, and doubled again with care.

    Args:
        grow_after: After how many batches in which memory sufficed the double is tried; None: never.

    Attributes:
        size: The largest micro-batch that may be made; None: the whole batch.

    Example:
        >>> size = AutoSize()
        >>> size.failed(33)
        >>> size.size
        17
    """

    def __init__(self, grow_after: int | None = None) -> None:
        self.size: int | None = None
        self.grow_after = grow_after
        self._wait = grow_after or 0
        self._quiet = 0  # batches since the last change
        self._safe: int | None = None  # the size before it was doubled

    def failed(self, samples: int) -> None:
        """Memory ran out in a micro-batch of so many samples, more than one: the next are smaller.

        After a doubling they are what they were before it, and the next one comes after twice as many batches.
        """
        if self._safe is not None and self._safe < samples:
            self.size = self._safe
            self._wait *= 2
        else:
            self.size = (samples + 1) // 2
        self._safe, self._quiet = None, 0

    def passed(self, split: bool) -> bool:
        """Memory sufficed for a batch; whether micro-batches may be larger from here on.

        Args:
            split: Whether the batch was split, on any rank.
        """
        if self.grow_after is None or self.size is None or not split:
            return False
        self._quiet += 1
        if self._quiet < self._wait:
            return False
        self._safe, self.size, self._quiet = self.size, 2 * self.size, 0
        return True

    def state_dict(self) -> dict[str, int | None]:
        """The size, and how long until it grows."""
        return {"size": self.size, "wait": self._wait, "quiet": self._quiet, "safe": self._safe}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.size, self._safe = state["size"], state["safe"]
        self._wait, self._quiet = state["wait"] or 0, state["quiet"] or 0
