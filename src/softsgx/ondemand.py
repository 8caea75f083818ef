"""What is made when it is first used: names of packages, methods of dataclasses, patterns.

A command of a second would spend half of it on modules and methods that it does not use.

A package that a short command imports for one name would make it wait for all of its modules.
Such a package declares them twice: for type checkers, under ``TYPE_CHECKING``, and for the
interpreter, by ``__getattr__ = on_demand(__name__, …)``.  Its users write ``package.Name`` where
they use the name; ``from package import Name`` imports its module at once.

:func:`dataclass` is the decorator of the standard library, which compiles up to six methods a
class, half a millisecond to a millisecond, and is in a module that imports the parser and the
disassembler of Python.  Here the first instances of a class are made without compiled code, and the
other methods are the same functions for all classes.  The standard library completes a class that
has many instances, or is asked for its fields or its signature.

:func:`pattern` is :func:`re.compile`, which takes a tenth of a millisecond and more.

:func:`logger` is :func:`logging.getLogger`, whose module takes some milliseconds; a run without
problems logs nothing.  :func:`logged_by` adds a handler before the first message.

Source:
    PEP 557, PEP 562, PEP 681.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib import import_module
from operator import attrgetter
from reprlib import recursive_repr
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform, overload

__all__ = [
    "dataclass",
    "field",
    "field_names",
    "logged_by",
    "logger",
    "on_demand",
    "pattern",
    "replace",
]

_T = TypeVar("_T")
_MISSING: Any = object()
#: What is asked of a dataclass that is not complete.
_ASKED = ("__dataclass_fields__", "__match_args__", "__signature__")
_FROZEN = ("__setattr__", "__delattr__")
#: What the standard library asks of a class, and what it adds.
_NEEDED = ("__module__", "__annotations__", "__orig_bases__", "__post_init__")
_COMPILED = ("__dataclass_params__", "__dataclass_fields__", "__match_args__", "__init__")
_FIELD_OPTIONS = {"init": True, "repr": True, "hash": None, "compare": True}
_OF_EACH_CLASS = frozenset({"__dict__", "__weakref__"})
#: The attribute of a class that has what is known of it.
_DEFERRED = "__deferred__"
#: Instances of a class that are made before its __init__ is compiled: that takes as long as fifty.
_INTERPRETED = 50
_completing = RLock()
#: What adds handlers of :func:`logged_by` whose first message has not come.
_not_added: list[Callable[[], None]] = []


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


if TYPE_CHECKING:
    import logging
    from dataclasses import field
    from logging import getLogger as logger  # noqa: N813
    from re import compile as pattern
else:

    def logger(name: str) -> Any:
        """As :func:`logging.getLogger`; its module is imported for the first message."""
        return _Logger(name)

    def pattern(text: str | bytes, flags: int = 0) -> Any:
        """As :func:`re.compile`, which compiles the pattern when it is first used."""
        return _Pattern(text, flags)

    def field(**options: Any) -> Any:
        """As :func:`dataclasses.field`, for :func:`dataclass` of this module."""
        return _Field(**options)


@contextmanager
def logged_by(make_handler: Callable[[], logging.Handler]) -> Iterator[None]:
    """Let a handler, which is made for the first message, have all messages of softsgx."""
    with ExitStack() as added:

        def add() -> None:
            import logging

            top, handler = logging.getLogger("softsgx"), make_handler()
            top.addHandler(handler)
            added.callback(top.removeHandler, handler)

        if "logging" in sys.modules:
            add()
        else:
            _not_added.append(add)
        try:
            yield
        finally:
            if add in _not_added:
                _not_added.remove(add)


@overload
def dataclass(cls: type[_T], /) -> type[_T]: ...


@overload
def dataclass(
    *, slots: bool = False, frozen: bool = False, eq: bool = True, kw_only: bool = False
) -> Callable[[type[_T]], type[_T]]: ...


@dataclass_transform(field_specifiers=(field,))
def dataclass(
    cls: Any = None,
    /,
    *,
    slots: bool = False,
    frozen: bool = False,
    eq: bool = True,
    kw_only: bool = False,
) -> Any:
    """As :func:`dataclasses.dataclass`, which is imported when a class needs it.

    The class has no ``__init__`` of its own, its annotations are strings, and its bases that are
    dataclasses are also of this module.
    """

    def deferred(cls: type) -> type:
        return _Deferred(cls, slots, {"frozen": frozen, "eq": eq, "kw_only": kw_only}).cls

    return deferred if cls is None else deferred(cls)


class _Logger:
    """A logger that is made when an attribute of it is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        import logging

        while _not_added:
            _not_added.pop()()
        value = getattr(logging.getLogger(self._name), name)
        setattr(self, name, value)
        return value


class _Pattern:
    """A pattern that is compiled when an attribute of it is first asked for."""

    def __init__(self, text: str | bytes, flags: int) -> None:
        self._how = text, flags

    def __getattr__(self, name: str) -> Any:
        import re

        compiled = vars(self).get("_compiled")
        if compiled is None:
            self._compiled = compiled = re.compile(*self._how)
        value = getattr(compiled, name)
        setattr(self, name, value)
        return value


def field_names(cls: type) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass of this module, in their order."""
    return tuple(each.name for each in _of(cls).fields)


def replace(instance: _T, /, **changes: Any) -> _T:
    """As :func:`dataclasses.replace`, for an instance of a dataclass of this module."""
    values = dict(changes)
    for each in _of(type(instance)).fields:
        if each.init:
            values.setdefault(each.name, getattr(instance, each.name))
        elif each.name in changes:
            raise ValueError(f"field {each.name} is declared with init=False")
    return type(instance)(**values)


class _Field:
    """A field and its options, with the names of :class:`dataclasses.Field`."""

    __slots__ = ("compare", "default", "default_factory", "hash", "init", "kw_only", "name", "repr")
    init: bool
    repr: bool
    hash: bool | None
    compare: bool

    def __init__(
        self, default: Any = _MISSING, default_factory: Any = _MISSING, **options: bool | None
    ) -> None:
        self.name, self.kw_only = "", False
        self.default, self.default_factory = default, default_factory
        for name, value in {**_FIELD_OPTIONS, **options}.items():
            setattr(self, name, value)
        assert self.init or default is _MISSING, "a default of what is no argument"

    @property
    def required(self) -> bool:
        """Whether it is an argument without a default."""
        return self.init and self.default is _MISSING and self.default_factory is _MISSING

    def standard(self) -> Any:
        """Return it as the standard library has it."""
        import dataclasses

        given = {
            name: value
            for name in ("default", "default_factory")
            if (value := getattr(self, name)) is not _MISSING
        }
        return dataclasses.field(
            init=self.init, repr=self.repr, hash=self.hash, compare=self.compare, **given
        )


class _Asked:
    """An attribute of a class that is there when the class is complete."""

    def __init__(self, name: str, deferred: _Deferred) -> None:
        self._name, self._deferred = name, deferred

    def __get__(self, _instance: object, _owner: type) -> Any:
        self._deferred.complete()
        return getattr(self._deferred.cls, self._name, None)


class _Deferred:
    """What is known of a dataclass before the standard library has made its methods.

    Args:
        cls: the class as it is written.
        slots: whether to give it slots.
        options: of the decorator; of those that the standard library has, ``frozen``, ``eq`` and
            ``kw_only``.

    Attributes:
        cls: the class: with slots, another one.
        own: the fields that it adds to those of its bases, or replaces.
    """

    def __init__(self, cls: type, slots: bool, options: dict[str, bool]) -> None:
        assert "__init__" not in vars(cls), f"{cls.__name__} has an __init__ that would be replaced"
        self.own = [
            _own_field(cls, name, options["kw_only"])
            for name, kind in cls.__annotations__.items()
            if not kind.startswith("ClassVar")
        ]
        assert not any(kind.startswith("InitVar") for kind in cls.__annotations__.values())
        self.cls = self._with_slots(cls) if slots else cls
        self._options, self._left = options, _INTERPRETED
        self._frozen, self._complete = options["frozen"], False
        if not slots:
            for each in self.own:
                if each.default is not _MISSING:
                    setattr(cls, each.name, each.default)
                elif each.name in vars(cls):
                    delattr(cls, each.name)
        setattr(self.cls, _DEFERRED, self)
        self._add_methods()

    @cached_property
    def fields(self) -> list[_Field]:
        """All fields, also those of bases, in the order of the arguments."""
        found: dict[str, _Field] = {}
        for base in reversed(self.cls.__mro__):
            deferred = vars(base).get(_DEFERRED)
            assert deferred or "__dataclass_fields__" not in vars(base), f"{base} is another's"
            found.update({each.name: each for each in deferred.own} if deferred else {})
        return list(found.values())

    @cached_property
    def _positional(self) -> list[str]:
        return [each.name for each in self.fields if each.init and not each.kw_only]

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(each.name for each in self.fields if each.init)

    @cached_property
    def _required(self) -> frozenset[str]:
        return frozenset(each.name for each in self.fields if each.required)

    @cached_property
    def compared(self) -> Callable[[object], tuple[Any, ...]]:
        """What takes the values that are compared."""
        return _getter([each.name for each in self.fields if each.compare])

    @cached_property
    def hashed(self) -> Callable[[object], tuple[Any, ...]]:
        """What takes the values that are hashed."""
        return _getter([f.name for f in self.fields if (f.compare if f.hash is None else f.hash)])

    @cached_property
    def shown(self) -> list[str]:
        """The fields of the representation."""
        return [each.name for each in self.fields if each.repr]

    # --- instances ------------------------------------------------------------------------------

    def initialize(self, instance: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Set the fields of an instance: itself at first, later by the compiled ``__init__``."""
        self._left -= 1
        if self._left >= 0:
            values = dict(zip(self._positional, arguments, strict=False))
            right = len(values) == len(arguments) and values.keys().isdisjoint(named)
            values.update(named)
            if right and self._required <= values.keys() <= self._arguments:
                self._set(instance, values)
                return
        self.complete()
        self.cls.__init__(instance, *arguments, **named)  # type: ignore[misc]

    def _set(self, instance: Any, values: dict[str, Any]) -> None:
        put = object.__setattr__ if self._frozen else setattr
        for each in self.fields:
            name = each.name
            if name in values:
                put(instance, name, values[name])
            elif each.default_factory is not _MISSING:
                put(instance, name, each.default_factory())
            elif each.default is not _MISSING:
                put(instance, name, each.default)
        if hasattr(instance, "__post_init__"):
            instance.__post_init__()

    # --- the class ------------------------------------------------------------------------------

    def complete(self) -> None:
        """Let the standard library compile ``__init__``, and say what the fields are."""
        import dataclasses

        with _completing:
            if self._complete:
                return  # another thread has completed it
            # Made for another class: threads use this one meanwhile, and memory may run out.
            body = {name: vars(self.cls)[name] for name in _NEEDED if name in vars(self.cls)}
            body["__qualname__"] = self.cls.__qualname__
            body.update({each.name: each.standard() for each in self.own})
            made = type(self.cls)(self.cls.__name__, self.cls.__bases__, body)
            dataclasses.dataclass(**{**self._options, "eq": False, "repr": False})(made)
            for name in _COMPILED:
                setattr(self.cls, name, vars(made)[name])
            if "__signature__" in vars(self.cls):
                delattr(self.cls, "__signature__")  # that of __init__
            self._complete = True

    def _with_slots(self, cls: type) -> type:
        """Return the class with slots for its fields."""
        inherited = {name for base in cls.__mro__ for name in vars(base).get("__slots__", ())}
        names = [each.name for each in self.own]
        body = {name: value for name, value in vars(cls).items() if name not in _OF_EACH_CLASS}
        for name in names:
            body.pop(name, None)
        body["__slots__"] = tuple(name for name in names if name not in inherited)
        # Pickled instances are made without __init__.
        body["__getstate__"], body["__setstate__"] = _state_of, _set_state
        made: type = type(cls)(cls.__name__, cls.__bases__, body)
        made.__qualname__ = cls.__qualname__
        return made

    def _add_methods(self) -> None:
        """Add the methods that need not be compiled for each class, where it has none itself."""
        deferred, cls, own = self, self.cls, vars(self.cls)

        def initialize(self: object, *arguments: Any, **named: Any) -> None:
            deferred.initialize(self, arguments, named)

        @recursive_repr()
        def representation(self: object) -> str:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in deferred.shown)
            return f"{self.__class__.__qualname__}({values})"

        def equal(self: object, other: object) -> bool:
            if self.__class__ is not other.__class__:
                return NotImplemented  # type: ignore[no-any-return]
            same: bool = deferred.compared(self) == deferred.compared(other)
            return same

        def hash_of(self: object) -> int:
            return hash(deferred.hashed(self))

        def refuse_change(self: object, name: str, value: object) -> None:
            deferred.check_change(self, name, "assign to")
            super(cls, self).__setattr__(name, value)  # type: ignore[arg-type]

        def refuse_deletion(self: object, name: str) -> None:
            deferred.check_change(self, name, "delete")
            super(cls, self).__delattr__(name)  # type: ignore[arg-type]

        methods: dict[str, Any] = {name: _Asked(name, self) for name in _ASKED}
        methods["__init__"] = initialize
        if self._frozen:
            assert own.keys().isdisjoint(_FROZEN), f"{cls.__name__} defines what freezes it"
            methods.update(__setattr__=refuse_change, __delattr__=refuse_deletion)
        if "__repr__" not in own:
            methods["__repr__"] = representation
        compares = self._options["eq"]
        if compares and "__eq__" not in own:
            methods["__eq__"] = equal
        # A class that defines __eq__ alone has None for __hash__.
        if compares and own.get("__hash__") is None:
            methods["__hash__"] = hash_of if self._frozen else None
        for name, method in methods.items():
            setattr(cls, name, method)

    def check_change(self, instance: object, name: str, action: str) -> None:
        """Refuse to change a field, or any attribute of an instance of no subclass."""
        if type(instance) is self.cls or any(each.name == name for each in self.fields):
            from dataclasses import FrozenInstanceError

            raise FrozenInstanceError(f"cannot {action} field {name!r}")


def _of(cls: type) -> _Deferred:
    deferred: _Deferred = getattr(cls, _DEFERRED)
    return deferred


def _own_field(cls: type, name: str, kw_only: bool) -> _Field:
    value = vars(cls).get(name, _MISSING)
    made = value if isinstance(value, _Field) else _Field(value)
    assert not hasattr(made.default, "default_factory"), f"{name} is a field of another kind"
    made.name, made.kw_only = name, kw_only
    return made


def _getter(names: list[str]) -> Callable[[object], tuple[Any, ...]]:
    """Return what takes the values of these attributes of an object."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda instance: tuple(getattr(instance, name) for name in names)


def _state_of(instance: Any) -> list[Any]:
    """Return the values of an instance, for copies and pickles."""
    return [getattr(instance, each.name) for each in _of(type(instance)).fields]


def _set_state(instance: Any, state: list[Any]) -> None:
    for each, value in zip(_of(type(instance)).fields, state, strict=True):
        object.__setattr__(instance, each.name, value)
