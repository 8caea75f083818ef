"""The compiled core is built where it can be, and the package works without it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from tools import speedups as builder

from softsgx import compiled
from softsgx.cgroup import EpcCgroup
from softsgx.driver.counts import EnclaveCounts
from softsgx.driver.enclave import Enclave, EnclaveMm
from softsgx.driver.file import EnclaveFile
from softsgx.driver.mm import EnclaveVma, Mm
from softsgx.driver.optimised import CompiledPage
from softsgx.driver.pages import EnclavePages
from softsgx.driver.sync import RwLock
from softsgx.engines.native.faults.plain import PlainFaults
from softsgx.engines.native.tracing.fault_events import FaultEvents
from softsgx.engines.native.tracing.fault_fields import (
    FaultingImage,
    FaultingThread,
    UnseenCrossings,
)
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.vdso.permit_table import PermitTable, Slot
from softsgx.hw import EnclaveMode, EpcPage
from softsgx.hw.processor import ProcessorMode
from softsgx.hw.secs import Crossings, ResidentSecs
from softsgx.paging import Claim, Counters, FlatBacking, Reservation, SgxEpcPage, SwapEntry
from softsgx.paging.entries import SwapEntries
from softsgx.paging.flat import FlatFile
from softsgx.paging.ksgxd import Ksgxd
from softsgx.paging.nodes import AtomicCount
from softsgx.paging.optimised import CompiledSwap
from softsgx.paging.sealed import SealedPages
from softsgx.paging.slowpath import AllocSlowPath
from softsgx.paging.sparse import SparseNumbers
from softsgx.paging.swapfile import Pinned
from softsgx.paging.swapspace import SwapCounts
from softsgx.paging.va import VaArray
from softsgx.paging.va_page import VaPage, VaSlot
from softsgx.runtime.inline import InlineRuntime, _InlineLock

ROOT = Path(__file__).parents[2]
RECORDS: tuple[type, ...] = (
    *(AtomicCount, Claim, CompiledSwap, Counters, Enclave, EnclaveCounts, EnclaveMm, EnclaveVma),
    *(EpcCgroup, EpcPage, FlatBacking, FlatFile, Ksgxd, Mm, Pinned, Reservation, ResidentSecs),
    *(RwLock, SealedPages, SgxEpcPage, SparseNumbers, SwapEntries, SwapEntry, VaArray, VaPage),
    *(EnclavePages, VaSlot, Crossings, EnclaveMode, FaultEvents, Slot, FaultingImage),
    *(
        FaultingThread,
        InlineRuntime,
        UnseenCrossings,
        PermitTable,
        PlainFaults,
        ProcessorMode,
        Waits,
    ),
    *(EnclaveFile, AllocSlowPath, SwapCounts),
)
SAY = "from softsgx import compiled; print(compiled.description, compiled.speedups is None)"


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.strip()


def needs_core() -> ModuleType:
    if compiled.speedups is None:
        pytest.skip(compiled.description)
    return compiled.speedups


def test_pure_python_is_used_on_demand() -> None:
    assert python(SAY, SOFTSGX_PURE="1") == "pure Python (SOFTSGX_PURE is set) True"


def test_the_core_is_used_where_it_was_built() -> None:
    needs_core()
    assert python(SAY, SOFTSGX_PURE="") == python(SAY, SOFTSGX_PURE="0") == "compiled core False"


def test_a_core_of_another_version_is_not_used() -> None:
    needs_core()
    code = f"import softsgx._speedups as core; core.INTERFACE += 1; {SAY}"
    expected = "pure Python (the compiled core is that of another version) True"
    assert python(code, SOFTSGX_PURE="0") == expected


def test_a_core_that_cannot_be_loaded_is_told() -> None:
    code = (
        "import sys; sys.modules['softsgx._speedups'] = None; "
        "from softsgx.engines.native import doctor; "
        "print(*(finding.text for finding in doctor() if finding.name == 'compiled core'))"
    )
    said = python(code, SOFTSGX_PURE="0")
    assert said.startswith("pure Python (the compiled core was not built): ") and "gcc" in said


def test_every_class_has_the_layout_that_c_code_expects() -> None:
    core = needs_core()
    for name, record in {
        **{one.__name__: one for one in RECORDS},
        "InlineLock": _InlineLock,
        "EnclavePage": CompiledPage,
    }.items():
        assert core.bind(name, record), name
    assert not core.bind("VaSlot", Claim)
    with pytest.raises(ValueError, match="no record Other"):
        core.bind("Other", Claim)
    with pytest.raises(ValueError, match="nothing here uses Other"):
        core.give("Other", Claim)


# --- the build ------------------------------------------------------------------------------------


def build(
    kind: str, directory: Path, checkout: Path = ROOT, **environment: str
) -> tuple[Path, str]:
    """Build a distribution; return it and what was printed."""
    code = (
        "import sys; from hatchling import build; "
        f"print(build.build_{kind}(sys.argv[1]), file=sys.stdout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return directory / done.stdout.split()[-1], done.stdout + done.stderr


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_has_the_core_and_the_tag_of_the_stable_abi(tmp_path: Path) -> None:
    needs_core()
    wheel, _said = build("wheel", tmp_path, SOFTSGX_PURE="0")
    assert wheel.name.split("-", 2)[2].startswith("cp311-abi3-linux_")
    assert "softsgx/_speedups.abi3.so" in names(wheel)
    assert not any("speedups/" in name for name in names(wheel))


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CC": "/nowhere/cc"}, "no C compiler"),
        ({"CC": "false"}, "exit status 1"),
        ({"SOFTSGX_PURE": "1"}, "SOFTSGX_PURE is set"),
    ],
)
def test_without_a_compiler_there_is_a_pure_wheel_and_one_line(
    tmp_path: Path, environment: dict[str, str], why: str
) -> None:
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for name in ("tools", "src/speedups"):
        (copy / name).mkdir(parents=True)
        for path in (ROOT / name).glob("*.[pch]*"):
            if path.is_file():
                (copy / name / path.name).write_bytes(path.read_bytes())
    package = copy / "src" / "softsgx"
    package.mkdir()
    (package / "__init__.py").write_bytes((ROOT / "src/softsgx/__init__.py").read_bytes())
    wheel, said = build("wheel", tmp_path, copy, **({"SOFTSGX_PURE": "0"} | environment))
    (line,) = (line for line in said.splitlines() if "compiled core" in line)
    assert line.startswith("softsgx: compiled core: not built: ") and why in line
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in names(wheel))


def test_a_source_distribution_has_what_the_build_needs(tmp_path: Path) -> None:
    import tarfile

    archive, _said = build("sdist", tmp_path)
    with tarfile.open(archive) as files:
        inside = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    sources = {f"src/speedups/{path.name}" for path in builder.SOURCES.iterdir()}
    assert {"hatch_build.py", "tools/speedups.py", *sources} <= inside
    assert not any(name.endswith(".so") for name in inside)


@pytest.mark.slow
def test_sources_compile_without_a_warning() -> None:
    needs_core()
    builder.check()
