"""Objects made at first use: names of packages, methods of dataclasses; and what a run saves.

Method: a new interpreter for imports; the packages' own source for their declarations.  Dataclasses
are declared twice, and are compared with those of the standard library.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest

from softsgx import ondemand

LAZY = (
    "engines.native.gdb",
    "engines.native.recording",
    "kvm",
    "live",
    "report",
    "runtime",
    "userland",
)
#: What only other verbs, other engines, or options of ``run`` need.
NOT_FOR_A_RUN = (
    "fractions",
    "platform",
    "tempfile",
    "tomllib",
    "rich",
    "softsgx.engines.native.faults.logged",
    "softsgx.engines.native.gdb.loop",
    "softsgx.engines.native.recording.page_table",
    "softsgx.engines.native.recording.pagers",
    "softsgx.engines.native.recording.recorder",
    "softsgx.engines.native.recording.recording",
    "softsgx.engines.native.syscalls.call_log",
    "softsgx.image",
    "softsgx.kvm.device",
    "softsgx.kvm.guest",
    "softsgx.live.runs",
    "softsgx.report.html",
    "softsgx.report.perfetto",
    "softsgx.report.tables",
    "softsgx.runtime.exploration",
    "softsgx.runtime.seeded",
    "softsgx.runtime.threads",
    "softsgx.sim",
    "softsgx.userland.process",
)


def test_the_run_command_imports_nothing_that_a_run_does_not_need() -> None:
    code = "import sys, softsgx.cli.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "softsgx.engines.native.supervisor" in done.stdout.split()
    assert not set(NOT_FOR_A_RUN) & set(done.stdout.split())


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
        assert home.rpartition(".")[2] not in module.__all__, "a module hides a name"
    assert all(hasattr(module, name) for name in module.__all__)


def test_a_name_that_no_module_has_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"softsgx\.kvm.*'Nothing'"):
        import_module("softsgx.kvm").Nothing  # noqa: B018


def test_the_run_command_compiles_few_dataclasses_when_it_is_imported() -> None:
    code = """
import dataclasses
made, real = [], dataclasses.dataclass
dataclasses.dataclass = lambda *a, **k: made.append(a) or real(*a, **k)
import softsgx.cli.run
print(len(made))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20


Decorator = Callable[..., Any]
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
