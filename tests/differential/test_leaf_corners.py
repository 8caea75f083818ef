"""Each check of the fast leaves, one after the other, against the readable ones.

Method: two machines of ``test_optimised_leaves`` are brought to the point where a leaf succeeds;
then one thing is changed that a check looks at.  Result, EPCM, slots and bytes must be equal.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
from tests.differential.test_optimised_leaves import ELRANGE, FIRST, PAGES, SECS, VA, Half, Step
from tests.support.ciphers import NewerCipher

from softsgx.arch import PageType, Secs
from softsgx.hw import EpcPage
from softsgx.hw.secrets import PagingKey
from softsgx.hw.secs import ResidentSecs

BEFORE = {
    "eblock": (),
    "etrack": (),
    "try_ewb": ("eblock", "etrack"),
    "ewb": ("eblock", "etrack"),
    "try_eldu": ("eblock", "etrack", "ewb"),
    "eldu": ("eblock", "etrack", "ewb"),
}


def step(leaf: str, page: int, *, secs: int = SECS, dirt: int = 0, flip: int | None = None) -> Step:
    return Step(leaf, page, page, page, page, secs, flip, dirt)


def compare(leaf: str, page: int, change: Callable[[Half], object], **operands: Any) -> str:
    """Prepare a leaf in both machines, change something, and execute it; return the result."""
    results = []
    halves = [Half(fast=fast) for fast in (True, False)]
    for half in halves:
        done = [half.run(step(each, page)) for each in BEFORE[leaf]]
        assert all(each.startswith("SUCCESS") for each in done), done
        change(half)
        try:
            results.append(half.run(step(leaf, page, **operands)))
        except Exception as error:
            results.append(type(error).__name__)
    assert results[0] == results[1]
    assert halves[0].state() == halves[1].state()
    assert entries(halves[0]) == entries(halves[1])
    return results[0]


def entries(half: Half) -> list[object]:
    """What EPCM entries hold beside their flags."""
    pages = [half.page(FIRST + number) for number in range(PAGES)]
    return [
        (page.secs is None, page.linaddr, page.enclave is None, page.slots is None)
        for page in pages
    ]


def unchanged(_half: Half) -> None:
    """All checks pass."""


def of_page(index: int, name: str, value: object) -> Callable[[Half], object]:
    return lambda half: setattr(half.page(index), name, value)


def of_enclave(name: str, value: object) -> Callable[[Half], object]:
    return lambda half: setattr(half.enclave, name, value)


@pytest.mark.parametrize("page", range(PAGES))
@pytest.mark.parametrize("leaf", BEFORE)
def test_each_kind_of_page_goes_and_comes_with_its_flags(leaf: str, page: int) -> None:
    assert compare(leaf, page, unchanged).startswith("SUCCESS")


@pytest.mark.parametrize("rights", range(8))
@pytest.mark.parametrize("flag", ["pending", "modified", "pr"])
@pytest.mark.parametrize("value", [False, True])
def test_rights_and_flags_are_kept(rights: int, flag: str, value: bool) -> None:
    halves = [Half(fast=fast) for fast in (True, False)]
    for half in halves:
        page = half.page(FIRST)
        page.rwx = rights
        setattr(page, flag, value)
    for leaf in (*BEFORE["try_eldu"][:2], "try_ewb", "try_eldu"):
        first, second = (half.run(step(leaf, 0)) for half in halves)
        assert first == second and first.startswith("SUCCESS")
        assert halves[0].state() == halves[1].state()
    page = halves[0].page(FIRST)
    assert page.rwx == rights and getattr(page, flag) is value


@pytest.mark.parametrize("leaf", ["eblock", "etrack", "try_ewb", "try_eldu"])
@pytest.mark.parametrize(
    ("index", "name", "value"),
    [
        *product((FIRST, VA, SECS), ("lock",), (-1, 1)),
        *product((FIRST, VA, SECS), ("valid",), (False, True)),
        *((FIRST, "blocked", False), (FIRST, "blocked", True), (VA, "slots", None)),
    ],
)
def test_a_leaf_needs_pages_that_are_valid_and_unlocked(
    leaf: str, index: int, name: str, value: object
) -> None:
    compare(leaf, 0, of_page(index, name, value))


@pytest.mark.parametrize("leaf", ["eblock", "try_ewb"])
@pytest.mark.parametrize("name", ["etrack_running", "tracking_lock"])
def test_a_leaf_waits_for_the_locks_of_an_enclave(leaf: str, name: str) -> None:
    compare(leaf, 0, of_enclave(name, True))


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("cycles", range(-1, 5))
def test_ewb_needs_a_page_that_was_blocked_a_cycle_ago(cycles: int, threads: int) -> None:
    def change(half: Half) -> None:
        half.page(FIRST).bepoch = half.enclave.epoch - cycles
        half.enclave.prev_count = threads

    result = compare("try_ewb", 0, change)
    if cycles == 0:
        assert result.startswith("NOT_TRACKED")
    if cycles == 1:
        assert result.startswith("NOT_TRACKED" if threads else "SUCCESS")


def test_a_slot_is_aligned() -> None:
    assert "GP" in compare("try_eldu", 0, unchanged, dirt=4)
    half = Half(fast=True)
    for leaf in BEFORE["try_ewb"]:
        half.run(step(leaf, 0))
    before = half.state()
    for dirt in range(1, 8):
        assert half.hw.leaves.try_ewb(half.page(FIRST).addr, half.page(VA).addr + dirt) is None
    assert half.state() == before


@pytest.mark.parametrize("operand", ["page", "slot"])
def test_operands_are_pages_of_the_epc(operand: str) -> None:
    half = Half(fast=True)
    page: Any = half.page(FIRST).addr
    slot: Any = half.page(VA).addr
    for leaf in BEFORE["try_ewb"]:
        half.run(step(leaf, 0))
    if operand == "page":
        page -= 1 << 30
    else:
        slot -= 1 << 30
    before, leaves = half.state(), half.hw.leaves
    assert leaves.try_ewb(page, slot) is None
    assert not leaves.try_eldu(ELRANGE, half.base, bytes(4112), 0x203, page, slot)
    assert half.state() == before


def test_a_page_is_blocked_in_the_current_epoch() -> None:
    def change(half: Half) -> None:
        for _ in range(3):
            half.run(step("etrack", 0))
        half.page(FIRST).bepoch = 0

    compare("eblock", 0, change)


def test_a_loaded_page_has_nothing_of_the_page_before() -> None:
    def change(half: Half) -> None:
        page: Any = half.page(FIRST)
        page.pt, page.linaddr, page.rwx, page.blocked = PageType.TCS, 0x1000, 7, True
        page.pending = page.modified = page.pr = True
        page.enclave, page.slots = half.enclave, [1]
        page.valid = False

    for fast in (True, False):
        half = Half(fast=fast)
        for leaf in BEFORE["try_eldu"]:
            half.run(step(leaf, 0))
        before = entries(half)
        change(half)
        assert half.run(step("try_eldu", 0)).startswith("SUCCESS")
        page = half.page(FIRST)
        assert (page.pt, page.linaddr, page.rwx, page.blocked) == (PageType.REG, ELRANGE, 3, False)
        assert (page.pending, page.modified, page.pr) == (True, False, False)
        assert page.enclave is None and page.slots is None and entries(half)[1:] == before[1:]


@pytest.mark.parametrize("leaf", ["try_ewb", "try_eldu"])
def test_a_slot_holds_the_version_of_its_page_alone(leaf: str) -> None:
    def occupy(half: Half) -> None:
        slots: Any = half.page(VA).slots
        slots[0] += 8

    assert not compare(leaf, 0, occupy).startswith("SUCCESS")


@pytest.mark.parametrize("kind", [list, partial(array, "Q")])
@pytest.mark.parametrize("leaf", ["try_ewb", "try_eldu"])
def test_any_sequence_holds_versions(leaf: str, kind: Callable[[Any], Any]) -> None:
    def change(half: Half) -> None:
        page = half.page(VA)
        page.slots = kind(page.slots)

    assert compare(leaf, 0, change).startswith("SUCCESS")


@pytest.mark.parametrize("secs", [VA, FIRST, FIRST + 1, 9])
def test_a_page_is_loaded_into_an_enclave(secs: int) -> None:
    assert not compare("try_eldu", 0, unchanged, secs=secs).startswith("SUCCESS")


@pytest.mark.parametrize("kind", range(8))
def test_only_kinds_of_pages_of_enclaves_are_loaded(kind: int) -> None:
    """The page is one that EWB could have written, as far as its MAC tells."""

    def change(half: Half) -> None:
        contents, pcmd = half.out[0]
        pcmd[1] = kind  # of SECINFO.FLAGS, which begin the PCMD
        slots: Any = half.page(VA).slots
        flags = int.from_bytes(pcmd[:8], "little")
        header = struct.pack("<QQQ", half.enclave.eid, ELRANGE, flags).ljust(128, b"\0")
        sealed = half.hw.secrets.paging.seal(b"\5" * 4096, slots[0], header)
        contents[:], pcmd[112:] = sealed[:4096], sealed[4096:]

    compare("try_eldu", 0, change)


@pytest.mark.parametrize("flip", [0, 1, 8, 64, 112, 127, 130, 255])
def test_a_changed_page_is_refused(flip: int) -> None:
    compare("try_eldu", 0, unchanged, flip=flip)


class OtherKey(PagingKey):
    """A key of another class, which is asked itself."""

    used: list[str]

    def seal(self, *arguments: Any) -> Any:
        self.used.append("seal")
        return super().seal(*arguments)

    def unseal(self, *arguments: Any) -> Any:
        self.used.append("unseal")
        return super().unseal(*arguments)


@pytest.mark.parametrize("leaf", ["try_ewb", "try_eldu"])
def test_a_key_of_another_class_is_asked_itself(leaf: str) -> None:
    used: list[list[str]] = []

    def change(half: Half) -> None:
        own = half.hw.secrets.paging
        key = OtherKey(own._key)
        key._versions, key.used = own._versions, []
        half.hw.secrets.paging = key
        used.append(key.used)

    assert compare(leaf, 0, change).startswith("SUCCESS")
    assert used == [["seal" if leaf == "try_ewb" else "unseal"]] * 2


def test_a_cipher_that_fails_is_no_refused_page() -> None:
    calls: list[object] = []

    class Failing:
        def decrypt(self, *_arguments: object) -> bytes:
            calls.append(None)
            raise ZeroDivisionError

    def change(half: Half) -> None:
        half.hw.secrets.paging._aead = Failing()  # type: ignore[assignment]

    assert compare("try_eldu", 0, change) == "ZeroDivisionError"
    assert len(calls) == 2, "once in each machine"


@pytest.mark.parametrize("leaf", ["try_ewb", "try_eldu"])
def test_a_cipher_in_python_can_keep_what_it_gets(leaf: str) -> None:
    kept: list[list[bytes]] = []

    def change(half: Half) -> None:
        key = half.hw.secrets.paging
        cipher: Any = NewerCipher(key._key)
        key._aead = cipher
        kept.append(cipher.kept)

    assert compare(leaf, 0, change).startswith("SUCCESS")
    first, second = kept
    assert [*map(bytes, first)] == [*map(bytes, second)] and len(first) == 3


def test_a_page_is_loaded_into_the_enclave_that_was_there_when_its_leaf_began() -> None:
    """No other enclave is changed, not even one that takes the memory of that one."""
    half = Half(fast=True)
    assert all(half.run(step(each, 0)).startswith("SUCCESS") for each in BEFORE["try_eldu"])
    key, secs, others = half.hw.secrets.paging, half.page(SECS), list[ResidentSecs]()

    class Removing(NewerCipher):
        def decrypt(self, *arguments: Any) -> bytes:
            secs.enclave = None
            others.extend(ResidentSecs(Secs(size=ELRANGE), 2, 0) for _ in range(100))
            return super().decrypt(*arguments)

    key._aead = Removing(key._key)  # type: ignore[assignment]
    del half.enclave
    assert half.run(step("try_eldu", 0)).startswith("SUCCESS")
    assert [other.children for other in others] == [0] * 100


def test_each_key_has_its_own_cipher() -> None:
    fast, readable = ([Half(fast=how) for _ in range(2)] for how in (True, False))
    for half, key in zip((*fast, *readable), (b"1", b"2", b"1", b"2"), strict=True):
        half.hw.secrets.paging = PagingKey(key * 16)
    for leaf in (*BEFORE["try_eldu"], "try_eldu", *BEFORE["try_eldu"]):
        for half in (*fast, *readable):
            assert half.run(step(leaf, 0)).startswith("SUCCESS")
    first, second = ([half.out for half in halves] for halves in (fast, readable))
    assert first == second and first[0] != first[1]


def test_versions_fill_the_whole_initialisation_vector() -> None:
    def change(half: Half) -> None:
        half.hw.secrets.paging._versions = iter([0x8877_6655_4433_2211])

    assert compare("try_ewb", 0, change).startswith("SUCCESS")


@pytest.mark.parametrize("fast", [False, True])
def test_versions_that_end_are_an_error(fast: bool) -> None:
    half = Half(fast=fast)
    for leaf in BEFORE["try_ewb"]:
        half.run(step(leaf, 0))
    half.hw.secrets.paging._versions = iter(())
    before = half.state()
    with pytest.raises((AssertionError, StopIteration)):
        half.run(step("try_ewb", 0))
    assert half.state() == before


@pytest.mark.parametrize("fast", [False, True])
def test_the_bytes_of_an_evicted_page_are_dropped(fast: bool) -> None:
    half, dropped = Half(fast=fast), list[EpcPage]()
    kind: Any = type(half.hw.store)

    class Noting(kind):  # type: ignore[misc]
        __slots__ = ()

        def drop(self, page: EpcPage) -> None:
            dropped.append(page)
            super().drop(page)

    half.hw.store.__class__ = Noting
    for leaf in (*BEFORE["try_ewb"], "try_ewb"):
        half.run(step(leaf, 0))
    assert dropped == [half.page(FIRST)]
