"""Enumerations whose members cost no more to name than a class attribute."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

__all__ = ["plain_members"]

E = TypeVar("E", bound=Enum)


def plain_members(enumeration: type[E]) -> type[E]:
    """Store the members as plain class attributes.

    Up to Python 3.11 ``PageType.VA`` goes through a descriptor, four times the price of an
    attribute; every leaf names several members.
    """
    for name, member in enumeration.__members__.items():
        type.__setattr__(enumeration, name, member)
    return enumeration
