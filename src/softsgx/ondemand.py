"""Names of a package that are imported when they are first used.

A package that a short command imports for one name would make it wait for all of its modules.
Such a package declares them twice: for type checkers, under ``TYPE_CHECKING``, and for the
interpreter, by ``__getattr__ = on_demand(__name__, …)``.  Its users write ``package.Name`` where
they use the name; ``from package import Name`` imports its module at once.

Source:
    PEP 562.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["on_demand"]


def on_demand(package: str, modules: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Args:
        package: its name.
        modules: the names that each module of the package has.  A module must not be called as
            one of them: the import system sets it as an attribute of the package.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def attribute(name: str) -> Any:
        module = module_of.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        value = getattr(import_module(f"{package}.{module}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return attribute
