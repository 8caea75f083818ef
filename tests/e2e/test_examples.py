"""Enclaves built from C work, and examples get their results, in an EPC that is far too small.

Goal: ``softsgx build``, its runtime and its host header, and the examples that people see first.
Method: everything is built by the command and run by the command; ``csource/`` asks the runtime
from inside and from outside, the examples verify their own results.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.support import modes
from tests.support.native import HAS_PERMITS, needs_permits

from softsgx.cli import main
from softsgx.costs import read_profile
from softsgx.engines.native import doctor
from softsgx.plan import Host, PlannedTrace, plan

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ("cc", "ziglang")
SHARE = 4
PAGE_KIB = 4
MIN_FAULTS = 50

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(finding.needed and not finding.ok for finding in doctor()),
        reason="this machine does not let programs be traced; softsgx doctor says what to change",
    ),
]


def without_cc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the machine look like one that has no C compiler."""
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "cc" else real(name))


@pytest.fixture(params=COMPILERS)
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each compiler that a user may have."""
    name = str(request.param)
    if name == "cc" and shutil.which("cc") is None:
        pytest.skip("this machine has no cc")
    if name == "ziglang":
        if find_spec("ziglang") is None:
            pytest.skip("ziglang is not installed; pip install 'softsgx[cc]'")
        without_cc(monkeypatch)
    return name


def build(
    capsys: pytest.CaptureFixture[str], directory: Path, source: Path, *options: str
) -> dict[str, object]:
    arguments = ["build", str(source / "enclave.c"), "--host", str(source / "host.c")]
    arguments += ["-o", str(directory / "enclave.sgxs"), "--json", *options]
    assert main(arguments) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def run(directory: Path, epc: str, *argv: str) -> tuple[str, dict[str, object]]:
    """Run through the command, as a user would; return what the program printed, and the report."""
    report = directory / "run.json"
    command = [sys.executable, "-m", "softsgx", "run", "--epc", epc, "--json", str(report)]
    done = subprocess.run(
        [*command, "--force", "--", *argv], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, object] = json.loads(report.read_text())
    return done.stdout, document


@pytest.mark.parametrize("epc", ["93.5MiB", "128KiB"])
def test_the_runtime_keeps_its_promises(
    compiler: str, epc: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--heap", "256KiB", "--stack", "64KiB", "--threads", "2")
    built = build(capsys, tmp_path, ROOT / "tests" / "e2e" / "csource", *options)
    printed, _ = run(tmp_path, epc, str(built["host"]), str(built["output"]))
    assert printed == "every promise kept\n"


@pytest.mark.parametrize(
    ("example", "heap", "size"),
    [("matrix", "2MiB", "384"), ("sorter", "2MiB", "200000"), ("kvstore", "2MiB", "4000")],
)
def test_an_example_verifies_its_result_in_a_quarter_of_its_size(
    example: str, heap: str, size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("cc") is None and find_spec("ziglang") is None:
        pytest.skip("neither cc nor ziglang is here to build it")
    built = build(capsys, tmp_path, ROOT / "examples" / example, "--heap", heap)
    epc_pages = int(str(built["pages"])) // SHARE
    argv = (str(built["host"]), str(built["output"]), size)
    printed, report = run(tmp_path, f"{epc_pages * PAGE_KIB}KiB", *argv)
    assert "verified" in printed
    (line,) = printed.splitlines()
    # The same result with all the EPC it wants: paging changes times, nothing else.
    roomy, unpaged = run(tmp_path, "64MiB", *argv)
    assert roomy.split(",")[:-1] == line.split(",")[:-1]
    assert reloads(report) > MIN_FAULTS
    assert reloads(unpaged) == 0


def reloads(report: dict[str, object]) -> int:
    enclaves = report["enclaves"]
    assert isinstance(enclaves, list)
    return sum(enclave["reloads"] for enclave in enclaves)


def test_an_example_tells_what_to_do_without_sgx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.path.exists("/dev/sgx_enclave"):
        pytest.skip("this machine has SGX")
    if shutil.which("cc") is None and find_spec("ziglang") is None:
        pytest.skip("neither cc nor ziglang is here to build it")
    built = build(capsys, tmp_path, ROOT / "examples" / "matrix")
    done = subprocess.run(
        [str(built["host"]), str(built["output"])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "softsgx run -- " in done.stderr


def test_the_demo_ends_with_the_summary() -> None:
    demo = [sys.executable, str(ROOT / "examples" / "demo.py"), "matrix", "192", "--heap", "1MiB"]
    done = subprocess.run(demo, capture_output=True, text=True, timeout=240, check=False)
    if "no C compiler" in done.stderr:
        pytest.skip("neither cc nor ziglang is here to build it")
    assert done.returncode == 0, done.stderr
    assert "product verified" in done.stdout
    assert "a quarter of its" in done.stdout
    assert "evictions" in done.stderr
    told = done.stdout + done.stderr
    parts = [finding.name for finding in doctor()]
    parts += re.findall(r"^\d\. [A-Z][a-z ]+|^  (?! ).*?  ", told, re.MULTILINE)
    picture = unescape((ROOT / "docs" / "pictures" / "run.svg").read_text()).replace("\xa0", " ")
    missing = [part for part in parts if part not in picture]
    assert not missing, "draw it again: python tools/picture.py"


@pytest.mark.skipif(modes.has("recorded"), reason="each touch of a hidden page is a fault too")
def test_calibrate_prints_a_profile_that_plan_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(capsys, tmp_path, ROOT / "examples" / "calibrate", "--heap", "3MiB")
    host = [str(tmp_path / "host"), str(tmp_path / "enclave.sgxs"), "640", "100"]
    printed, report = run(tmp_path, "1MiB", *host)
    assert report["enclaves"][0]["reloads"] > 1000  # type: ignore[index]
    (tmp_path / "mine.toml").write_text(printed)
    profile = read_profile(tmp_path / "mine.toml")
    assert profile.swap.basis == profile.prices["eenter"].basis == "measured"
    swap, call = profile.swap.typical, profile.prices["eenter"].typical
    assert swap is not None and call is not None
    assert swap > call or not HAS_PERMITS, "a call that stops twice takes as long"


@needs_permits  # it takes the time of a call off that of a touch
def test_calibrate_without_paging_prints_no_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(capsys, tmp_path, ROOT / "examples" / "calibrate", "--heap", "3MiB")
    command = [sys.executable, "-m", "softsgx", "run", "--quiet", "--epc", "16MiB", "--"]
    command += [str(tmp_path / "host"), str(tmp_path / "enclave.sgxs"), "640", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no page was swapped" in done.stderr


def test_a_plan_of_a_recording_predicts_the_loads_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(capsys, tmp_path, ROOT / "examples" / "sorter", "--heap", "2MiB")
    host = [str(tmp_path / "host"), str(tmp_path / "enclave.sgxs"), "100000"]
    trace = str(tmp_path / "sorter.trace")
    # In 10 ms a fast machine accesses almost the whole EPC again: then no prediction is certain.
    record = [sys.executable, "-m", "softsgx", "record", "--quiet", "--interval", "1ms"]
    subprocess.run(
        [*record, "-o", trace, "--", *host], check=True, capture_output=True, timeout=240
    )
    _printed, report = run(tmp_path, "1MiB", *host)
    loads = report["enclaves"][0]["reloads"]  # type: ignore[index]
    planned = plan([PlannedTrace(trace)], Host(1 << 20, 1 << 20))
    assert planned.sizes[0].certain
    # Recording and run schedule ksgxd by their own clocks.
    assert planned.sizes[0].loads == pytest.approx(loads, rel=0.2)
