"""Stubs: code behind our vDSO that stands for some code of the program, and jumps that lead there.

Of the program's code one instruction becomes a jump, which does not change what comes behind it.
The stub does what the code does, without its stop, and continues behind it.  Code that jumps to
another instruction of it executes that, and stops as before.

Source:
    SDM vol. 2, "JMP"; vol. 3A, "Handling Self- and Cross-Modifying Code".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from softsgx.engines.native import abi
from softsgx.ondemand import dataclass

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = [
    "JUMP_BYTES",
    "MOST_STATE_STUBS",
    "REACH",
    "STATE_BYTES",
    "STATE_STUB_BYTES",
    "Site",
    "Stub",
    "Stubs",
    "jump",
    "merged",
    "replace_in_enclave",
]

JUMP_BYTES = 5
REACH = 1 << 30
"""How far a stub may be from its site."""
STATE_STUB_BYTES = 1024
"""Of a stub for an instruction on extended state (``vdso/state_code.py``)."""
STATE_BYTES = 8 * abi.PAGE
"""Of an address space, for those stubs."""
MOST_STATE_STUBS = STATE_BYTES // STATE_STUB_BYTES
#: Between them is no page that only a write of all would copy.
_NEAR = abi.PAGE


class Site(Protocol):
    """Code of the program that a stub stands for; equal ones may have the same stub.

    Attributes:
        start: address of the instruction that becomes a jump.
        at: address of the instruction that stops.
    """

    @property
    def start(self) -> int:
        """See there."""

    @property
    def at(self) -> int:
        """See there."""

    def stub(self, place: int) -> tuple[bytes, dict[str, int]]:
        """Return the code of its stub at address ``place``, and the labels of that."""


SiteT = TypeVar("SiteT", bound=Site)


@dataclass(slots=True, frozen=True)
class Stub(Generic[SiteT]):
    """A stub that is in the address space.

    Attributes:
        site: what it stands for; several enclaves may use its address in turn.
        labels: offset of each label in its code.
    """

    site: SiteT
    labels: dict[str, int]


def jump(start: int, target: int) -> bytes:
    """Return a jump from one address to another."""
    distance = target - (start + JUMP_BYTES)
    return b"\xe9" + distance.to_bytes(4, "little", signed=True)


def merged(
    changes: Iterable[tuple[int, bytes]], code: bytes, begin: int
) -> list[tuple[int, bytes]]:
    """Return changes of code as fewer ones, which also write what is between those that are near.

    One write of more bytes is cheaper than two.

    Args:
        changes: (place, bytes) of each, in the order of their places.
        code: the code as it is.
        begin: the place where ``code`` begins.
    """
    found: list[tuple[int, bytes]] = []
    for place, data in changes:
        if found:
            start, before = found[-1]
            end = start + len(before)
            if place - end < _NEAR:
                found[-1] = start, before + code[end - begin : place - begin] + data
                continue
        found.append((place, data))
    return found


class Stubs(Generic[SiteT]):
    """The stubs of one kind in one address space.

    Args:
        size: bytes of a stub.
        area: address of an area of them, and how many it has room for.
        make_area: makes another area that code at an address can jump to, and returns the same, or
            ``None`` where it cannot; ``None``: only ``area`` has stubs.

    Attributes:
        plain: addresses of instructions that have no stub and always stop.
    """

    def __init__(
        self,
        size: int,
        area: tuple[int, int] | None = None,
        make_area: Callable[[ProgramThread, int, int], tuple[int, int] | None] | None = None,
    ) -> None:
        self._size, self._make_area = size, make_area
        self._areas: list[_Area[SiteT]] = []
        self.plain: set[int] = set()
        if area is not None:
            self._areas.append(_Area(*area, []))

    def __len__(self) -> int:
        return sum(len(area.made) for area in self._areas)

    def __iter__(self) -> Iterator[Stub[SiteT]]:
        return (stub for area in self._areas for stub in area.made)

    def copy(self) -> Stubs[SiteT]:
        """Return those of an address space that fork makes of this one."""
        other: Stubs[SiteT] = Stubs(self._size, make_area=self._make_area)
        other._areas = [_Area(each.start, each.most, list(each.made)) for each in self._areas]
        return other

    def find(self, address: int) -> tuple[Stub[SiteT], int] | None:
        """Return the stub at an address, and the distance from its start; ``None``: none is."""
        for area in self._areas:
            number, at = divmod(address - area.start, self._size)
            if 0 <= number < len(area.made):
                return area.made[number], at
        return None

    def leads_from(self, at: int, jumps: Container[int]) -> bool:
        """Return whether a jump at one of these addresses leads to a stub for the one at ``at``."""
        return any(stub.site.at == at and stub.site.start in jumps for stub in self)

    def can_have(self, site: SiteT, thread: ProgramThread) -> bool:
        """Return whether there is a stub for ``site``, or room for one that its jump reaches.

        Args:
            site: see there.
            thread: a stopped thread, which may have to map an area.

        Raises:
            Gone: the thread has died.
        """
        if self._place(site) is None and self._make_area is not None:
            made = self._make_area(thread, site.start, self._size)
            if made is not None:
                self._areas.append(_Area(*made, []))
        return self._place(site) is not None

    def jump_from(self, site: SiteT, memory_fd: int) -> bytes:
        """Return the jump to the stub for a site that :meth:`can_have` one; store a new stub.

        Args:
            site: see there.
            memory_fd: descriptor of ``/proc/PID/mem``.
        """
        found = self._place(site)
        assert found is not None, "a stub without a place"
        area, number = found
        place = area.start + self._size * number
        if number == len(area.made):
            code, labels = site.stub(place)
            assert len(code) <= self._size, "a stub is longer than its place"
            os.pwrite(memory_fd, code, place)
            area.made.append(Stub(site, labels))
        return jump(site.start, place)

    def jump_of(self, site: SiteT) -> bytes:
        """Return the jump to the stub that a site has."""
        found = self._place(site)
        assert found is not None, "a stub without a place"
        area, number = found
        return jump(site.start, area.start + self._size * number)

    def _place(self, site: SiteT) -> tuple[_Area[SiteT], int] | None:
        """Return where the stub of a site is, or can be."""
        free = None
        for area in self._areas:
            if abs(area.start - site.at) >= REACH:
                continue
            for number, stub in enumerate(area.made):
                if stub.site == site:
                    return area, number
            if free is None and len(area.made) < area.most:
                free = area, len(area.made)
        return free


@dataclass(slots=True)
class _Area(Generic[SiteT]):
    start: int
    most: int
    made: list[Stub[SiteT]]


def replace_in_enclave(
    thread: ProgramThread,
    at: int,
    stubs: Stubs[SiteT],
    find: Callable[[int], SiteT | None],
    stop_others: Callable[[ProgramThread], None],
) -> None:
    """Spare the next thread the stop at an instruction of an enclave, if that is possible.

    Args:
        thread: it has stopped there.
        at: address of the instruction.
        stubs: those of its kind.
        find: returns its site, ``None`` where no stub can stand for its code.
        stop_others: stops all other threads of an address space that are inside an enclave.
    """
    image = thread.image
    memory = image.page_table.memory_at(at)
    if memory is None or at in stubs.plain or stubs.leads_from(at, memory.jumps):
        return
    site = find(at)
    if site is None or not stubs.can_have(site, thread):
        stubs.plain.add(at)
        return
    if memory.users != [image.page_table]:
        return  # a process with another vDSO may map it; a fork child would have the same one
    stop_others(thread)
    memory.jump_at(site.start, stubs.jump_from(site, image.memory_fd))
