"""Clients: SGX programs of other projects, prepared on the machine that runs the tests.

``SOFTSGX_CLIENTS`` names a directory; ``docs/reference/clients.md`` describes the TOML files in it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

__all__ = ["ABSENT", "Client", "Machine", "Outcome", "clients", "run_client"]

VARIABLE = "SOFTSGX_CLIENTS"
ABSENT = f"{VARIABLE} names no directory of prepared SGX programs"
_MACHINE_KEYS = {
    "epc": ["93.5MiB"],
    "pager": [""],
    "strict": [False],
    "profile": ["sgx2-server"],
    "options": [],
}


@dataclass(frozen=True)
class Machine:
    """The machine of one run.

    Attributes:
        epc: size of the EPC, with a unit.
        pager: ``userfaultfd``, ``mprotect``, or empty for the best there is.
        strict: whether accesses from outside hit the abort page.
        profile: features of the processor.
        options: further arguments of ``softsgx run``.
    """

    epc: str
    pager: str = ""
    strict: bool = False
    profile: str = "sgx2-server"
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Return the arguments of ``softsgx run`` for it."""
        return [
            *("--epc", self.epc, "--profile", self.profile),
            *(("--pager", self.pager) if self.pager else ()),
            *(("--strict",) if self.strict else ()),
            *self.options,
        ]

    def __str__(self) -> str:
        parts = [self.epc, self.profile, self.pager, "strict" if self.strict else "", *self.options]
        return "-".join(part.lstrip("-") for part in parts if part)


@dataclass(frozen=True)
class Client:
    """One program, how to start it, and what it does when all is well.

    Attributes:
        name: the description's file name without its suffix.
        command: program and arguments.
        directory: where it is started.
        environment: variables added to the environment.
        stdin: what it reads.
        exit_status: its exit status.
        contains: text that has to be in its output.
        output: all of its output, or None when that is not compared.
        ignore: patterns that are cut out of both before they are compared.
        any_order: whether its threads write lines in an order of their own.
        timeout: seconds after which it hangs.
        enclaves: how many enclaves it launches at least.
        fails: why it is known to fail; empty otherwise.
        machines: where to run it.
    """

    name: str
    command: tuple[str, ...]
    directory: Path
    environment: dict[str, str] = field(default_factory=dict)
    stdin: str = ""
    exit_status: int = 0
    contains: tuple[str, ...] = ()
    output: str | None = None
    ignore: tuple[str, ...] = ()
    any_order: bool = False
    timeout: float = 120.0
    enclaves: int = 1
    fails: str = ""
    machines: tuple[Machine, ...] = (Machine("93.5MiB"),)

    def comparable(self, text: str) -> str:
        """Return output without what differs from run to run."""
        for pattern in self.ignore:
            text = re.sub(pattern, "", text, flags=re.MULTILINE)
        return "\n".join(sorted(text.splitlines())) if self.any_order else text


@dataclass(frozen=True)
class Outcome:
    """How a client ended.

    Attributes:
        exit_status: as ``softsgx run`` gives it.
        output: what it wrote to stdout.
        errors: what it and softsgx wrote to stderr.
        enclaves: how many enclaves it launched.
    """

    exit_status: int
    output: str
    errors: str
    enclaves: int


def clients() -> list[Client]:
    """Return the clients of the directory, none without one.

    Raises:
        AssertionError: a description is wrong.
    """
    root = os.environ.get(VARIABLE, "")
    return [_read(path) for path in sorted(Path(root).rglob("*.toml"))] if root else []


def _read(path: Path) -> Client:
    values: dict[str, Any] = tomllib.loads(path.read_text())
    machines = tuple(_machines(path, values.pop("machines", [{}])))
    expected = values.pop("output", None)
    client = {
        "name": path.stem,
        "directory": path.parent / values.pop("directory", "."),
        "output": None if expected is None else (path.parent / expected).read_text(),
        "environment": {
            name: value.replace("{here}", str(path.parent.resolve()))
            for name, value in values.pop("environment", {}).items()
        },
        **{name: tuple(values.pop(name, ())) for name in ("command", "contains", "ignore")},
    }
    assert client["command"], f"{path}: no command"
    odd = values.keys() - Client.__dataclass_fields__.keys()
    assert not odd, f"{path}: {sorted(odd)} not known"
    return Client(**client, **values, machines=machines)


def _machines(path: Path, tables: list[dict[str, Any]]) -> Iterator[Machine]:
    """Yield every combination of the values of each table."""
    for table in tables:
        odd = table.keys() - _MACHINE_KEYS.keys()
        assert not odd, f"{path}: machines: {sorted(odd)} not known"
        chosen = {**_MACHINE_KEYS, **table}
        options = tuple(chosen.pop("options"))
        for values in product(*chosen.values()):
            yield Machine(**dict(zip(chosen, values, strict=True)), options=options)


def run_client(client: Client, machine: Machine, scratch: Path) -> Outcome:
    """Run it under ``softsgx run``.

    Args:
        client: what to run.
        machine: on which machine.
        scratch: an empty directory.

    Raises:
        TimeoutExpired: it does not end; it has been killed.
    """
    summary = scratch / "run.json"
    softsgx = [sys.executable, "-m", "softsgx", "run", "--quiet", "--json", str(summary)]
    done = subprocess.run(
        [*softsgx, *machine.arguments(), "--", *client.command],
        cwd=client.directory,
        env={**os.environ, **client.environment},
        input=client.stdin,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=client.timeout,
    )
    made = json.loads(summary.read_text())["enclaves"] if summary.exists() else []
    launched = sum(enclave["state"] != "building" for enclave in made)
    return Outcome(done.returncode, done.stdout, done.stderr, launched)
