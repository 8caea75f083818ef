"""Finds the ELF file with the code of an enclave.

The kernel does not know this file: a program may add pages from any memory.  But a program usually
reads its enclave from a file.  So the candidates are the files that it has mapped or opened, and
files in the same directory with the same name and another suffix (an SGXS stream has no symbols).
A candidate is accepted when samples of its code equal the enclave's memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from softsgx.engines.native.gdb.libraries import Library, Read
from softsgx.engines.native.mappings import mappings
from softsgx.errors import SoftSgxError
from softsgx.image import read_bytes
from softsgx.image.elf import ELF_MAGIC, PF_X, Elf, ProgramHeader

__all__ = ["EnclaveFiles"]

_SUFFIXES = (".elf", ".so", ".debug")
_OPENED = 256
_SAMPLE_BYTES, _SAMPLES = 64, 8
_PT_DYNAMIC = 2


class EnclaveFiles:
    """Finds files of enclaves.

    Args:
        named: files that the user has named.
    """

    def __init__(self, named: Sequence[str] = ()) -> None:
        self._named = [os.path.abspath(name) for name in named]
        self._opened: deque[str] = deque(maxlen=_OPENED)
        self._found: dict[int, Library | None] = {}

    def opened(self, tid: int, path: bytes) -> None:
        """Record a path that a thread opens."""
        name = os.fsdecode(path)
        if not name.startswith("/"):
            try:
                name = os.path.join(os.readlink(f"/proc/{tid}/cwd"), name)
            except OSError:
                return
        if name in self._opened:
            self._opened.remove(name)
        self._opened.append(name)

    def enclave_library(self, tid: int, number: int, base: int, read: Read) -> Library | None:
        """Return the file of an enclave as a library; ``None``: it is not found.

        Args:
            tid: a thread of the program.
            number: of the enclave.
            base: its address.
            read: reads its memory.
        """
        if number not in self._found:
            self._found[number] = self._find(tid, base, read)
        return self._found[number]

    def _find(self, tid: int, base: int, read: Read) -> Library | None:
        for name in _with_companions([*self._named, *_mapped(tid), *reversed(self._opened)]):
            try:
                if not _is_elf(name):
                    continue
                elf = Elf(read_bytes(name))
                if any(load.p_flags & PF_X for load in elf.loads) and _fits(elf, base, read):
                    dynamic = _dynamic(elf)
                    return Library(name, base, base, base + dynamic if dynamic else 0)
            except (OSError, SoftSgxError):
                continue
        return None


def _with_companions(names: Iterable[str]) -> Iterator[str]:
    tried = set()
    for name in names:
        for each in (name, *(str(Path(name).with_suffix(suffix)) for suffix in _SUFFIXES)):
            if each not in tried:
                tried.add(each)
                yield each


def _mapped(tid: int) -> list[str]:
    """Return the files that a thread has mapped or open."""
    found = [each.path for each in mappings(tid) if each.path.startswith("/")]
    directory = f"/proc/{tid}/fd"
    for descriptor in os.listdir(directory):
        try:
            target = os.readlink(f"{directory}/{descriptor}")
        except OSError:
            continue  # closed meanwhile
        if target.startswith("/"):
            found.append(target)
    return found


def _is_elf(name: str) -> bool:
    if not os.path.isfile(name):
        return False
    with open(name, "rb") as file:
        return file.read(len(ELF_MAGIC)) == ELF_MAGIC


def _fits(elf: Elf, base: int, read: Read) -> bool:
    """Return whether the code of an ELF file equals the memory at ``base``."""
    for load in elf.loads:
        if load.p_flags & PF_X and not _is_there(elf, load, base, read):
            return False
    return True


def _is_there(elf: Elf, load: ProgramHeader, base: int, read: Read) -> bool:
    step = max(load.p_filesz // _SAMPLES, 1)
    for at in range(0, load.p_filesz, step):
        size = min(_SAMPLE_BYTES, load.p_filesz - at)
        own = bytes(elf.file.take(load.p_offset + at, size, "code"))
        if read(base + load.p_vaddr + at, size) != own:
            return False
    return True


def _dynamic(elf: Elf) -> int:
    """Return the address of the dynamic section in the file, 0 for none."""
    return next((ph.p_vaddr for ph in elf.program_headers if ph.p_type == _PT_DYNAMIC), 0)
