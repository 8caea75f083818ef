"""Events: what happened, as small frozen dataclasses handed to a tracer.

A layer never prints and never logs; it calls the :class:`Tracer` that it was given with an event.
Without a listener the tracer is ``None``, the layer makes no event, and the cost is one test.  Each
layer declares its event classes beside the code that emits them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeAlias

from softsgx.ondemand import dataclass

__all__ = ["Event", "Tracer"]


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events.

    Attributes:
        NAME: its name in text form, ``subsystem:event`` as in Linux (``sgx:ewb``).
    """

    NAME: ClassVar[str] = "softsgx:event"

    def line(self) -> str:
        """Return ``name: key=value …``, the form of a Linux trace line."""
        names: tuple[str, ...] = self.__slots__
        fields = " ".join(f"{key}={_text(getattr(self, key))}" for key in names)
        return f"{self.NAME}: {fields}"


Tracer: TypeAlias = Callable[[Event], None]


def _text(value: object) -> str:
    return f"{value:#x}" if type(value) is int and value > 9 else str(value)
