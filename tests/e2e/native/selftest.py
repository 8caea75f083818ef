"""Fetches and builds the Linux kernel's SGX selftest; this project does not contain its sources.

The sources come from Debian's package ``linux-source-6.1``; the programs built from them are kept
in the user's cache directory.

Source:
    tools/testing/selftests/sgx, Linux v6.1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PACKAGE = "linux-source-6.1"
_TARBALL = Path("/usr/src") / f"{PACKAGE}.tar.xz"
_SELFTESTS = f"{PACKAGE}/tools/testing/selftests"
_WANTED = (
    f"{_SELFTESTS}/sgx/",
    f"{_SELFTESTS}/kselftest",
    f"{PACKAGE}/tools/include/",
    f"{PACKAGE}/arch/x86/include/",
)


class CannotHave(Exception):
    """Why there is no selftest here."""


def built_selftest() -> Path:
    """Return the directory with ``test_sgx`` and ``test_encl.elf``; build it when it is not there.

    Raises:
        CannotHave: the package, a compiler or OpenSSL's headers cannot be had.
    """
    kept = _cache() / f"{PACKAGE}-test_sgx"
    if not (kept / "test_encl.elf").exists():
        compiler = shutil.which("gcc")
        if compiler is None:
            raise CannotHave("no gcc")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            sources = _unpack(_tarball(Path(work)), Path(work))
            ready = Path(work) / "ready"
            ready.mkdir()
            _build(compiler, sources, ready)
            shutil.rmtree(kept, ignore_errors=True)
            ready.rename(kept)
    return kept


def _cache() -> Path:
    default = Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "softsgx-tests"


def _tarball(work: Path) -> Path:
    """Return the package's archive: installed, or downloaded and taken out of the package."""
    if _TARBALL.exists():
        return _TARBALL
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise CannotHave(f"{_TARBALL} is not there, and no apt-get to fetch {PACKAGE} with")
    try:
        _run(["apt-get", "download", PACKAGE], work)
    except CannotHave:
        if os.geteuid() != 0:
            raise
        _run(["apt-get", "update"], work)
        _run(["apt-get", "download", PACKAGE], work)
    (package,) = work.glob("*.deb")
    _run(["dpkg-deb", "-x", str(package), "package"], work)
    return work / "package" / _TARBALL.relative_to("/")


def _unpack(tarball: Path, work: Path) -> Path:
    """Take out the selftest and the headers it includes; return where it is."""

    def wanted(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        return tarfile.data_filter(member, path) if member.name.startswith(_WANTED) else None

    with tarfile.open(tarball) as archive:
        archive.extractall(work, filter=wanted)
    return work / PurePosixPath(_SELFTESTS) / "sgx"


def _build(compiler: str, sources: Path, ready: Path) -> None:
    """Do what its Makefile does, but for flags that make warnings of newer compilers errors."""
    include = f"-I{sources.parents[3]}/tools/include"
    host = [compiler, "-g", "-w", "-fPIC", "-z", "noexecstack", include]
    enclave = [compiler, "-w", "-static", "-nostdlib", "-nostartfiles", "-fPIC"]
    enclave += ["-fno-stack-protector", "-mrdrnd", include, "-T", "test_encl.lds"]
    parts = ["main.c", "load.c", "sigstruct.c", "call.S", "sign_key.S"]
    _run([*host, "-o", str(ready / "test_sgx"), *parts, "-lcrypto"], sources)
    parts = ["test_encl.c", "test_encl_bootstrap.S", "-Wl,--build-id=none"]
    _run([*enclave, *parts, "-o", str(ready / "test_encl.elf")], sources)


def _run(command: list[str], where: Path) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise CannotHave(f"{' '.join(command[:2])}: {last}")
