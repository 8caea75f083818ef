"""The compiled core: C code for what is hot, where it was built and is wanted.

The extension ``softsgx._speedups`` is optional.  ``speedups`` is that module, or ``None``: then
Python code does the same.  With ``SOFTSGX_PURE=1`` in the environment it is not used.
``description`` says which of the two it is, and ``remedy`` how to have the compiled core.

Modules that have something in C choose when they are imported::

    copy_page = _copy_page if speedups is None else speedups.copy_page
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import TypeVar

__all__ = ["PURE", "description", "record", "remedy", "speedups"]

_T = TypeVar("_T")

PURE = "SOFTSGX_PURE"
"""The variable of the environment that keeps Python from using the compiled core."""

INTERFACE = 15
"""Which functions and types of the extension this version uses, and how."""


_INSTALL = "install gcc or clang and the headers of Python, and softsgx again"


def _load() -> tuple[ModuleType | None, str, str]:
    if os.environ.get(PURE, "0") not in ("", "0"):
        return None, f"pure Python ({PURE} is set)", f"unset {PURE}"
    try:
        module = import_module("softsgx._speedups")
    except ModuleNotFoundError:
        return None, "pure Python (the compiled core was not built)", _INSTALL
    except ImportError as error:
        return None, f"pure Python (the compiled core cannot be loaded: {error})", _INSTALL
    if module.INTERFACE != INTERFACE:
        return None, "pure Python (the compiled core is that of another version)", _INSTALL
    return module, "compiled core", ""


speedups, description, remedy = _load()


def record(cls: type[_T]) -> type[_T]:
    """Return the class with its fields in a structure of C, if the compiled core has one for it.

    That has the name of the class and exactly its fields.  A field that is a count is then 0 before
    it is set, takes integers of 64 bits alone, and cannot be deleted.

    Args:
        cls: a class without bases that has ``__slots__``, or that another decorator makes a
            dataclass with slots.  Its methods do not use ``super()`` without arguments.
    """
    structure = None if speedups is None else speedups.fields(cls.__name__)
    names = {*vars(cls).get("__slots__", cls.__annotations__)}
    if structure is None or names != {*structure.__slots__} or cls.__bases__ != (object,):
        return cls
    kept = dict(vars(cls))
    for name in ("__dict__", "__weakref__", *kept.get("__slots__", ())):
        kept.pop(name, None)
    made: type[_T] = type(cls)(  # type: ignore[misc]
        cls.__name__, (structure,), {**kept, "__slots__": ()}
    )
    made.__qualname__ = cls.__qualname__
    if "__slots__" in vars(cls):
        # As readers of the class expect it.
        made.__slots__ = vars(cls)["__slots__"]  # type: ignore[attr-defined]
    return made
