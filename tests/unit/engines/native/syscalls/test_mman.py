"""Which mappings of code are looked at, when the kernel has made them.

Method: a thread, its address space and what looks at code are stand-ins that record their uses.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.syscalls.code import NewCode
from softsgx.engines.native.syscalls.mman import Mappings
from softsgx.engines.native.syscalls.registry import Registry
from softsgx.engines.native.tracing.program import ProgramThread

AT, BYTES = 0x7000_0000_0000, 0x3000
FIXED = abi.MAP_PRIVATE | abi.MAP_FIXED


class World:
    """One thread that maps a piece of a file, and what is known of that."""

    def __init__(self) -> None:
        self.clean = True
        self.result = AT
        self.log: list[object] = []
        self.image = SimpleNamespace(
            members=1,
            has_had_enclaves=False,
            mm=SimpleNamespace(vmas=self._vmas),
            foreign_mappings=SimpleNamespace(within=lambda *_: False),
        )
        self.regs = SimpleNamespace(rdi=AT, rsi=BYTES, rdx=5, r10=FIXED, r8=3, r9=0x1000)
        self.thread = SimpleNamespace(
            tid=1, regs=self.regs, image=self.image, finish_syscall=self._call
        )
        code = SimpleNamespace(mapped=self._looked, knows_none=self._known_as_clean)
        self.mappings = Mappings(
            cast(Registry, SimpleNamespace(of_descriptor=lambda *_: None)),
            code=cast(NewCode, code),
        )

    def _vmas(self, *_: int) -> list[object]:
        assert self.image.has_had_enclaves, "the driver is asked about a process without enclaves"
        return []

    def _call(self, *_: int) -> int:
        self.log.append("call")
        return self.result

    def _known_as_clean(self, _thread: object, *asked: int) -> bool:
        assert asked == (BYTES, 3, 0x1000)
        return self.clean

    def _looked(self, _thread: object, *where: int) -> None:
        self.log.append(("looked", *where))

    def map(self) -> Any:
        return self.mappings.mmap(cast(ProgramThread, self.thread))


LOOKED = ["call", ("looked", AT, BYTES, 3, 0x1000)]


def test_code_that_is_known_to_have_no_cpuid_does_not_stop_again() -> None:
    world = World()
    assert world.map() is None
    assert world.log == []


@pytest.mark.parametrize("change", ["unknown", "another thread", "both"])
def test_other_code_is_looked_at_when_it_is_mapped(change: str) -> None:
    world = World()
    if change != "another thread":
        world.clean = False
    if change != "unknown":
        world.image.members = 2
    assert world.map() == AT
    assert world.log == LOOKED


def test_a_mapping_that_fails_is_not_looked_at() -> None:
    world = World()
    world.clean, world.result = False, -12
    assert world.map() == -12
    assert world.log == ["call"]


def test_a_process_that_has_had_enclaves_is_asked_what_a_mapping_replaces() -> None:
    world = World()
    world.image.has_had_enclaves = True
    world.image.mm.vmas = lambda *_: []
    assert world.map() is None, "nothing is replaced"
    world.image.mm.vmas = lambda *_: [object()]
    world.result = -12
    lost: list[object] = []
    world.mappings._lost = lambda *what: lost.append(what[1:])  # type: ignore[method-assign]
    assert world.map() == -12
    assert world.log == ["call"]
    assert lost == [(AT, BYTES)]
