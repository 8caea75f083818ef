"""Records that hold integers of C are used as any class with slots."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
from tests.model.test_random_programs import World
from tests.support.hw import make_machine

from softsgx import compiled
from softsgx.arch import PageType
from softsgx.cgroup import EpcCgroup
from softsgx.driver.counts import EnclaveCounts
from softsgx.driver.mm import EnclaveVma
from softsgx.driver.page import EnclavePage
from softsgx.driver.sync import RwLock
from softsgx.hw import EpcPage
from softsgx.hw.secs import Crossings, ResidentSecs
from softsgx.paging import Counters, FlatBacking, SgxEpcPage
from softsgx.paging.ksgxd import Ksgxd
from softsgx.paging.nodes import AtomicCount
from softsgx.paging.va import VaArray
from softsgx.paging.va_page import VaPage
from softsgx.runtime import InlineRuntime

TOP = 2**63 - 1
LIMITS = [(0, 2**512 - 1), (0, 2**64 - 1), (-TOP - 1, TOP), (0, 255)]
"""The least and the greatest integer of a bitmap, an address, a count, and a number of one byte."""
BYTES = {2**512 - 1: 64, 2**64 - 1: 8, TOP: 8, 255: 1}
"""The size of a field by its greatest integer."""


def records() -> list[Any]:
    return [Counters(), EnclaveCounts(), Crossings(), AtomicCount(InlineRuntime())]


RECORDS = [type(one) for one in records()]
CLASSES: list[Any] = [
    *(
        *RECORDS,
        EnclavePage,
        EnclaveVma,
        EpcCgroup,
        EpcPage,
        FlatBacking,
        Ksgxd,
        ResidentSecs,
        RwLock,
    ),
    *(SgxEpcPage, VaArray, VaPage),
]
#: Bytes of the links of a page that can be on a list, and of its EPCM entry.
LINKS = {SgxEpcPage: 24 + 8, VaPage: 24}
needs_core = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)


def counts_of(one: object) -> list[str]:
    return [name for name, value in values_of(one).items() if type(value) is int]


def values_of(one: Any) -> dict[str, object]:
    names = getattr(type(one).__base__, "__slots__", None) or type(one).__slots__
    return {name: getattr(one, name) for name in names}


def blank(cls: Any) -> Any:
    """An instance whose __init__ has not run."""
    return cls.__new__(cls)


def fields_of(cls: Any) -> tuple[list[str], list[str]]:
    """The counts and the objects of a class with a structure."""
    one, names = blank(cls), vars(cls.__base__)["__slots__"]
    types = {name: type(getattr(one, name, None)) for name in names}
    return [name for name in names if types[name] is int], [
        name for name in names if types[name] not in (int, bool)
    ]


def flags_of(cls: Any) -> list[str]:
    """The flags of a class with a structure."""
    counts, objects = fields_of(cls)
    return [name for name in vars(cls.__base__)["__slots__"] if name not in {*counts, *objects}]


def limits_of(cls: Any, name: str) -> tuple[int, int]:
    """The least and the greatest integer that a field takes."""
    for low, high in LIMITS:
        one = blank(cls)
        try:
            setattr(one, name, low)
            setattr(one, name, high)
        except OverflowError:
            continue
        return low, high
    raise AssertionError(f"{cls.__name__}.{name} takes integers of no kind")


# --- as a class of Python -------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_each_field_holds_what_it_was_given(number: int) -> None:
    one = records()[number]
    expected = values_of(one)
    for place, name in enumerate(counts_of(one)):
        expected[name] = (-1) ** place * (1 << 40) + place
        setattr(one, name, expected[name])
    assert values_of(one) == expected
    for value in (0, -1, TOP, -TOP - 1):
        for name in counts_of(one):
            setattr(one, name, value)
            assert getattr(one, name) == value
    with pytest.raises(AttributeError):
        one.another = 1


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_copies_and_pickles_have_the_same_fields(number: int) -> None:
    one = records()[number]
    for place, name in enumerate(counts_of(one)):
        setattr(one, name, place + 7)
    copies = [copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    for other in copies:
        assert type(other) is type(one) and values_of(other) == values_of(one)
        name = counts_of(one)[-1]
        setattr(other, name, 0)
        assert getattr(one, name) != 0
    if dataclasses.is_dataclass(one):
        assert dataclasses.asdict(one) == values_of(one)  # type: ignore[arg-type]


def test_equal_records_are_those_with_equal_fields() -> None:
    assert Counters(held={"reg": 1}, young=2) == Counters(held={"reg": 1}, young=2)
    assert Counters(young=2) != Counters(young=3)
    assert Crossings(1, 2, 3, 4) == Crossings(eenter=1, eresume=2, eexit=3, aex=4)
    assert "eexit=3, aex=4" in repr(Crossings(1, 2, 3, 4))


def test_a_class_made_from_the_standard_librarys_init_is_the_same() -> None:
    many = [EnclaveCounts(touched=number) for number in range(100)]
    assert [one.touched for one in many] == [*range(100)]
    assert all(one.faults == {} and one.kicks == 0 for one in many)


# --- in C -----------------------------------------------------------------------------------------


@needs_core
def test_the_compiled_core_has_the_fields_of_each_class() -> None:
    core: Any = compiled.speedups
    for cls in CLASSES:
        structure = core.fields(cls.__name__)
        assert structure is not None and cls.__base__ is structure, cls
        assert core.fields(cls.__name__) is structure
        assert core.bind(cls.__name__, cls)
        if not dataclasses.is_dataclass(cls):
            assert {*cls.__slots__} == {*vars(structure)["__slots__"]}
        assert not core.bind(cls.__name__, int)
        counts, objects = fields_of(cls)
        size = sum(BYTES[limits_of(cls, name)[1]] for name in counts)
        size = -(-(size + 8 * len(objects) + len(flags_of(cls))) // 8) * 8
        assert cls.__basicsize__ == object.__basicsize__ + LINKS.get(cls, 0) + size
    assert core.fields("Other") is None
    with pytest.raises(TypeError):
        core.fields(1)


@needs_core
def test_a_class_with_other_fields_stays_as_it_is_written() -> None:
    core: Any = compiled.speedups
    for slots in [("_latch",), ("_latch", "value", "more"), ("_latch", "values")]:
        written = type("AtomicCount", (), {"__slots__": slots})
        assert compiled.record(written) is written
        assert not core.bind("AtomicCount", written)
    derived = type("AtomicCount", (Crossings,), {"__slots__": ("_latch", "value")})
    assert compiled.record(derived) is derived
    right = type("AtomicCount", (), {"__slots__": ("value", "_latch"), "__doc__": "text"})
    made: type = compiled.record(right)
    assert made is not right and made.__doc__ == "text" and made.__name__ == "AtomicCount"


@needs_core
@pytest.mark.parametrize("cls", CLASSES)
def test_each_field_has_its_own_place(cls: Any) -> None:
    one, (counts, objects) = blank(cls), fields_of(cls)
    values: dict[str, object] = {
        name: limits_of(cls, name)[n % 2] // 3 + n for n, name in enumerate(counts)
    }
    values |= {name: f"the object of {name}" for name in objects}
    for name, value in values.items():
        setattr(one, name, value)
    for number, name in enumerate(flags_of(cls)):
        values[name] = number % 3 == 1
        setattr(one, name, values[name])
    assert {name: getattr(one, name) for name in values} == values
    for name in flags_of(cls):
        values[name] = not values[name]
        setattr(one, name, values[name])
        assert {name: getattr(one, name) for name in values} == values
    assert sys.getsizeof(one) >= 8 * (len(counts) + len(objects)) - 7 * len(counts)


@needs_core
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_no_integer_of_its_kind_is_refused(cls: Any) -> None:
    one = blank(cls)
    for name in fields_of(cls)[0]:
        low, high = limits_of(cls, name)
        for value in (low, high, high >> 1, 5):
            setattr(one, name, value)
            assert getattr(one, name) == value
        for wrong, error in [
            *((high + 1, OverflowError), (low - 1, OverflowError), (1 << 600, OverflowError)),
            *((None, TypeError), (1.0, TypeError), ("1", TypeError)),
        ]:
            with pytest.raises(error):
                setattr(one, name, wrong)
            assert getattr(one, name) == 5
        with pytest.raises(TypeError):
            delattr(one, name)
        assert getattr(one, name) == 5
        setattr(one, name, True)
        assert type(getattr(one, name)) is int


@needs_core
@pytest.mark.parametrize("found", [b"", bytes(63), bytes(65), bytearray(64), None])
def test_an_integer_that_says_other_bytes_is_no_bitmap(found: object) -> None:
    class Odd(int):
        def to_bytes(self, *_arguments: Any, **_named: Any) -> Any:
            return found

    page = blank(VaPage)
    page.free = 5
    with pytest.raises(TypeError):
        page.free = Odd(7)
    assert page.free == 5


@needs_core
@pytest.mark.parametrize("cls", [cls for cls in CLASSES if hasattr(cls, "__slots__")])
def test_what_is_no_truth_is_no_flag(cls: Any) -> None:
    one = blank(cls)
    for name in flags_of(cls):
        assert getattr(one, name) is False
        setattr(one, name, True)
        for wrong in (1, 0, None, "yes"):
            with pytest.raises(TypeError):
                setattr(one, name, wrong)
        with pytest.raises(TypeError):
            delattr(one, name)
        assert getattr(one, name) is True


@needs_core
def test_records_of_pages_have_flags_and_numbers_of_one_byte() -> None:
    assert flags_of(EnclavePage) == ["being_reclaimed", "touched"]
    assert limits_of(EnclavePage, "max_prot") == (0, 255)
    assert len(flags_of(SgxEpcPage)) == 6


@needs_core
def test_a_field_that_was_not_set_is_zero_or_missing() -> None:
    one = Counters.__new__(Counters)
    assert one.young == one.alloc_busy == 0
    with pytest.raises(AttributeError):
        _ = one.held
    one.held = {}
    del one.held
    with pytest.raises(AttributeError):
        _ = one.held


@needs_core
def test_a_count_that_would_pass_64_bits_is_an_error_and_stays() -> None:
    world = World(40, optimised="compiled")
    core, process = world.system.core, world.actor.process
    page = next(p for p in world.system.driver.enclaves[0].pages.values() if p.kind is PageType.REG)
    core.counters.batches = TOP
    with pytest.raises(OverflowError, match="beyond 64 bits"):
        core.reclaim()
    assert core.counters.batches == TOP
    if page.epc is not None:
        assert core.evict(page.epc)
    core.counters.eldu = TOP
    with pytest.raises(OverflowError, match="beyond 64 bits"):
        process.mm.fault(page.linaddr, 1, process)
    assert core.counters.eldu == TOP


# --- memory ---------------------------------------------------------------------------------------


class Anything:
    """An object that may refer to a record, and that weak references see."""

    def __init__(self, record: object) -> None:
        self.record = record


@needs_core
def test_cycles_through_a_record_are_collected() -> None:
    seen = []
    for cls in CLASSES:
        assert gc.is_tracked(blank(cls))
        one = blank(cls)
        for name in fields_of(cls)[1]:
            inside = Anything(one)
            setattr(one, name, inside)
            seen.append((cls, name, weakref.ref(inside)))
            assert gc.get_referents(one).count(inside) == 1, name
        assert gc.get_referents(one).count(cls) == 1
    del one, inside
    gc.collect()
    assert [(cls, name) for cls, name, inside_it in seen if inside_it() is not None] == []


@needs_core
def test_an_instance_of_a_derived_class_is_collected_with_its_attributes() -> None:
    derived = type("Derived", (Crossings,), {})
    one = derived()
    one.itself = one
    seen = weakref.ref(one)
    del one
    gc.collect()
    assert seen() is None


@needs_core
def test_records_that_end_leave_nothing_behind() -> None:
    held: dict[str, int] = {}

    def use() -> None:
        for _ in range(100):
            some = [*records(), Counters(held=held), copy.copy(Counters())]
            for one in some:
                setattr(one, counts_of(one)[0], 1 << 60)
                with pytest.raises(TypeError):
                    setattr(one, counts_of(one)[0], None)
            for cls in CLASSES:
                one, (counts, objects) = blank(cls), fields_of(cls)
                for name in counts + objects:
                    setattr(one, name, 200)

    def state() -> list[int]:
        gc.collect()
        return [sys.getrefcount(held), *map(sys.getrefcount, CLASSES)]

    use()
    before, blocks = state(), sys.getallocatedblocks()
    use()
    assert state() == before
    assert sys.getallocatedblocks() - blocks < 50


@needs_core
@pytest.mark.skipif(
    sys.version_info[:2] == (3, 13),
    reason="dict.setdefault() of Python 3.13 goes on after MemoryError, with an inconsistent dict",
)
def test_a_type_that_cannot_be_made_is_made_later() -> None:
    pytest.importorskip("_testcapi")
    code = """
import _testcapi, softsgx._speedups as core
failures = 0
for name in ("Counters", "Crossings"):
    for number in range(10_000):
        _testcapi.set_nomemory(number, number + 1)
        try:
            made = core.fields(name)
        except MemoryError:
            failures += 1
            continue
        finally:
            _testcapi.remove_mem_hooks()
        break
    assert made is core.fields(name) and len(made.__slots__) in (4, 35), name
    one = type(name, (made,), {"__slots__": ()})()
    assert getattr(one, made.__slots__[0]) == 0
print(failures > 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@needs_core
def test_a_number_below_zero_is_no_address() -> None:
    core: Any = compiled.speedups
    leaves = core.leaves(None, make_machine())
    with pytest.raises(OverflowError, match="negative"):
        leaves["try_eldu"](0, 0, b"", -1, 0, 0)
    assert leaves["try_eldu"](0, 0, b"", 1 << 63, 0, 0) is False
