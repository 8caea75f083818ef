"""What is made when it is first used: names of packages, and the methods of dataclasses.

A command of a second would spend half of it on modules and methods that it does not use.

A package that a short command imports for one name would make it wait for all of its modules.
Such a package declares them twice: for type checkers, under ``TYPE_CHECKING``, and for the
interpreter, by ``__getattr__ = on_demand(__name__, …)``.  Its users write ``package.Name`` where
they use the name; ``from package import Name`` imports its module at once.

:func:`dataclass` is the decorator of the standard library, which compiles up to six methods a
class, half a millisecond to a millisecond.  Here methods are compiled when the class is first
instantiated, or asked for its fields; and those that can be the same function for all classes are.

Source:
    PEP 557, PEP 562, PEP 681.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from operator import attrgetter
from reprlib import recursive_repr
from threading import RLock
from typing import Any, TypeVar, dataclass_transform, overload

__all__ = ["dataclass", "on_demand"]

_T = TypeVar("_T")
#: What is asked of a dataclass that has no instance yet.
_ASKED = ("__dataclass_fields__", "__match_args__", "__signature__")
_completing = RLock()


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


@overload
def dataclass(cls: type[_T], /) -> type[_T]: ...


@overload
def dataclass(*, slots: bool = False, **options: bool) -> Callable[[type[_T]], type[_T]]: ...


@dataclass_transform(field_specifiers=(dataclasses.field,))
def dataclass(cls: Any = None, /, *, slots: bool = False, **options: bool) -> Any:
    """As :func:`dataclasses.dataclass`, but methods are compiled at the first use of the class.

    The class has no ``__init__`` of its own, and its annotations are strings.
    """

    def deferred(cls: type) -> type:
        return _deferred(cls, slots, options)

    return deferred if cls is None else deferred(cls)


class _Asked:
    """An attribute of a class that is there when the class is complete."""

    def __init__(self, name: str, cls: type, complete: Callable[[], None]) -> None:
        self._name, self._cls, self._complete = name, cls, complete

    def __get__(self, _instance: object, _owner: type) -> Any:
        self._complete()
        return getattr(self._cls, self._name, None)


def _deferred(cls: type, slots: bool, options: dict[str, bool]) -> type:
    assert "__init__" not in vars(cls), f"{cls.__name__} has an __init__ that would be replaced"
    defaults: dict[str, Any] = {}
    if slots:
        cls, defaults = _with_slots(cls)
        # Pickled instances are made without __init__: their state completes the class.
        setattr(cls, "__getstate__", _state_of)  # noqa: B010
        setattr(cls, "__setstate__", _set_state)  # noqa: B010

    def complete() -> None:
        with _completing:
            if vars(cls)["__init__"] is not complete_and_initialize:
                return  # another thread has completed it
            for name in ("__init__", *_ASKED):
                delattr(cls, name)
            # The descriptor of a slot and the default of its field have the same name.
            descriptors = {name: vars(cls)[name] for name in defaults}
            for name, default in defaults.items():
                setattr(cls, name, default)
            compares = options.get("eq", True)
            dataclasses.dataclass(**{**options, "eq": False, "repr": False})(cls)
            for name, descriptor in descriptors.items():
                setattr(cls, name, descriptor)
            _add_methods(cls, compares, options.get("frozen", False))

    def complete_and_initialize(self: object, *arguments: Any, **named: Any) -> None:
        complete()
        cls.__init__(self, *arguments, **named)  # type: ignore[misc]

    setattr(cls, "__init__", complete_and_initialize)  # noqa: B010
    for name in _ASKED:
        setattr(cls, name, _Asked(name, cls, complete))
    return cls


def _add_methods(cls: type, compares: bool, frozen: bool) -> None:
    """Add the methods that need not be compiled for each class, where it has none of its own."""
    fields = dataclasses.fields(cls)
    shown = [field.name for field in fields if field.repr]
    compared = _getter([field.name for field in fields if field.compare])
    hashed = _getter([f.name for f in fields if (f.compare if f.hash is None else f.hash)])

    @recursive_repr()
    def representation(self: object) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{self.__class__.__qualname__}({values})"

    def equal(self: object, other: object) -> bool:
        return (
            compared(self) == compared(other)
            if self.__class__ is other.__class__
            else NotImplemented
        )

    def hash_of(self: object) -> int:
        return hash(hashed(self))

    own = vars(cls)
    if "__repr__" not in own:
        setattr(cls, "__repr__", representation)  # noqa: B010
    if compares and "__eq__" not in own:
        setattr(cls, "__eq__", equal)  # noqa: B010
    # A class that defines __eq__ alone has None for __hash__.
    if compares and own.get("__hash__") is None:
        setattr(cls, "__hash__", hash_of if frozen else None)  # noqa: B010


def _getter(names: list[str]) -> Callable[[object], tuple[Any, ...]]:
    """Return what takes the values of these attributes of an object."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda instance: tuple(getattr(instance, name) for name in names)


def _with_slots(cls: type) -> tuple[type, dict[str, Any]]:
    """Return the class with slots for its fields, and the fields' defaults."""
    inherited = {name for base in cls.__mro__ for name in vars(base).get("__slots__", ())}
    fields = [name for name, kind in cls.__annotations__.items() if not kind.startswith("ClassVar")]
    body = {name: value for name, value in vars(cls).items() if name not in _OF_EACH_CLASS}
    defaults = {name: body.pop(name) for name in fields if name in body}
    body["__slots__"] = tuple(name for name in fields if name not in inherited)
    made: type = type(cls)(cls.__name__, cls.__bases__, body)
    made.__qualname__ = cls.__qualname__
    return made, defaults


_OF_EACH_CLASS = frozenset({"__dict__", "__weakref__"})


def _state_of(instance: Any) -> list[Any]:
    """Return the values of an instance, for copies and pickles."""
    return [getattr(instance, field.name) for field in dataclasses.fields(instance)]


def _set_state(instance: Any, state: list[Any]) -> None:
    for field, value in zip(dataclasses.fields(instance), state, strict=True):
        object.__setattr__(instance, field.name, value)
