"""Objects made at first use: names of packages, methods of dataclasses, loggers.

Method: a new interpreter for imports; the packages' own source for their declarations.  Dataclasses
are declared twice, and are compared with those of the standard library.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest

from softsgx import ondemand

LAZY = (
    "arch",
    "cgroup",
    "driver",
    "engines.native",
    "engines.native.gdb",
    "engines.native.recording",
    "host",
    "hw",
    "kvm",
    "live",
    "report",
    "runtime",
    "userland",
)


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_and_the_interpreter_see_the_same_names(package: str) -> None:
    module = import_module(f"softsgx.{package}")
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    declared = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared
    for name, home in declared.items():
        assert home is not None
        assert getattr(module, name) is getattr(import_module(home), name)
        parent, _, name_of_module = home.rpartition(".")
        if parent == module.__name__:
            assert name_of_module not in module.__all__, "a module hides a name"
    assert all(hasattr(module, name) for name in module.__all__)


def test_a_name_that_no_module_has_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"softsgx\.kvm.*'Nothing'"):
        import_module("softsgx.kvm").Nothing  # noqa: B018


Decorator = Callable[..., Any]
FIELDS: dict[Decorator, Callable[..., Any]] = {
    ondemand.dataclass: ondemand.field,
    dataclasses.dataclass: dataclasses.field,
}
WAYS: list[dict[str, bool]] = [
    {},
    {"eq": False},
    {"slots": True},
    {"frozen": True},
    {"frozen": True, "slots": True},
    {"frozen": True, "kw_only": True},
    {"eq": False, "slots": True},
]


def declared(dataclass: Decorator, way: dict[str, bool]) -> tuple[type, type]:
    field = FIELDS[dataclass]

    @dataclass(**way)
    class Base:
        """A base."""

        KIND: ClassVar[str] = "base"
        first: int
        second: list[int] = field(default_factory=list)

    @dataclass(**way)
    class Derived(Base):
        """One that is derived."""

        KIND: ClassVar[str] = "derived"
        third: str = "three"
        number: int = field(default=4, repr=False, compare=False)

    return Base, Derived


def outcome(action: Callable[[], object]) -> object:
    try:
        return action()
    except Exception as error:
        return type(error), str(error)


def seen(cls: type, **arguments: Any) -> dict[str, object]:
    """What can be seen of a class; its first use is the one that the caller has made."""
    one, other = cls(**arguments), cls(**arguments)
    slots = getattr(cls, "__slots__", None)
    return {
        "slots": slots,
        "has a dictionary": hasattr(one, "__dict__"),
        "kind": cls.KIND,  # type: ignore[attr-defined]
        "values": [(each.name, each.default) for each in dataclasses.fields(one)],
        "dictionary": dataclasses.asdict(one),
        "repr": repr(one),
        "equal": one == other,
        "hash": outcome(lambda: hash(one) == hash(other)),
        "replaced": outcome(lambda: dataclasses.asdict(dataclasses.replace(one, first=9))),
        "changed": outcome(lambda: setattr(one, "first", 2)),
        "deleted": outcome(lambda: delattr(other, "first")),
        "copied": dataclasses.asdict(copy.copy(one)),
        "match": cls.__match_args__,  # type: ignore[attr-defined]
        "signature": str(inspect.signature(cls)),
        "without an argument": outcome(cls),
    }


FIRST_USES: dict[str, Callable[[type], object]] = {
    "instance": lambda cls: cls(first=0),
    "fields": dataclasses.fields,
    "signature": inspect.signature,
    "patterns": lambda cls: cls.__match_args__,  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("first_use", FIRST_USES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "plain")
def test_dataclasses_are_those_of_the_standard_library(
    way: dict[str, bool], first_use: str
) -> None:
    ours, theirs = declared(ondemand.dataclass, way), declared(dataclasses.dataclass, way)
    FIRST_USES[first_use](ours[1])
    for one, other in zip(ours, theirs, strict=True):
        assert seen(one, first=1) == seen(other, first=1)


def special(dataclass: Decorator) -> list[Any]:
    """Instances of classes with methods or fields of their own kind."""
    field = FIELDS[dataclass]

    @dataclass(frozen=True, slots=True)
    class Nothing:
        """Without a field."""

    @dataclass(frozen=True)
    class One:
        """One field."""

        x: Any = 1

        def __repr__(self) -> str:
            return f"<{self.x}>"

    @dataclass(frozen=True)
    class Hashed:
        """What is hashed is not what is compared."""

        x: int = 1
        y: int = field(default=2, hash=False)
        count: int = field(default=3, compare=False)

    @dataclass(slots=True)
    class Own:
        """Compares and hashes itself."""

        x: Any = None

        def __eq__(self, other: object) -> bool:
            return other == 5

        def __hash__(self) -> int:
            return 77

    recursive = Own()
    recursive.x = [recursive]
    return [
        Nothing(),
        One(),
        One("1"),
        Hashed(),
        Hashed(1, 5, 3),
        Hashed(1, 2, 4),
        Own(),
        recursive,
    ]


def test_methods_that_a_class_has_itself_stay_and_fields_say_what_is_compared() -> None:
    ours, theirs = special(ondemand.dataclass), special(dataclasses.dataclass)
    for one, other in zip(ours, theirs, strict=True):
        assert (repr(one), hash(one), one == 5) == (repr(other), hash(other), other == 5)
    for instances in (ours, theirs):
        assert [instances.index(each) for each in instances] == [0, 1, 2, 3, 4, 3, 6, 6]


def test_a_dataclass_without_options_is_one() -> None:
    @ondemand.dataclass
    class Point:
        """A point."""

        x: int
        y: int = 0

    assert Point(1) == Point(1, 0)
    assert repr(Point(1)).endswith("Point(x=1, y=0)")


def test_a_dataclass_is_still_its_own_when_a_subclass_is_used_first() -> None:
    base, derived = declared(ondemand.dataclass, {"frozen": True, "slots": True})

    class Plain(base):  # type: ignore[misc, valid-type]
        """No dataclass."""

    assert Plain(1).first == 1
    assert isinstance(Plain(1), base)
    assert derived(1) != base(1)


def test_instances_that_come_from_elsewhere_before_any_is_made_here_are_equal_by_value() -> None:
    @ondemand.dataclass(slots=True)
    class Point:
        x: int
        y: int

    first: Any = object.__new__(Point)
    second: Any = object.__new__(Point)
    for point in (first, second):
        point.__setstate__([1, 2])  # as pickle does
    assert first == second


def same_hash(one: object, other: object) -> bool:
    return hash(one) == hash(other)


def counted(dataclass: Decorator) -> type:
    """A class whose instances show the order in which their values are made."""
    field, made = FIELDS[dataclass], count()

    @dataclass(slots=True)
    class Counted:
        first: int = field(default_factory=lambda: next(made))
        given: int = 5
        second: int = field(default_factory=lambda: next(made))
        after: int = field(init=False)

        def __post_init__(self) -> None:
            self.after = next(made)

    return Counted


def test_instances_are_the_same_before_and_after_the_class_is_compiled() -> None:
    ours, theirs = counted(ondemand.dataclass), counted(dataclasses.dataclass)
    for number in range(200):
        one, other = (cls() if number % 3 else cls(number, second=number) for cls in (ours, theirs))
        assert repr(one) == repr(other)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), {}),
        ((1, 2, 3, 4, 5), {}),
        ((1,), {"first": 2}),
        ((1,), {"fifth": 2}),
        ((), {"third": ""}),
    ],
)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "plain")
def test_arguments_that_do_not_fit_are_the_standard_library_s_error(
    way: dict[str, bool], arguments: tuple[int, ...], named: dict[str, Any]
) -> None:
    ours, theirs = declared(ondemand.dataclass, way), declared(dataclasses.dataclass, way)
    wrong = [outcome(partial(cls, *arguments, **named)) for _, cls in (ours, theirs)]
    assert wrong[0] == wrong[1]
    assert isinstance(wrong[0], tuple) and wrong[0][0] is TypeError


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "plain")
def test_nothing_is_completed_for_what_instances_can_do_without_it(way: dict[str, bool]) -> None:
    """Values, comparison, hash, copies and refused changes, before the class is complete."""
    (_, ours), (_, theirs) = (
        declared(dataclass, way) for dataclass in (ondemand.dataclass, dataclasses.dataclass)
    )
    results = []
    for cls in (ours, theirs):
        one, other = cls(first=1), cls(first=1, third="x")
        results.append(
            [
                *(repr(one), repr(copy.copy(one)), repr(copy.deepcopy(one)), one == other),
                one == cls(first=1, number=9),
                outcome(partial(same_hash, one, cls(first=1))),
                outcome(partial(setattr, one, "first", 2)),
                outcome(partial(delattr, one, "third")),
                hasattr(one, "__dict__"),
                sorted(getattr(one, "__dict__", ())),
            ]
        )
    assert results[0] == results[1]
    assert type(vars(ours)["__dataclass_fields__"]).__name__ == "_Asked"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "plain")
def test_replace_and_the_names_of_fields_are_the_standard_library_s(way: dict[str, bool]) -> None:
    _, ours = declared(ondemand.dataclass, way)
    _, theirs = declared(dataclasses.dataclass, way)
    one, other = ours(first=1, third="x"), theirs(first=1, third="x")
    assert ondemand.field_names(ours) == tuple(each.name for each in dataclasses.fields(theirs))
    for changes in ({}, {"first": 3}, {"third": "y", "number": 1}, {"fourth": 4}):
        replaced = [
            outcome(partial(replace, instance, **changes))
            for replace, instance in ((ondemand.replace, one), (dataclasses.replace, other))
        ]
        assert repr(replaced[0]) == repr(replaced[1])


def test_what_is_no_argument_is_not_replaced() -> None:
    after = counted(ondemand.dataclass)()
    with pytest.raises(ValueError, match="after is declared with init=False"):
        ondemand.replace(after, after=1)


def test_a_field_of_the_standard_library_is_refused() -> None:
    with pytest.raises(AssertionError, match="x is a field of another kind"):

        @ondemand.dataclass
        class Wrong:
            x: int = dataclasses.field(default=1)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "plain")
def test_classes_have_the_attributes_of_the_standard_library_s(way: dict[str, bool]) -> None:
    """Defaults as attributes, arguments in order, and a subclass that is no dataclass."""
    results = []
    for dataclass in (ondemand.dataclass, dataclasses.dataclass):
        base, derived = declared(dataclass, way)

        class Plain(derived):  # type: ignore[misc, valid-type]
            """No dataclass."""

        plain = Plain(first=1)
        results.append(
            [
                None if way.get("slots") else getattr(cls, name, None)
                for cls in (base, derived)
                for name in ("first", "second", "third", "number")
            ]
            + [
                repr(outcome(partial(derived, 1, [], "x"))),
                repr(outcome(partial(base, 1))),
                repr(plain),
                outcome(partial(setattr, plain, "first", 2)),
                outcome(partial(delattr, plain, "first")),
            ]
        )
        if not way.get("slots"):  # there the standard library's super() is of another class
            for instance in (plain, base(first=1)):
                results[-1].append(outcome(partial(setattr, instance, "new", 2)))
    assert results[0] == results[1]


def test_a_field_that_is_declared_again_has_one_slot() -> None:
    base, _ = declared(ondemand.dataclass, {"slots": True})

    @ondemand.dataclass(slots=True)
    class Again(base):  # type: ignore[misc, valid-type]
        first: int = 7

    assert vars(Again)["__slots__"] == ()
    assert Again().first == 7


def test_a_class_is_completed_once() -> None:
    _, derived = declared(ondemand.dataclass, {"frozen": True, "slots": True})
    fields = dataclasses.fields(derived)
    vars(derived)["__deferred__"].complete()  # as another thread does that waited
    assert dataclasses.fields(derived) == fields


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "plain")
def test_a_class_stays_usable_while_it_is_completed_and_when_that_fails(
    monkeypatch: pytest.MonkeyPatch, way: dict[str, bool]
) -> None:
    base, _ = declared(ondemand.dataclass, way)
    before = dict(vars(base))

    def fail(**_options: bool) -> None:
        assert dict(vars(base)) == before  # what another thread sees meanwhile
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr(dataclasses, "dataclass", fail)
        with pytest.raises(MemoryError):
            dataclasses.fields(base)
        assert dict(vars(base)) == before
    assert len(dataclasses.fields(base)) == len(ondemand.field_names(base))


def test_a_pattern_is_compiled_when_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[object, ...]] = []
    made = re.compile

    def noting(text: bytes, flags: int) -> re.Pattern[bytes]:
        compiled.append((text, flags))
        return made(text, flags)

    monkeypatch.setattr(re, "compile", noting)
    found = ondemand.pattern(rb"(?P<a>.)b", re.DOTALL)
    assert not compiled
    match = found.fullmatch(b"x\nbx", 1, 3)
    assert match is not None and match["a"] == b"\n"
    assert found.search(b"b") is None and found.pattern == rb"(?P<a>.)b"
    assert compiled == [(rb"(?P<a>.)b", re.DOTALL)]
    with pytest.raises(AttributeError):
        found.nothing  # type: ignore[attr-defined]  # noqa: B018


LOGGING = """
import sys
from softsgx import ondemand

messages = []

def handler():
    import logging

    class Keeping(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    return Keeping()

one, other = ondemand.logger("softsgx.one"), ondemand.logger("softsgx.other")
with ondemand.logged_by(handler):
    pass
with ondemand.logged_by(handler):
    assert "logging" not in sys.modules
    one.warning("the %s", "first")
    other.error("the second")
with ondemand.logged_by(handler):
    one.warning("later")
import logging
assert not logging.getLogger("softsgx").handlers
assert one.name == "softsgx.one"
print(*messages, sep=", ")
"""


def test_handlers_are_added_before_the_first_message_and_removed_after_the_last() -> None:
    argv = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{LOGGING}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == "the first, the second, later\n" and not done.stderr
