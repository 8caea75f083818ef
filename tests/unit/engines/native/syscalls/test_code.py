"""CPUID is replaced in each new mapping, also when a file of that name was mapped before.

Method: this process is the program; it maps files of its own, and its memory is written through
``/proc/self/mem`` as a tracer does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.engines.native.syscalls import code as new_code
from softsgx.engines.native.syscalls.code import NewCode
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.x86.rewrite import CPUID, TRAP, Places, find_cpuid

PAGE = mmap.PAGESIZE
NOPS = b"\x90" * 32
LOAD_LEAF = bytes.fromhex("b807000000")  # mov eax, 7
INSTRUCTION = NOPS + LOAD_LEAF + CPUID + NOPS


class Program:
    """This process, and a file that it maps code from."""

    def __init__(self, path: Path) -> None:
        self.path, self.memory = path, os.open("/proc/self/mem", os.O_RDWR)
        self.image = SimpleNamespace(memory_fd=self.memory, cpuid_sites=Places(), read=self.read)
        self.image.members = 1
        self.thread = cast(ProgramThread, SimpleNamespace(tid=os.getpid(), image=self.image))

    def read(self, address: int, size: int) -> bytes:
        return os.pread(self.memory, size, address)

    def write(self, *places: int, pages: int = 1) -> None:
        content = bytearray(b"\x90" * PAGE * pages)
        for place in places:
            content[place : place + len(INSTRUCTION)] = INSTRUCTION
        self.path.write_bytes(content)

    def map(self, code: NewCode, page: int = 0, pages: int = 1) -> bytes:
        """Map pages, and return them as they are after CPUID was replaced in them."""
        with self.path.open("rb") as file:
            size, offset = pages * PAGE, page * PAGE
            rights = mmap.PROT_READ | mmap.PROT_WRITE
            mapping = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, rights, offset=offset)
            place = (ctypes.c_char * size).from_buffer(mapping)
            address = ctypes.addressof(place)
            code.mapped(self.thread, address, size, file.fileno(), offset)
            return bytes(mapping)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path / "code")
    yield program
    os.close(program.memory)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the times of a file count at once; return the sizes of what was searched."""
    found: list[int] = []

    def search(read: Callable[[int, int], bytes], length: int) -> Any:
        found.append(length)
        return find_cpuid(read, length)

    monkeypatch.setattr(new_code, "find_cpuid", search)
    monkeypatch.setattr(new_code, "_SETTLED_NS", 0)
    return found


def at(place: int) -> slice:
    start = place + len(NOPS) + len(LOAD_LEAF)
    return slice(start, start + len(CPUID))


def test_a_piece_of_a_file_is_searched_once(program: Program, searched: list[int]) -> None:
    program.write(256)
    code = NewCode()
    for _ in range(3):
        assert program.map(code)[at(256)] == TRAP
    assert searched == [PAGE]


def test_another_piece_of_it_is_another_place(program: Program, searched: list[int]) -> None:
    program.write(256, PAGE + 512, pages=2)
    code = NewCode()
    for page, place in ((0, 256), (1, 512), (0, 256)):
        mapped = program.map(code, page)
        assert mapped[at(place)] == TRAP and mapped.count(TRAP) == 1
    assert len(searched) == 2


def test_a_file_that_has_changed_is_searched_again(program: Program, searched: list[int]) -> None:
    program.write(256)
    code = NewCode()
    program.map(code)
    modified = program.path.stat().st_mtime_ns
    program.write(512)
    os.utime(program.path, ns=(modified, modified))  # its time of change is the kernel's
    mapped = program.map(code)
    assert mapped[at(512)] == TRAP and mapped.count(TRAP) == 1
    assert len(searched) == 2


def test_only_bytes_that_are_a_cpuid_are_replaced(program: Program, searched: list[int]) -> None:
    """A file may change without a trace: by a mapping, or on a file system without times."""
    program.write(256)
    code = NewCode()
    program.map(code)
    for known in code._pieces.values():
        known.parts, known.code = [[100, *known.parts[0]]], []
    assert program.map(code).count(TRAP) == 1


@pytest.mark.parametrize("members", [1, 2])
def test_what_is_between_replaced_instructions_stays(
    program: Program, searched: list[int], monkeypatch: pytest.MonkeyPatch, members: int
) -> None:
    """Also where the code is not that of the last mapping, as if a file changed without a trace."""
    piece = new_code._Piece(1, 2, PAGE, 3, 4, 0, PAGE)
    monkeypatch.setattr(new_code, "_piece", lambda *_: piece)
    program.image.members = members
    code, places = NewCode(), (256, 512, 3000)
    for between in (b"first", b"other", b"first"):
        program.write(*places)
        with program.path.open("r+b") as file:
            file.seek(400)
            file.write(between)
        before = program.path.read_bytes()
        expected = bytearray(before)
        for place in places:
            expected[at(place)] = TRAP
        assert program.map(code) == expected
        assert program.path.read_bytes() == before
    assert searched == [PAGE]
    assert len(set(program.image.cpuid_sites)) >= len(places)


def test_pages_between_known_places_are_not_read(
    program: Program, searched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = (256, 512, 5 * PAGE + 256)
    program.write(*places, pages=8)
    expected = bytearray(program.path.read_bytes())
    for place in places:
        expected[at(place)] = TRAP
    code = NewCode()
    assert program.map(code, pages=8) == expected
    read: list[int] = []

    def watch(address: int, size: int) -> bytes:
        read.append(size)
        return program.read(address, size)

    program.image.read = watch
    assert program.map(code, pages=8) == expected
    assert read == [256 + len(CPUID), len(CPUID)] and searched == [8 * PAGE]
    found = sorted(program.image.cpuid_sites)[-len(places) :]
    assert [site - found[0] for site in found] == [place - places[0] for place in places]


def test_beside_other_threads_nothing_but_the_instructions_is_written(
    program: Program, searched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(descriptor: int, data: bytes, address: int) -> int:
        written.append(len(data))
        return pwrite(descriptor, data, address)

    pwrite = os.pwrite
    monkeypatch.setattr(new_code, "os", SimpleNamespace(pwrite=write, stat=os.stat))
    program.write(256, 512)
    for members, sizes in ((2, [2, 2]), (1, [258])):
        program.image.members = members
        written.clear()
        assert program.map(NewCode()).count(TRAP) == 2
        assert written == sizes


def test_only_a_known_piece_without_cpuid_needs_no_look(
    program: Program, searched: list[int]
) -> None:
    def known(page: int) -> bool:
        with program.path.open("rb") as file:
            return code.knows_none(program.thread, PAGE, file.fileno(), page * PAGE)

    code = NewCode()
    program.write(256, pages=2)
    assert not known(0) and not known(1)
    program.map(code, 0)
    program.map(code, 1)
    assert not known(0) and known(1)
    program.write(PAGE + 256, pages=2)
    assert not known(1), "it has changed"


def test_a_file_that_may_still_change_is_not_remembered(
    program: Program, searched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_code, "_SETTLED_NS", 10**15)
    program.write(256)
    code = NewCode()
    assert [program.map(code)[at(256)] for _ in range(2)] == [TRAP, TRAP]
    assert len(searched) == 2
