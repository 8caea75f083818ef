"""Helpers: compile the programs of this folder, record them, and return the accesses."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from softsgx.engines.ordinary import AsEnclaveResult, record_as_enclave
from softsgx.errors import SoftSgxError

PROGRAMS = Path(__file__).parent / "programs"
COMPILER = shutil.which("cc") or shutil.which("gcc")
MS = 1_000_000


@dataclass
class Recorded:
    """A trace in memory: enclaves by number as (name, pages, pid), and accesses.

    Attributes:
        events: (enclave, page, what happened): "R", "W", "removed", or "ended" with page 0.
    """

    enclaves: list[list[object]] = field(default_factory=list)
    accesses: list[tuple[int, int, bool, int]] = field(default_factory=list)
    events: list[tuple[int, int, str]] = field(default_factory=list)

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        self.enclaves.append([name, pages, pid])
        return len(self.enclaves) - 1

    def grow_enclave(self, number: int, pages: int) -> None:
        self.enclaves[number][1] = pages

    def flush(self) -> None:
        pass

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        self.accesses.append((enclave, page, write, time_ns))
        self.events.append((enclave, page, "W" if write else "R"))

    def remove_page(self, enclave: int, page: int, time_ns: int) -> None:
        self.events.append((enclave, page, "removed"))

    def end_enclave(self, enclave: int, time_ns: int) -> None:
        self.events.append((enclave, 0, "ended"))


def compile_program(directory: Path, name: str, *options: str) -> str:
    """Compile a program, and return its path."""
    assert COMPILER is not None, "no C compiler"
    out = directory / "-".join((name, *options)).replace("/", "")
    command = [COMPILER, "-O1", *options, "-o", str(out), str(PROGRAMS / f"{name}.c"), "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return str(out)


def record(
    argv: list[str],
    *,
    interval_ms: float = 10,
    epc: int = 0,
    given: bytes = b"",
    by: tuple[str, ...] = (__file__,),
) -> tuple[AsEnclaveResult, bytes, Recorded]:
    """Record a program in a process of its own; return how it ended, its output, what was recorded.

    A thread of pytest would take the signals that wake the recorder.  ``by`` are the words of a
    script that calls :func:`main`.
    """
    with tempfile.TemporaryFile() as answer:
        numbers = str(answer.fileno()), str(interval_ms), str(epc)
        command = [sys.executable, *by, *numbers, *argv]
        done = subprocess.run(
            command,
            input=given,
            stdout=subprocess.PIPE,
            pass_fds=[answer.fileno()],
            check=True,
        )
        answer.seek(0)
        found = pickle.load(answer)
    if isinstance(found, Exception):
        raise found
    result, parts = found
    return result, done.stdout, Recorded(*parts)


def main(words: list[str]) -> None:
    answer, interval_ms, epc, *argv = words
    os.set_inheritable(int(answer), False)
    recorded = Recorded()
    found: object
    try:
        interval_ns = int(float(interval_ms) * MS)
        result = record_as_enclave(argv, recorded, interval_ns=interval_ns, epc=int(epc) or None)
        found = result, (recorded.enclaves, recorded.accesses, recorded.events)
    except SoftSgxError as error:
        found = error
    with open(int(answer), "wb") as file:
        pickle.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1:])
