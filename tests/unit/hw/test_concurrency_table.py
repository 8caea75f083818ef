"""The manual's concurrency table, row by row: what two leaves that overlap do to each other.

Goal: the leaf that finds a page, a measurement or a tracking facility taken ends as its row says;
whoever holds it never notices.  Method: each leaf is stopped in its middle, every other one is run
on the same page in each of its roles, or on another page of the same enclave; the table below is
typed from the manual and says what must come out.  Where it says that two may overlap, the second
must end as it would have ended alone.

Source:
    SDM vol. 3D, "Concurrency and Leaf Functions": base and additional restrictions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
from tests.support.overlap import LEAVES, Op, World, during
from tests.support.paging import GP, Exit, Pf
from tests.support.tables import sampled

from softsgx.arch import ConflictCode, Status

CONFLICT = Status.EPC_PAGE_CONFLICT
RESOURCE = ConflictCode.TRACKING_RESOURCE_CONFLICT
EXCEPTION, ERROR = (
    ConflictCode.EPC_PAGE_CONFLICT_EXCEPTION,
    ConflictCode.EPC_PAGE_CONFLICT_ERROR,
)


@dataclass(frozen=True)
class Base:
    """X exclusive, S shared; how a conflict ends; which VM exit takes its place in a guest."""

    lock: str
    ends: object
    exit: ConflictCode | None = None


@dataclass(frozen=True)
class Row:
    """The rows of one leaf: its operands in the order they are locked, then A, B, T."""

    operands: dict[str, Base]
    locks: dict[str, object] = field(default_factory=dict)


def load(ends: object, code: ConflictCode) -> Row:
    """A load: the target alone, VA page and SECS with others."""
    return Row({"target": Base("X", ends, code), "va": Base("S", ends), "secs": Base("S", ends)})


TABLE: dict[str, Row] = {
    "ecreate": Row({"target": Base("X", GP, EXCEPTION)}),
    "eadd": Row({"target": Base("X", GP, EXCEPTION), "secs": Base("S", GP)}, {"B": GP}),
    "einit": Row({"target": Base("S", GP)}, {"B": GP}),
    "eremove": Row({"target": Base("X", GP, EXCEPTION)}),
    "edbgrd": Row({"target": Base("S", GP)}),
    "edbgwr": Row({"target": Base("S", GP)}),
    "eextend": Row({"target": Base("S", GP)}, {"B": GP}),
    "eldb": load(GP, EXCEPTION),
    "eldu": load(GP, EXCEPTION),
    "eldbc": load(CONFLICT, ERROR),
    "elduc": load(CONFLICT, ERROR),
    "eblock": Row({"target": Base("S", CONFLICT)}),
    "epa": Row({"target": Base("X", GP, EXCEPTION)}),
    "ewb": Row({"target": Base("X", GP, EXCEPTION), "va": Base("S", GP)}, {"T": GP}),
    "etrack": Row({"target": Base("S", GP)}, {"T": GP}),
    "etrackc": Row({"target": Base("S", CONFLICT)}, {"T": CONFLICT}),
    "eaug": Row({"target": Base("X", GP, EXCEPTION), "secs": Base("S", GP)}),
    "emodpr": Row({"target": Base("S", GP)}, {"A": CONFLICT}),
    "emodt": Row({"target": Base("X", CONFLICT, ERROR)}, {"A": CONFLICT}),
    "erdinfo": Row({"target": Base("S", CONFLICT)}),
    "edecvirtchild": Row({"target": Base("S", CONFLICT)}),
    "eincvirtchild": Row({"target": Base("S", CONFLICT)}),
    "esetcontext": Row({"target": Base("S", CONFLICT)}),
}
assert TABLE.keys() == LEAVES.keys(), "a leaf has no row"


def taken(lock: str, held: str) -> bool:
    """Return whether a base lock cannot be had while another leaf has ``held``."""
    return "X" in (lock, held)


def conflict(holder: Op, other: Op, alone: object, *, guest: bool) -> object | None:
    """Return how the table says that ``other`` ends; ``None`` when the two may overlap.

    A, B and T are taken after a leaf has found its pages to be what they must be, which shows in
    how it ends ``alone``.
    """
    held = {holder.pages[role]: base.lock for role, base in TABLE[holder.leaf].operands.items()}
    row = TABLE[other.leaf]
    for role, base in row.operands.items():
        addr = other.pages[role]
        if addr in held and taken(base.lock, held[addr]):
            if guest and base.exit is not None:
                return Exit(base.exit, 7 if base.exit is ERROR else 0, addr, addr)
            return base.ends
    for lock, ends in row.locks.items():
        if isinstance(alone, Pf) or lock not in TABLE[holder.leaf].locks:
            continue
        same_page = holder.pages["target"] == other.pages["target"]
        secs = other.secs()
        same_enclave = secs is not None and secs == holder.secs()
        if not (same_page if lock == "A" else same_enclave):
            continue
        if guest and lock == "T" and other.leaf != "ewb":
            context = other.world.bench.enclave(secs or 0).context
            return Exit(RESOURCE, 0, context, 0)
        return ends
    return None


def roles(leaf: str) -> list[str]:
    return list(TABLE[leaf].operands)


def may_conflict(holder: str, role: str, other: str, other_role: str) -> bool:
    base = taken(TABLE[holder].operands[role].lock, TABLE[other].operands[other_role].lock)
    return base or bool(TABLE[holder].locks.keys() & TABLE[other].locks.keys())


SAME_PAGE = [
    pytest.param(holder, role, other, other_role, id=f"{holder}.{role}-{other}.{other_role}")
    for holder, other in product(TABLE, TABLE)
    for role, other_role in product(roles(holder), roles(other))
]

SHARE = 13  # a quick run takes one case in so many; the table has 23 leaves with 33 operands

IN_GUEST = [param for param in SAME_PAGE if may_conflict(*(str(value) for value in param.values))]


def worlds(holder: str, other: str, make: Any) -> tuple[Op, Op, object]:
    """Return two operations in one world, and how the second ends in a twin world alone."""
    pairs = []
    for _ in range(2):
        first = Op(World(), holder)
        pairs.append((first, make(first, other)))
    alone = pairs[1][1]
    ends = alone.run(alone.world.bench.machine.cpus[1])
    return *pairs[0], ends


def check(holder: Op, other: Op, alone: object, *, guest: bool = False) -> None:
    """See the second leaf end as the table says and the first as if nobody had been there."""
    expected = conflict(holder, other, alone, guest=guest)
    if expected is None:
        expected = alone
        # EBLOCK shares a page with ETRACK, but not the moment in which an epoch ends.
        if other.leaf == "eblock" and holder.leaf in ("etrack", "etrackc"):
            page = other.world.bench.page(other.pages["target"])
            if page.secs is not None and page.secs.addr == holder.secs():
                expected = Status.ENTRYEPOCH_LOCKED
    holder_ends, ends = during(holder, other, guest=guest)
    assert ends == expected, f"{other.leaf} during {holder.leaf}"
    if holder.leaf == other.leaf == "eblock" and ends == Status.SUCCESS:
        assert holder_ends == Status.BLKSTATE or holder.pages != other.pages
    else:
        assert holder_ends in (None, Status.SUCCESS, (Status.SUCCESS, first_bytes(holder)))
    for page in holder.world.bench.machine.pages.values():
        assert (page.lock, page.modification_lock) == (0, False), f"{page!r} is still held"
        if page.enclave is not None:
            assert not page.enclave.measurement_lock and not page.enclave.tracking_lock
    holder.world.bench.machine.check_invariants()


def first_bytes(holder: Op) -> int:
    """Return what EDBGRD reads: the first 8 bytes of the page."""
    if holder.leaf != "edbgrd":
        return 0
    page = holder.world.bench.page(holder.pages["target"])
    return int.from_bytes(holder.world.bench.store.read(page, 0, 8), "little")


def on_the_same_page(role: str, other_role: str) -> Any:
    return lambda first, other: Op(first.world, other, {other_role: first.pages[role]})


@pytest.mark.parametrize(("holder", "role", "other", "other_role"), sampled(SAME_PAGE, SHARE))
def test_two_leaves_on_one_page_end_as_the_table_says(
    holder: str, role: str, other: str, other_role: str
) -> None:
    check(*worlds(holder, other, on_the_same_page(role, other_role)))


@pytest.mark.parametrize(("holder", "role", "other", "other_role"), sampled(IN_GUEST, SHARE))
def test_in_a_guest_a_conflict_is_a_vm_exit_where_the_table_says_so(
    holder: str, role: str, other: str, other_role: str
) -> None:
    first, second, alone = worlds(holder, other, on_the_same_page(role, other_role))
    if conflict(first, second, alone, guest=True) is not None:
        check(first, second, alone, guest=True)


@pytest.mark.parametrize(("holder", "other"), sampled(product(TABLE, TABLE), SHARE))
def test_two_leaves_on_different_pages_of_one_enclave_share_it(holder: str, other: str) -> None:
    check(*worlds(holder, other, lambda first, name: Op(first.world, name)))
