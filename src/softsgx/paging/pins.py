"""Reference counts: the last reference to an owner of pages destroys it.

Lock order: the latch of the count is innermost, and not held while the owner is destroyed.

Source:
    ``struct kref``, include/linux/kref.h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from softsgx.runtime import Runtime

__all__ = ["Pin", "RefCounted"]


class Pin(Protocol):
    """Keeps an owner alive: ``kref_get_unless_zero`` and ``kref_put``."""

    def get(self) -> bool:
        """Keep the owner alive; ``False``: it is being destroyed.  Never waits."""

    def put(self) -> None:
        """Undo one :meth:`get`; may destroy the owner.  The caller holds no lock."""


class RefCounted(ABC):
    """A :class:`Pin` that counts references; the constructor takes the first one.

    Args:
        runtime: for the latch.

    Attributes:
        references: how many there are.
    """

    __slots__ = (
        "_latch",
        "_uninterleaved",
        "references",
    )

    def __init__(self, runtime: Runtime) -> None:
        self._latch = runtime.latch()
        self._uninterleaved = not runtime.interleaves  # no other task runs between two statements
        self.references = 1

    @property
    def referenced(self) -> bool:
        """Whether there is a reference left."""
        return bool(self.references)

    def get(self) -> bool:
        """Take a reference; ``False``: the last one was given back.  Never waits."""
        if self._uninterleaved and self.references:
            self.references += 1
            return True
        with self._latch:
            if not self.references:
                return False
            self.references += 1
            return True

    def put(self) -> None:
        """Give a reference back; the last one destroys the object.  The caller holds no lock."""
        if self._uninterleaved and self.references > 1:
            self.references -= 1
            return
        with self._latch:
            assert self.references > 0, f"{self!r}: more references given back than taken"
            self.references -= 1
            last = not self.references
        if last:
            self._destroy()

    @abstractmethod
    def _destroy(self) -> None:
        """Destroy the object: the last reference was given back."""
