"""The cost of starting and forking processes under the native engine, and its memory.

Each row is next to the same without softsgx, in the same run:

``start_ms``       ``softsgx run --quiet -- /bin/true``, beside an empty Python program
``exec_us``        an execve of a small dynamic program
``fork_us``        a fork, with the end of the child
``tools_ratio``    a shell script of those of compiler, grep and sed that are installed
``supervisor_bytes_per_enclave_byte``  how much more memory the supervisor has at most with an
                   enclave of 256 MiB than with one of 8 MiB, for each byte of the difference, all
                   of which has left the EPC.  Python takes memory in steps of 1 MiB, so the sizes
                   are far apart
``supervisor_mib`` its memory around ``/bin/true``, beside that of an empty Python program

None of the programs of the first four opens a device.

    python benchmarks/processes.py [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from softsgx.arch import PAGE_BYTES
from softsgx.image.csource import find_compiler

_SOURCES = Path(__file__).parent / "native"
#: Without it each start would compile softsgx.
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != _NO_BYTECODE}
_RUN = (sys.executable, "-m", "softsgx", "run", "--quiet")
_FORKS, _EXECUTIONS, _ROUNDS_OF_TOOLS = 300, 100, 10
_EPC_BYTES, _SMALL_PAGES, _LARGE_PAGES = 4 << 20, 2048, 65536
#: Prints how much memory a process had at most, in KiB, since it executed its program.
_PEAK = """
import sys
with open("/proc/self/status") as status:
    print(*(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""
_PEAK_OF_RUN = f"import sys; from softsgx.cli import main; main(sys.argv[1:])\n{_PEAK}"
_TOOLS = {
    "gcc": "echo 'int x;' | gcc -x c -c -o /dev/null -",
    "grep": "echo x | grep -q x",
    "sed": "echo x | sed s/x/y/ >/dev/null",
}


def processes(directory: Path, rounds: int) -> dict[str, float]:
    """Return the best of all rounds; programs are compiled into ``directory``.

    Raises:
        SoftSgxError: there is no compiler.
    """
    compiler = find_compiler()
    program, adder = directory / "processes", directory / "adder"
    compiler.host([_SOURCES / "processes.c"], program)
    compiler.host([_SOURCES / "pages.c"], adder)
    tools = [line for tool, line in _TOOLS.items() if shutil.which(tool)]
    script = f"for i in $(seq {_ROUNDS_OF_TOOLS}); do {'; '.join(tools)}; done"
    measured: dict[str, list[float]] = {}

    def add(name: str, scale: float, measure: Callable[[], float]) -> None:
        measured.setdefault(name, []).append(measure() * scale)

    _seconds([*_RUN, "--", "/bin/true"])  # the first start may compile
    for _round in range(rounds):
        add("start_ms", 1e3, lambda: _seconds([*_RUN, "--", "/bin/true"]))
        add("start_python_ms", 1e3, lambda: _seconds([sys.executable, "-c", ""]))
        for name, count in (("exec", _EXECUTIONS), ("fork", _FORKS)):
            argv = [str(program), name, str(count)]
            add(f"{name}_us", 1e6, lambda argv=argv: _printed([*_RUN, "--", *argv]))  # type: ignore[misc]
            add(f"{name}_alone_us", 1e6, lambda argv=argv: _printed(argv))  # type: ignore[misc]
        add("tools_ms", 1e3, lambda: _seconds([*_RUN, "--", "sh", "-c", script]))
        add("tools_alone_ms", 1e3, lambda: _seconds(["sh", "-c", script]))
    result = {name: round(min(values), 1) for name, values in measured.items()}
    tools_ms = result["tools_ms"] - result["start_ms"]
    result["tools_ratio"] = round(tools_ms / result["tools_alone_ms"], 2)
    small, large = (_peak_with_enclave(adder, pages) for pages in (_SMALL_PAGES, _LARGE_PAGES))
    grown = (large - small) / ((_LARGE_PAGES - _SMALL_PAGES) * PAGE_BYTES)
    result["supervisor_bytes_per_enclave_byte"] = round(grown, 3)
    start = _peak(_PEAK_OF_RUN, "run", "--quiet", "--", "/bin/true")
    result["supervisor_mib"] = round(start / 2**20, 1)
    result["python_mib"] = round(_peak(_PEAK) / 2**20, 1)
    return result


def _seconds(argv: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, env=_ENVIRONMENT)
    return time.perf_counter() - start


def _printed(argv: Sequence[str]) -> float:
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env=_ENVIRONMENT)
    return float(done.stdout)


def _peak(code: str, *arguments: str) -> int:
    """Return the most memory that Python had when it had run ``code``, bytes."""
    argv = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env=_ENVIRONMENT)
    return int(done.stderr.split()[-1]) * 1024


def _peak_with_enclave(adder: Path, pages: int) -> int:
    run = ("run", "--quiet", "--epc", str(_EPC_BYTES), "--")
    return _peak(_PEAK_OF_RUN, *run, str(adder), "add", str(pages), "1", "1")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="softsgx-") as scratch:
        print(json.dumps(processes(Path(scratch), args.rounds), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
