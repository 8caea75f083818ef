"""What keeps an owner of pages alive: references, the last of which destroys it.

Lock order: the latch of the count is innermost, and not held when the last reference goes.

Source:
    ``struct kref``, include/linux/kref.h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from softsgx.runtime import Runtime

__all__ = ["Pin", "RefCounted"]


class Pin(Protocol):
    """The enclave's life: ``kref_get_unless_zero`` and ``kref_put``."""

    def get(self) -> bool:
        """Keep the enclave from being destroyed; ``False`` when it is dying.  Never waits."""

    def put(self) -> None:
        """Give the pin back; may destroy the enclave.  Called without any lock."""


class RefCounted(ABC):
    """A :class:`Pin` by counting; whoever makes it has the first reference.

    Args:
        runtime: for the latch.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._latch = runtime.latch()
        self._quiet = not runtime.interleaves  # then nobody can come between two statements
        self._references = 1

    @property
    def referenced(self) -> bool:
        """Whether there is a reference."""
        return bool(self._references)

    def get(self) -> bool:
        """Take a reference; ``False`` when the last one is gone.  Never waits."""
        if self._quiet and self._references:
            self._references += 1
            return True
        with self._latch:
            if not self._references:
                return False
            self._references += 1
            return True

    def put(self) -> None:
        """Give a reference back; the last one ends it.  No lock may be held."""
        if self._quiet and self._references > 1:
            self._references -= 1
            return
        with self._latch:
            assert self._references > 0, f"{self!r}: more references given back than taken"
            self._references -= 1
            last = not self._references
        if last:
            self._destroy()

    @abstractmethod
    def _destroy(self) -> None:
        """The last reference is gone."""
