"""Run a program as one history and say whether the supervisor was at fault.

``python -m tests.soak.supervised OPTIONS PROGRAM ARG...`` prints one line of JSON; OPTIONS are the
keywords of :func:`softsgx.engines.native.run` as JSON.  It is a separate process, so that it can be
killed when it hangs.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.e2e.native.enclave import compile_host, write_enclave
from tests.support.children import running

from softsgx.engines.native import run

__all__ = ["Built", "built", "check"]

DATA_PAGES, THREADS = 20, 6
_HANGS_S = 300


class Built:
    """A program and its enclave, in a directory of their own."""

    def __init__(self, name: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="softsgx-soak-")
        place = Path(self._directory.name)
        self.program = str(compile_host(place, name))
        self.enclave = str(write_enclave(place / "enclave", DATA_PAGES, THREADS))


@cache
def built(name: str) -> Built:
    """Return the program ``name``, compiled once for each process."""
    return Built(name)


def check(argv: list[str], options: dict[str, Any], seconds: float = _HANGS_S) -> str:
    """Run a program and return what it wrote; options are those of ``run``.

    Raises:
        AssertionError: the program failed, the supervisor erred, left something or did not end.
    """
    command = [sys.executable, "-m", "tests.soak.supervised", json.dumps(options), *argv]
    said = f"replay: {' '.join(command[1:])}"
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()  # and the kernel ends what it traces
            out, err = child.communicate()
            told = f"no end after {seconds:.0f} s: {argv}\n{out}{err[-4000:]}"
            raise AssertionError(told) from None
    lines = out.splitlines()
    assert child.returncode == 0 and lines, f"{argv}: {out}{err[-4000:]}\n{said}"
    told = json.loads(lines[-1])
    assert told["exit"] == 0, f"{argv} ends with {told['exit']}: {out}{err[-4000:]}\n{said}"
    assert not told["errors"], f"{argv}: {told['errors']}\n{said}"
    assert not any(told["held"].values()), f"{argv} leaves {told['held']}\n{said}"
    return "\n".join(lines[:-1])


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _main(options: dict[str, Any], argv: list[str]) -> None:
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    result = run(argv, **options)
    sys.stdout.flush()
    told = {"exit": result.exit_code, "held": result.counters["held"], "errors": errors.messages}
    os.write(1, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), sys.argv[2:])
