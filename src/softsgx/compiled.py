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

__all__ = ["PURE", "description", "remedy", "speedups"]

PURE = "SOFTSGX_PURE"
"""The variable of the environment that keeps Python from using the compiled core."""

INTERFACE = 11
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
