"""Compile ``softsgx._speedups`` beside the package, with the system's C compiler.

    python tools/speedups.py           unless it is there and has been built from these sources
    python tools/speedups.py --check   only compile, with warnings as errors

Needs the interpreter's headers and ``cc`` (or ``$CC``), and no package.  The build hook of the
package does the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" / "speedups"
TARGET = ROOT / "src" / "softsgx" / "_speedups.abi3.so"

OLDEST = 0x030B0000
"""The stable ABI of this Python and later ones is all that the extension uses."""

FLAGS = ["-std=c11", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden"]
STRICT = ["-Wall", "-Wextra", "-Wmissing-prototypes", "-Werror"]
"""For development only: compilers of users have warnings that we do not know."""


class NotBuilt(Exception):
    """The extension cannot be built here; the text says why."""


def tag() -> str:
    """Return the tag of a wheel with the extension."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"cp3{OLDEST >> 16 & 0xFF}-abi3-{platform}"


def sources_hash() -> str:
    """Return the hash of the sources and options, which the extension has as ``SOURCES``."""
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    parts = [path.read_bytes() for path in files]
    parts += [word.encode() for word in (*FLAGS, *_more_flags())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_current() -> bool:
    """Return whether the extension is there and was built from these sources with these options."""
    return TARGET.exists() and sources_hash().encode() in TARGET.read_bytes()


def build(*, strict: bool = False) -> Path:
    """Build the extension unless it is current; return where it is.

    Raises:
        NotBuilt: it cannot be built here, or is not wanted.
    """
    _require()
    if not is_current():
        TARGET.unlink(missing_ok=True)
        _compile(TARGET, STRICT if strict else [])
    return TARGET


def check() -> None:
    """Compile with warnings as errors, and keep nothing.

    Raises:
        NotBuilt: it does not compile.
    """
    _require()
    with tempfile.TemporaryDirectory() as directory:
        _compile(Path(directory) / TARGET.name, STRICT)


def _require() -> None:
    if os.environ.get("SOFTSGX_PURE", "0") not in ("", "0"):
        raise NotBuilt("SOFTSGX_PURE is set")
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NotBuilt("this Python has no stable ABI")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise NotBuilt("no Python.h; install the headers of Python (python3-dev)")
    if shutil.which(_compiler()[0]) is None:
        raise NotBuilt("no C compiler; install gcc or clang")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def _more_flags() -> list[str]:
    return shlex.split(os.environ.get("CFLAGS", ""))


def _compile(target: Path, more: list[str]) -> None:
    """Compile to ``target``, which appears at once."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    command = [*_compiler(), *FLAGS, *more, *_more_flags()]
    command += [f"-DPy_LIMITED_API={OLDEST:#x}", f'-DSPEEDUPS_SOURCES="{sources_hash()}"']
    command += ["-isystem", sysconfig.get_path("include"), "-o", str(fresh)]
    command += map(str, sorted(SOURCES.glob("*.c")))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        if more:
            print(done.stderr, file=sys.stderr)
        first = next((line for line in errors if "error" in line), errors[0])
        raise NotBuilt(f"{command[0]}: {first}")
    fresh.replace(target)


def main() -> int:
    """Parse the command line and build; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    try:
        if parser.parse_args().check:
            check()
        else:
            build(strict=True)
    except NotBuilt as error:
        print(f"softsgx: compiled core: not built: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
