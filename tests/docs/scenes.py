"""Files that pages of the documentation expect: a program, an enclave file, a key."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.support.enclave_files import KEY_FILE, key, oe_library, sdk_laid_out, sdk_library

from softsgx.image import SignOptions, embed_sigstruct, read_sdk, sign_plan

__all__ = ["SCENES"]

ROOT = Path(__file__).resolve().parents[2]
Scene = Callable[[Path], None]


@cache
def _sorter() -> dict[str, bytes]:
    """Build the example of that name; return its files."""
    source = ROOT / "examples" / "sorter"
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-m", "softsgx", "build", str(source / "enclave.c")]
        command += ["--host", str(source / "host.c"), "--heap", "2MiB", "-o", "enclave.sgxs"]
        subprocess.run(command, check=True, capture_output=True, cwd=made)
        return {path.name: path.read_bytes() for path in Path(made).iterdir()}


def enclave(directory: Path) -> None:
    """``enclave.sgxs`` and its signature."""
    for name, data in _sorter().items():
        (directory / name).write_bytes(data)
    (directory / "host").chmod(0o755)


def program(directory: Path) -> None:
    """``./app``: a program that uses an enclave, whatever its arguments."""
    enclave(directory)
    app = directory / "app"
    app.write_text("#!/bin/sh\nexec ./host enclave.sgxs 20000\n")
    app.chmod(0o755)


def program_and_platform(directory: Path) -> None:
    """Also the configuration of a platform."""
    program(directory)
    (directory / "platform.toml").write_text('epc = "16MiB"\nseed = 7\n')


def recorded_program(directory: Path) -> None:
    """A trace, and the example that measures prices."""
    with tempfile.TemporaryDirectory() as made:
        program(Path(made))
        trace = str(directory / "app.trace")
        command = [sys.executable, "-m", "softsgx", "record", "-o", trace, "--", "./app"]
        subprocess.run(command, check=True, capture_output=True, cwd=made)
    shutil.copytree(ROOT / "examples" / "calibrate", directory / "calibrate")
    shutil.copy(ROOT / "examples" / "common.h", directory / "common.h")


def signed_library(directory: Path) -> None:
    """``enclave.signed.so``: a library of the SDK with its SIGSTRUCT."""
    file = sdk_laid_out()
    sigstruct = sign_plan(read_sdk(file).plan, key(), SignOptions())
    (directory / "enclave.signed.so").write_bytes(embed_sigstruct(file, sigstruct))


def unsigned_files(directory: Path) -> None:
    """An enclave in each format that ``sign`` takes, a second key, and the SDKs' settings."""
    (directory / "enclave.sgxs").write_bytes(_sorter()["enclave.sgxs"])
    (directory / "enclave.so").write_bytes(sdk_library().data)
    (directory / "enclave").write_bytes(oe_library().data)
    shutil.copy(KEY_FILE, directory / "other.pem")
    (directory / "Enclave.config.xml").write_text(
        "<EnclaveConfiguration><TCSNum>2</TCSNum></EnclaveConfiguration>"
    )
    (directory / "enclave.conf").write_text("NumTCS=2\nNumHeapPages=8\nNumStackPages=4\n")


SCENES: dict[str, Scene] = {
    "docs/how-to/calibrate.md": recorded_program,
    "docs/how-to/ci.md": program,
    "docs/how-to/faults.md": program,
    "docs/how-to/guests.md": enclave,
    "docs/how-to/limits.md": program,
    "docs/how-to/load.md": signed_library,
    "docs/how-to/record.md": enclave,
    "docs/how-to/plan.md": program,
    "docs/how-to/run.md": program_and_platform,
    "docs/how-to/sign.md": unsigned_files,
    "docs/reference/image-formats.md": enclave,
}
