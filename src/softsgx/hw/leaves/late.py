"""Leaves that are imported and bound when one of them is first used.

A program without enclaves, and a thread that enters none, starts in less time so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["LateLeaves"]


class LateLeaves:
    """A set of leaves; a derived class declares each as an attribute, and binds all."""

    _bound = False

    if not TYPE_CHECKING:  # for which the attributes are those that the derived class declares

        def __getattr__(self, name: str) -> Callable[..., Any]:
            """Bind the leaves."""
            if name.startswith("_") or self._bound:
                raise AttributeError(f"no leaf {name!r}", name=name, obj=self)
            self._bind()
            self._bound = True
            return getattr(self, name)

    def _bind(self) -> None:
        """Set the attribute of each leaf."""
        raise NotImplementedError
