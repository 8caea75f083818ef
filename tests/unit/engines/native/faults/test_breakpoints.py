"""Enclave code finds its own bytes where an exception was, and forbidden instructions stay so.

Method: a memory file with one page of code, and a thread that notes its debug registers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from softsgx.engines.native.faults.breakpoints import Breakpoints
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.hw import EXECUTE, READ

PAGE_AT = 1 << 32
CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
SITES = [16 * number for number in range(6)]
CODE = (CPUID.ljust(16, b"\x90") * len(SITES)).ljust(4096, b"\x90")


class OneThread:
    """A thread inside; its debug registers are noted."""

    def __init__(self, memory: EnclaveMemory, *, refuses: bool = False) -> None:
        self.breakpoints, self.set, self._refuses = 0, list[int](), refuses
        self.regs = SimpleNamespace(rip=0, rflags=0)
        space = SimpleNamespace(memory_at=lambda _at: memory, is_shown=lambda _at: True)
        self.image = SimpleNamespace(page_table=space)

    def set_breakpoints(self, addresses: list[int]) -> None:
        if self._refuses:
            raise OSError
        self.set = addresses


@pytest.fixture
def memory() -> Iterator[EnclaveMemory]:
    made = EnclaveMemory(os.memfd_create("breakpoints", os.MFD_ALLOW_SEALING))
    made.forbidden = lambda data: [site + 1 for site in SITES if data[site : site + 2] == CPUID]
    made.show(PAGE_AT, made.forbid(PAGE_AT, CODE), READ | EXECUTE)
    yield made
    made.close()


def raise_at(breakpoints: Breakpoints, thread: OneThread, site: int) -> None:
    thread.regs.rip = PAGE_AT + site
    breakpoints.exception(thread)  # type: ignore[arg-type]


def shown(memory: EnclaveMemory) -> list[bytes]:
    return [memory.code(PAGE_AT + site, 2) for site in SITES]


def test_an_instruction_without_its_own_bytes_is_never_without_a_breakpoint(
    memory: EnclaveMemory,
) -> None:
    thread, other = OneThread(memory), OneThread(memory)
    breakpoints = Breakpoints(lambda _thread, _memory: [other])  # type: ignore[list-item]
    assert shown(memory) == [UD2] * len(SITES)
    for site in (*SITES, SITES[0], SITES[0]):
        raise_at(breakpoints, thread, site)
        assert memory.code(PAGE_AT + site, 2) == CPUID
        assert thread.set == other.set
        for each, code in zip(SITES, shown(memory), strict=True):
            assert code == (CPUID if PAGE_AT + each in thread.set else UD2)
        assert memory.read(PAGE_AT, 4096) == CODE


def test_a_page_that_is_shown_again_keeps_what_traps_by_a_breakpoint(memory: EnclaveMemory) -> None:
    thread = OneThread(memory)
    raise_at(Breakpoints(lambda _thread, _memory: []), thread, SITES[2])
    (data,) = memory.hide([PAGE_AT])
    assert data == CODE
    again = memory.forbid(PAGE_AT, data)
    assert [again[site : site + 2] == CPUID for site in SITES] == [
        site == SITES[2] for site in SITES
    ]


def test_where_there_are_no_breakpoints_instructions_stay_forbidden(memory: EnclaveMemory) -> None:
    thread = OneThread(memory, refuses=True)
    breakpoints = Breakpoints(lambda _thread, _memory: [])
    for site in SITES:
        raise_at(breakpoints, thread, site)
    assert shown(memory) == [UD2] * len(SITES)


def test_an_enclu_that_faults_is_an_enclu_for_the_handler(memory: EnclaveMemory) -> None:
    enclu = bytes.fromhex("0f01d7")
    os.pwrite(memory.fd, enclu, PAGE_AT + 200)
    memory.mark(PAGE_AT + 200)
    assert memory.code(PAGE_AT + 200, 3) != enclu
    raise_at(Breakpoints(lambda _thread, _memory: []), OneThread(memory), 200)
    assert memory.code(PAGE_AT + 200, 3) == enclu
