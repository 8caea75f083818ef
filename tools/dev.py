"""Set up a virtual environment in the checkout, and run one task in it.

Needs only Python 3.11+ with ``venv``:

    python3 tools/dev.py tour      the worked paging tour
    python3 tools/dev.py demo      build an example enclave and run it with a quarter of its EPC
    python3 tools/dev.py test      lint, spelling, dead code, types, layers, docs and all tests
    python3 tools/dev.py quick     the same without docs and slow tests, and samples of large tables
    python3 tools/dev.py soak      random histories: --minutes N --jobs N [--seed N] [--kind KIND]
    python3 tools/dev.py modes     end-to-end tests in every mode of the native engine, as a table
    python3 tools/dev.py docs      the documentation, to docs/_build/html
    python3 tools/dev.py format    rewrite the sources as ruff has them
    python3 tools/dev.py setup     only the environment
    python3 tools/dev.py core      only the compiled core, src/softsgx/_speedups.abi3.so

Each also compiles the core when its C sources have changed; without a compiler it is left out.

The environment is ``.venv``; it is made again when its requirements have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
STAMP = VENV / "softsgx-setup"
CONSTRAINTS = ROOT / "constraints.txt"
RUN_EXTRAS = ("report",)
CORE = ("tools/speedups.py",)


def main() -> int:
    """Parse the command line, set up, run; return the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this is the check for older ones
        print("softsgx needs Python 3.11 or newer", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments for the task")
    args = parser.parse_args()
    set_up(dev=args.task not in ("tour", "demo"))
    return TASKS[args.task](args.rest)


def set_up(*, dev: bool) -> None:
    """Install the package into ``.venv``, and with ``dev`` all packages for tests and docs."""
    import tomllib  # not before the version was checked

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes()
    ).hexdigest()
    have = STAMP.read_text().split() if STAMP.exists() else []
    if have[:1] == [wanted] and (not dev or "dev" in have):
        run("python", *CORE)
        return
    if not (BIN / "python").exists():
        print("making .venv …", file=sys.stderr)
        venv.create(VENV, with_pip=True)
    extras = [name for name in RUN_EXTRAS if name in project["project"]["optional-dependencies"]]
    if shutil.which("cc") is None:
        extras.append("cc")  # examples are C: PyPI has a compiler, too
    packages = ["-e", f"{ROOT}[{','.join(extras)}]"]
    if dev:
        packages += group(project, "dev")
    print("installing what it needs …", file=sys.stderr)
    pip: list[str | Path] = [
        BIN / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--constraint", CONSTRAINTS, *packages], check=True, cwd=ROOT)
    STAMP.write_text(f"{wanted} {'dev' if dev else 'run'}\n")
    run("python", *CORE)


def group(project: dict[str, Any], name: str) -> list[str]:
    """Return the requirements of a dependency group, included groups too."""
    wanted: list[str] = []
    for item in project["dependency-groups"][name]:
        wanted += group(project, item["include-group"]) if isinstance(item, dict) else [item]
    return wanted


def run(*command: str | Path) -> int:
    """Run one program of the environment in the checkout; return its exit status."""
    return subprocess.run(**_process(*command)).returncode


def _process(*command: str | Path) -> dict[str, Any]:
    """Return the arguments of ``subprocess.run`` for a program of the environment."""
    program, *arguments = command
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    return {"args": [BIN / program, *arguments], "cwd": ROOT, "env": environment}


def side_by_side(steps: dict[str, list[str]]) -> list[str]:
    """Run programs, one on each processor; print the output of each; return which failed."""

    def timed(name: str) -> tuple[str, int, str, float]:
        start = time.monotonic()
        done = subprocess.run(
            **_process(*steps[name]), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return name, done.returncode, done.stdout, time.monotonic() - start

    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, status, output, seconds in pool.map(timed, steps):
            print(
                f"== {name}: {' '.join(steps[name])}\n{output}== {name}: {seconds:.0f} s",
                flush=True,
            )
            if status:
                failed.append(name)
    return failed


def checks(rest: list[str], *, full: bool) -> int:
    """Run every check, print which failed, and return non-zero when any did."""
    failed = side_by_side((STATIC | {"docs": DOCS}) if full else STATIC)
    tests = ["pytest", "-q", "-rs", "-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
    tests += [] if full else ["-m", "not slow and not exhaustive"]
    print(f"== tests: {' '.join(tests)}", flush=True)
    start = time.monotonic()
    if run(*tests, *rest):
        failed.append("tests")
    print(f"== tests: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"FAILED: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


#: Checks of the sources, those that take longest first.
STATIC = {
    "dead code": ["vulture"],
    "types": ["mypy"],
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "spelling": ["codespell"],
    "layers": ["lint-imports"],
    "C": ["python", "tools/speedups.py", "--check"],
}
DOCS = ["sphinx-build", "-q", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html"]

TASKS: dict[str, Callable[[list[str]], int]] = {
    "tour": lambda rest: run("softsgx", "tour", *rest),
    "demo": lambda rest: run("python", "examples/demo.py", *rest),
    "test": lambda rest: checks(rest, full=True),
    "quick": lambda rest: checks(rest, full=False),
    "soak": lambda rest: run("python", "-m", "tests.soak", *rest),
    "modes": lambda rest: run("python", "-m", "tools.modes", *rest),
    "docs": lambda rest: run(*DOCS, *rest),
    "format": lambda rest: run("ruff", "check", "--fix", ".") or run("ruff", "format", "."),
    "setup": lambda rest: 0,
    "core": lambda rest: run("python", *CORE),
}

if __name__ == "__main__":
    sys.exit(main())
