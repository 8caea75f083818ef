"""Where the next ENCLU of a thread inside is known to trap, so that it can be executed at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest

from softsgx.arch import EpcAddr, PageType
from softsgx.engines.native.memory.memory_file import EnclaveMemory, runs
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.memory.store import NativeStore
from softsgx.hw import EpcPage

BASE, READ_EXECUTE = 0x7000_0000_0000, 5
AT, NEXT = BASE + 16, BASE + 32
CODE = bytes(16) + b"\x0f\x01\xd7".ljust(16) + b"\x0f\xa2".ljust(4064)


class Scene:
    """A page of code with a marked ENCLU at ``AT`` and a forbidden CPUID at ``NEXT``."""

    def __init__(self) -> None:
        theirs = os.memfd_create("sgx_enclave", os.MFD_ALLOW_SEALING)
        self.memory = EnclaveMemory(theirs)
        self.memory.forbidden = lambda data: [33] if data[32:34] == b"\x0f\xa2" else []
        self.mapped = [(BASE, BASE + 4096, self.memory)]
        self.store, self.page = NativeStore(), EpcPage(EpcAddr(0x5000_0000))
        self.page.fill(PageType.REG, rwx=READ_EXECUTE, linaddr=BASE)
        self.store.fill(self.page, CODE)
        self.table = EnclavePageTable(
            0,
            self.store,
            {self.page.addr: self.page},
            cast(Any, None),
            memory_at=lambda _linaddr: self.memory,
            mapped_in=lambda start, end: [
                found for found in self.mapped if found[0] < end and start < found[1]
            ],
            is_readable=lambda _linaddr: True,
            kick_all=lambda: None,
            installed=lambda _page: None,
        )
        self.table.install(BASE, self.page.addr, READ_EXECUTE)
        self.table.mark(AT)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.memory.close()


def test_a_marked_enclu_that_can_be_executed_traps(scene: Scene) -> None:
    assert scene.table.traps_at(AT)
    assert not scene.table.traps_at(AT + 1)
    assert (NEXT + 1) % 4096 in scene.memory.marked[NEXT & -4096]
    assert not scene.table.traps_at(NEXT + 1), "no ENCLU"


def test_nothing_is_known_of_code_whose_page_has_left(scene: Scene) -> None:
    scene.table.zap(BASE)
    assert not scene.table.traps_at(AT)


def test_nothing_is_known_of_code_that_paging_forbids_to_execute(scene: Scene) -> None:
    scene.table.protect(BASE, BASE + 4096, 1)
    assert not scene.table.traps_at(AT)


def test_nothing_is_known_of_code_that_its_epcm_entry_forbids_to_execute(scene: Scene) -> None:
    scene.page.rwx = 1
    scene.table.refresh(BASE)
    assert not scene.table.traps_at(AT)


def test_the_parts_of_a_range_are_those_without_another_memory_file(scene: Scene) -> None:
    other = cast(EnclaveMemory, object())

    def parts(*mapped: tuple[int, int, EnclaveMemory]) -> list[tuple[int, int]]:
        scene.mapped = [(BASE + low, BASE + high, memory) for low, high, memory in mapped]
        found = scene.table.parts(scene.memory, BASE + 0x2000, BASE + 0x6000)
        return [(start - BASE, end - BASE) for start, end in found]

    own = scene.memory
    assert parts() == [(0x2000, 0x6000)], "the kernel may still have a mapping"
    assert parts((0, 0x8000, own)) == [(0x2000, 0x6000)]
    assert parts((0, 0x4000, own), (0x5000, 0x8000, own)) == [(0x2000, 0x6000)]
    assert parts((0, 0x3000, other), (0x3000, 0x5000, own)) == [(0x3000, 0x6000)]
    assert parts((0x3000, 0x4000, other)) == [(0x2000, 0x3000), (0x4000, 0x6000)]
    assert parts((0x5000, 0x9000, other)) == [(0x2000, 0x5000)]
    assert parts((0, 0x8000, other)) == []


def test_adjacent_pages_are_one_run() -> None:
    assert runs([]) == []
    assert runs([0, 0x1000, 0x3000, 0x5000, 0x6000]) == [
        (0, 0x2000),
        (0x3000, 0x4000),
        (0x5000, 0x7000),
    ]
