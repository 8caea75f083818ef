"""Helpers: programs of this folder compiled, recorded, and what was recorded."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from softsgx.engines.ordinary import AsEnclaveResult, record_as_enclave

PROGRAMS = Path(__file__).parent / "programs"
COMPILER = shutil.which("cc") or shutil.which("gcc")
MS = 1_000_000


@dataclass
class Recorded:
    """A trace in memory: enclaves by number as (name, pages, pid), and accesses."""

    enclaves: list[list[object]] = field(default_factory=list)
    accesses: list[tuple[int, int, bool, int]] = field(default_factory=list)

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        self.enclaves.append([name, pages, pid])
        return len(self.enclaves) - 1

    def grow_enclave(self, number: int, pages: int) -> None:
        self.enclaves[number][1] = pages

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        self.accesses.append((enclave, page, write, time_ns))


def compile_program(directory: Path, name: str, *options: str) -> str:
    """Compile a program, and return its path."""
    assert COMPILER is not None, "no C compiler"
    out = directory / "-".join((name, *options)).replace("/", "")
    command = [COMPILER, "-O1", *options, "-o", str(out), str(PROGRAMS / f"{name}.c"), "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return str(out)


def record(
    argv: list[str], *, interval_ms: float = 10, given: bytes = b""
) -> tuple[AsEnclaveResult, bytes, Recorded]:
    """Record a program; return how it ended, its output and what was recorded."""
    recorded = Recorded()
    read, write = os.memfd_create("in"), os.memfd_create("out")
    os.write(read, given)
    os.lseek(read, 0, os.SEEK_SET)
    try:
        result = record_as_enclave(
            argv, recorded, interval_ns=int(interval_ms * MS), stdio=(read, write, 2)
        )
        return result, os.pread(write, 1 << 24, 0), recorded
    finally:
        os.close(read)
        os.close(write)
