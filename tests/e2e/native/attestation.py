"""Enclaves that return their reports and keys, and a running program that requests them.

The sources are ``programs/attest_*``; test, program and enclave exchange :class:`Asked`.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.cmac import CMAC
from tests.support.enclave_files import key as project_key

from softsgx.arch import AttributesFlags, KeyName, KeyRequest, Report, TargetInfo
from softsgx.image import SignOptions, sign_plan, throwaway_key, write_sgxs
from softsgx.image.csource import BuildOptions, Compiler, build_enclave

PROGRAMS = Path(__file__).parent / "programs"
REPORT, KEY, SEAL, TARGET, AREAS, RAW = range(6)  # attest.h
EPC, EPC_BYTES = "128KiB", 128 << 10
SENTINEL = b"\xa5" * 16
_ASKED = struct.Struct("<5Q512s64s512s")
_MODE64BIT = int(AttributesFlags.MODE64BIT)
_OWN_VERSION = 3

#: Who signs, which program, and what else the SIGSTRUCT says.
ENCLAVES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "alice": ("project", 1, {}),
    "bob": ("project", 2, {}),
    "stranger": ("other", 1, {}),
    "newer": ("project", 1, {"isv_svn": _OWN_VERSION + 1}),
    "product": ("project", 1, {"isv_prod_id": 8}),
    "debug": ("project", 1, {"attributes": _MODE64BIT | AttributesFlags.DEBUG}),
    "kss": ("project", 1, {"kss": True, "isv_family_id": bytes(range(16))}),
    "kss product": ("project", 1, {"kss": True, "isv_prod_id": 8, "isv_ext_prod_id": b"x" * 16}),
}


@dataclass(frozen=True)
class Ended:
    """By an exception inside the enclave, as the vDSO tells it."""

    vector: int
    code: int
    address: int


@dataclass
class Asked:
    """``struct attest``."""

    leaf: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    policy: int = 0
    request: bytes = b""
    data: bytes = b""
    out: bytes = b""

    def pack(self) -> bytes:
        numbers = (self.leaf, self.rbx, self.rcx, self.rdx, self.policy)
        return _ASKED.pack(*numbers, self.request, self.data, self.out)


@dataclass
class Enclave:
    """One that is loaded in a session."""

    session: Session
    number: int
    base: int
    size: int
    tcs: int

    def call(self, function: int, asked: Asked) -> tuple[int, bytes] | Ended:
        """Return the enclave's result and ``out``; or what ended the call."""
        words = self.session.tell(f"call {self.number} {function} {asked.pack().hex()}")
        if words[0] == "exception":
            return Ended(*map(int, words[1:]))
        assert words[0] == "ok", words
        return int(words[1]), _ASKED.unpack(bytes.fromhex(words[2]))[-1]

    def _answer(self, function: int, asked: Asked) -> bytes:
        done = self.call(function, asked)
        assert not isinstance(done, Ended), done
        assert done[0] == 0, f"status {done[0]}"
        return done[1]

    def report(self, target: TargetInfo, data: bytes = b"") -> Report:
        answer = self._answer(REPORT, Asked(request=target.pack(), data=data))
        return Report.unpack(answer[: Report.SIZE])

    def target(self) -> TargetInfo:
        return TargetInfo.unpack(self._answer(TARGET, Asked()))

    def key(self, request: KeyRequest) -> tuple[int, bytes]:
        """Return EGETKEY's status, and what is where the key goes."""
        done = self.call(KEY, Asked(request=request.pack(), out=SENTINEL))
        assert not isinstance(done, Ended), done
        return done[0], done[1][:16]

    def report_key(self, key_id: bytes) -> bytes:
        status, key = self.key(KeyRequest(key_name=KeyName.REPORT, key_id=key_id))
        assert status == 0
        return key

    def verifies(self, report: Report) -> bool:
        return mac_of(report, self.report_key(report.key_id)) == report.mac

    def seal(self, policy: int, key_id: bytes = bytes(32)) -> bytes:
        """Return the sealing key that the C program asks for by the fields' names."""
        return self._answer(SEAL, Asked(policy=policy, request=key_id))[:16]

    def areas(self) -> tuple[int, int, int]:
        """Return where request, report data and output of RAW are."""
        request, data, out = struct.unpack_from("<3Q", self._answer(AREAS, Asked()))
        return request, data, out

    def unload(self) -> None:
        assert self.session.tell(f"unload {self.number}") == ["ok"]


class Session:
    """A run of ``softsgx run``, and the program in it."""

    def __init__(self, directory: Path, stdin: IO[str], stdout: IO[str], said: Path) -> None:
        self._directory, self._stdin, self._stdout, self._said = directory, stdin, stdout, said

    def tell(self, line: str) -> list[str]:
        self._stdin.write(line + "\n")
        self._stdin.flush()
        answer = self._stdout.readline().split()
        assert answer, f"the program has ended: {self._said.read_text()}"
        return answer

    def load(self, name: str) -> Enclave:
        words = self.tell(f"load {self._directory / file_name(name)}")
        assert words[0] == "ok", words
        return Enclave(self, *map(int, words[1:]))


def file_name(name: str) -> str:
    return name.replace(" ", "-") + ".sgxs"


def mac_of(report: Report, key: bytes) -> bytes:
    """Return the MAC that EREPORT makes with ``key``."""
    mac = CMAC(algorithms.AES(key))
    mac.update(report.pack()[:384])
    return mac.finalize()


def build(directory: Path, compiler: Compiler) -> Path:
    """Build the program and all ``ENCLAVES`` in ``directory``; return the program."""
    options = BuildOptions(heap_bytes=72 * 4096, stack_bytes=16 << 10)
    keys = {"project": project_key(), "other": throwaway_key()}
    source = PROGRAMS / "attest_enclave.c"
    plans = {
        number: build_enclave([source], compiler, options, [f"-DIDENTITY={number}"])
        for number in (1, 2)
    }
    common = {"isv_prod_id": 7, "isv_svn": _OWN_VERSION, "xfrm_mask": (1 << 64) - 1}
    for name, (signer, number, changes) in ENCLAVES.items():
        signing = SignOptions(**{**common, **changes})
        sigstruct = sign_plan(plans[number], keys[signer], signing)
        path = directory / file_name(name)
        path.write_bytes(b"".join(write_sgxs(plans[number])))
        path.with_suffix(".sig").write_bytes(sigstruct.pack())
    host = directory / "host"
    compiler.host([PROGRAMS / "attest_host.c"], host)
    return host


@contextmanager
def session(host: Path, *options: str, epc: str = EPC) -> Iterator[Session]:
    """Run the program under ``softsgx run``; it ends, with status 0, with the block."""
    said = host.with_name("said")
    command = [sys.executable, "-m", "softsgx", "run", "--epc", epc, "--quiet", *options]
    pipe = subprocess.PIPE
    with (
        said.open("w") as stderr,
        subprocess.Popen(
            [*command, "--", str(host)], stdin=pipe, stdout=pipe, stderr=stderr, text=True
        ) as program,
    ):
        assert program.stdin is not None
        assert program.stdout is not None
        yield Session(host.parent, program.stdin, program.stdout, said)
        program.stdin.close()
        assert program.wait() == 0, said.read_text()


def reloads(document: Path) -> list[int]:
    """Return how many pages of each enclave came back into the EPC, from ``--json``."""
    return [enclave["reloads"] for enclave in json.loads(document.read_text())["enclaves"]]
