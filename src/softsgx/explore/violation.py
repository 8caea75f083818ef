"""The properties that explore checks during and after a race."""

from __future__ import annotations

import re

from softsgx.paging import MachineCheck
from softsgx.runtime import Deadlock, Livelock
from softsgx.sim.stories import PropertyViolated
from softsgx.userland import Signal

__all__ = ["Violation", "property_of", "signature"]

_NUMBERS = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+")


class Violation(Exception):
    """A property does not hold.

    Attributes:
        name: of the property: ``lost data``.
        page: address of the page that it concerns, linear or physical; 0 for none.
        index: of that page in its enclave; -1 if it is in none.
    """

    def __init__(self, name: str, text: str, page: int = 0, index: int = -1) -> None:
        super().__init__(text)
        self.name, self.page, self.index = name, page, index


def property_of(error: BaseException) -> str:
    """Return the name of the property that does not hold if a race raises ``error``."""
    match error:
        case Violation():
            return error.name
        case Deadlock():
            return "deadlock"
        case Livelock():
            return "livelock"
        case MachineCheck():
            return "machine check"
        case Signal():
            return f"unexpected {error.name}"
        case PropertyViolated():
            return "claim of the story"
        case AssertionError():
            return "invariant"
        case OSError():
            return "unexpected errno"
        case _:
            return f"unexpected {type(error).__name__}"


def signature(error: BaseException) -> str:
    """Return the signature of a finding: its property, and its text without numbers."""
    return f"{property_of(error)}: {_NUMBERS.sub('#', str(error))}"
