"""Finding a C compiler and calling it, for enclaves and for host programs.

The compiler's own messages go to standard error.  A failure is an error of one line.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from softsgx.errors import SoftSgxError

__all__ = ["INCLUDE", "RUNTIME", "Compiler", "find_compiler"]

RUNTIME: Final = Path(__file__).parent / "runtime"
INCLUDE: Final = RUNTIME / "include"
"""Where ``softsgx.h``, ``softsgx_keys.h`` and ``softsgx_host.h`` are."""

_OWN_SOURCES = ("entry.S", "runtime.c", "memory.c", "keys.c")
_ENCLAVE_FLAGS = (
    "-std=gnu11",
    "-O2",
    "-ffreestanding",
    "-fPIE",
    "-fvisibility=hidden",
    # The runtime has no canary in FS, no unwinder and no CET.
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-unwind-tables",
    "-fcf-protection=none",
    "-fno-common",
    "-g0",
    "-Wall",
)
_LINK_FLAGS = (
    "--no-dynamic-linker",
    "--build-id=none",
    "-z",
    "text",
    "-z",
    "noexecstack",
    "-z",
    "norelro",
    "-z",
    "max-page-size=4096",
    "--hash-style=sysv",
)


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C compiler.

    Attributes:
        command: the command, without the arguments that softsgx adds.
        linker: the command of a linker, if the compiler does not pass all arguments to one; empty:
            the compiler links.
        baseline: arguments that limit the code to SSE2: XFRM is 3, so AVX would raise #UD.
    """

    command: tuple[str, ...]
    linker: tuple[str, ...] = ()
    baseline: tuple[str, ...] = ("-march=x86-64",)

    def enclave(
        self,
        sources: Sequence[Path],
        output: Path,
        flags: Sequence[str] = (),
        *,
        debug_info: bool = False,
    ) -> None:
        """Compile and link an enclave with our runtime to a position-independent ELF file.

        Args:
            sources: C files.
            output: the ELF file.
            flags: further arguments for ``sources``; they follow our own.
            debug_info: whether the file has debug information; the code is the same.

        Raises:
            SoftSgxError: the compiler or the linker failed.
        """
        with tempfile.TemporaryDirectory(prefix="softsgx-") as scratch:
            objects = []
            own = tuple(RUNTIME / name for name in _OWN_SOURCES)
            for number, source in enumerate((*own, *sources)):
                objects.append(str(Path(scratch) / f"{number}.o"))
                # __FILE__ must not name the directory of the source: two checkouts would differ.
                # A debugger needs the directory.
                mapped = "macro" if debug_info else "file"
                where = f"-f{mapped}-prefix-map={source.parent}=."
                ours = [*_ENCLAVE_FLAGS, *self.baseline, where, f"-I{INCLUDE}"]
                theirs = flags if number >= len(own) else ()
                what = ["-g"] * debug_info + ["-c", str(source), "-o", objects[-1]]
                self._call([*self.command, *ours, *theirs, *what], str(source))
            self._link(objects, output, ", ".join(map(str, sources)))

    def host(self, sources: Sequence[Path], output: Path) -> None:
        """Compile and link a host program.

        Raises:
            SoftSgxError: the compiler failed.
        """
        names = list(map(str, sources))
        flags = ["-std=gnu11", "-O2", "-Wall", f"-I{INCLUDE}", *names, "-o", str(output)]
        self._call([*self.command, *flags, "-pthread"], ", ".join(names))

    def _link(self, objects: list[str], output: Path, what: str) -> None:
        script = str(RUNTIME / "enclave.lds")
        if self.linker:
            command = [*self.linker, "-static", "-pie", *_LINK_FLAGS, "-T", script]
        else:
            passed = [f"-Wl,{flag}" for flag in _LINK_FLAGS]
            command = [*self.command, "-nostdlib", "-static-pie", *passed, "-T", script]
            objects = [*objects, "-lgcc"]
        self._call([*command, "-o", str(output), *objects], what)

    def _call(self, command: Sequence[str], what: str) -> None:
        try:
            status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
        except OSError as error:
            raise SoftSgxError(
                f"{command[0]}: {error.strerror or error}; name a C compiler with --cc"
            ) from error
        if status:
            raise SoftSgxError(
                f"{what}: {self} ended with status {status}; its messages say what to change"
            )

    def __str__(self) -> str:
        return shlex.join(self.command)


def find_compiler(named: str | None = None) -> Compiler:
    """Return the compiler: the named one, else ``cc``, else ziglang's.

    Args:
        named: a command, such as ``"ccache gcc"``.

    Raises:
        SoftSgxError: there is none; the message names ways to install one.
    """
    if named is not None:
        words = tuple(shlex.split(named))
        if not words or shutil.which(words[0]) is None:
            raise SoftSgxError(f"--cc {named!r}: no such program; give one that PATH or a path has")
        return Compiler(words)
    if shutil.which("cc") is not None:
        return Compiler(("cc",))
    if find_spec("ziglang") is not None:
        zig = (sys.executable, "-m", "ziglang")
        # Zig builds the C library of a host program at its first use: musl takes a minute, the
        # stubs of glibc take some seconds.
        libc = "gnu" if platform.libc_ver()[0] == "glibc" else "musl"
        target = ("-target", f"x86_64-linux-{libc}", "-fno-sanitize=all")
        return Compiler((*zig, "cc", *target), (*zig, "ld.lld"), ("-mcpu=x86_64",))
    raise SoftSgxError(
        "cc: no C compiler; install one (Debian: apt-get install gcc libc6-dev), or ziglang by "
        f"{os.path.basename(sys.executable)} -m pip install 'softsgx[cc]'"
    )
