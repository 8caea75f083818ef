"""A fleet as a TOML file: hosts with EPC sizes to choose from, and the traces to place on them.

::

    target_slowdown = 1.1

    [[host]]
    name = "edge"
    epc = ["64MiB", "128MiB"]   # each is tried
    count = 4                   # without it: as many as are needed

    [[trace]]
    file = "app.trace"          # relative to this file
    count = 10
    limit = "48MiB"             # misc.max of each one's own group
    hosts = ["edge"]            # without it: any
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softsgx.arch import PAGE_BYTES
from softsgx.costs import COST_PROFILES, CostProfile, find_profile
from softsgx.errors import SoftSgxError, first_line
from softsgx.plan.planner import SMALLEST_PAGES
from softsgx.sizes import parse_size, size_text

__all__ = ["FleetHost", "FleetSpec", "FleetTrace", "load_fleet"]

_MOST = 100_000
_TOP = frozenset({"target_slowdown", "costs", "host", "trace"})
_HOST = frozenset({"name", "epc", "count"})
_TRACE = frozenset({"file", "name", "count", "limit", "hosts"})


@dataclass(frozen=True, slots=True)
class FleetHost:
    """Hosts of one kind.

    Attributes:
        name: of the kind.
        epc_bytes: sizes of the EPC to try, ascending.
        count: how many there are; ``None``: as many as are needed.
    """

    name: str
    epc_bytes: tuple[int, ...]
    count: int | None = None


@dataclass(frozen=True, slots=True)
class FleetTrace:
    """Programs with the accesses of one trace.

    Attributes:
        name: of the programs.
        path: of the trace.
        count: how many there are.
        limit_bytes: ``misc.max`` of each program's own group; ``None``: no limit.
        hosts: kinds of hosts that may run it; empty: any.
    """

    name: str
    path: Path
    count: int = 1
    limit_bytes: int | None = None
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """A fleet.

    Attributes:
        hosts: in the order in which they are filled.
        traces: the programs to place.
        target_slowdown: acceptable run time on each host, divided by that without paging.
        costs: prices of faults and evictions.
    """

    hosts: tuple[FleetHost, ...]
    traces: tuple[FleetTrace, ...]
    target_slowdown: float = 1.1
    costs: CostProfile = COST_PROFILES["sgx2-server"]

    def __post_init__(self) -> None:
        if not self.hosts or not self.traces:
            raise SoftSgxError(
                "fleet: no host or no trace; write at least one [[host]] and one [[trace]]"
            )
        if not 1 < self.target_slowdown < math.inf:
            raise SoftSgxError(
                f"target_slowdown = {self.target_slowdown}: not above 1; write 1.1 for 10 %"
            )
        for kind, names in (
            ("host", [host.name for host in self.hosts]),
            ("trace", [trace.name for trace in self.traces]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise SoftSgxError(f"{kind} {min(twice)}: name used twice; write different names")
        known = {host.name for host in self.hosts}
        for trace in self.traces:
            if unknown := set(trace.hosts) - known:
                raise SoftSgxError(
                    f"trace {trace.name}: hosts = {min(unknown)!r}: no such host; "
                    f"write some of {', '.join(sorted(known))}"
                )

    def kinds_for(self, trace: FleetTrace) -> tuple[FleetHost, ...]:
        """Return the kinds of hosts that may run a trace."""
        return tuple(host for host in self.hosts if not trace.hosts or host.name in trace.hosts)


def load_fleet(path: str) -> FleetSpec:
    """Read a fleet.

    Raises:
        SoftSgxError: the file cannot be read, or a value in it is invalid.
    """
    try:
        document = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise SoftSgxError(f"{path}: not TOML: {first_line(error)}; correct the line") from error
    try:
        _only(document, _TOP, "the file")
        directory = Path(path).parent
        return FleetSpec(
            tuple(_host(table) for table in _tables(document, "host")),
            tuple(_trace(table, directory) for table in _tables(document, "trace")),
            _number(document.get("target_slowdown", 1.1), "target_slowdown"),
            find_profile(_text(document.get("costs", "sgx2-server"), "costs")),
        )
    except SoftSgxError as error:
        raise SoftSgxError(f"{path}: {error}") from error


def _host(table: Mapping[str, Any]) -> FleetHost:
    name = _text(table.get("name"), "host: name")
    _only(table, _HOST, f"host {name}")
    sizes = table.get("epc")
    if sizes is None:
        raise SoftSgxError(f'host {name}: no epc; write epc = "64MiB", or a list to try')
    texts = sizes if isinstance(sizes, list) else [sizes]
    if not texts:
        raise SoftSgxError(f"host {name}: epc = []: no size; write at least one")
    wanted = {_size(text, f"host {name}: epc") for text in texts}
    count = table.get("count")
    return FleetHost(
        name, tuple(sorted(wanted)), None if count is None else _count(count, f"host {name}")
    )


def _trace(table: Mapping[str, Any], directory: Path) -> FleetTrace:
    file = Path(_text(table.get("file"), "trace: file"))
    name = _text(table.get("name", file.stem), f"trace {file}: name")
    _only(table, _TRACE, f"trace {name}")
    limit, hosts = table.get("limit"), table.get("hosts", [])
    if not isinstance(hosts, list):
        raise SoftSgxError(f"trace {name}: hosts = {hosts!r}: not a list; write a list of names")
    return FleetTrace(
        name,
        directory / file,
        _count(table.get("count", 1), f"trace {name}"),
        None if limit is None else _size(limit, f"trace {name}: limit"),
        tuple(_text(host, f"trace {name}: hosts") for host in hosts),
    )


def _only(table: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    unknown = set(table) - known
    if unknown:
        raise SoftSgxError(
            f"{what}: {min(unknown)}: not known; write some of {', '.join(sorted(known))}"
        )


def _tables(document: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    tables = document.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SoftSgxError(f"{name}: not a list of tables; write [[{name}]]")
    return tables


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise SoftSgxError(f"{what} = {value!r}: not a text; write one in quotes")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SoftSgxError(f"{what} = {value!r}: not a number; write one, such as 1.1")
    return float(value)


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise SoftSgxError(
            f"{what}: count = {value!r}: not a count; write a number from 1 to {_MOST}"
        )
    return value


def _size(value: object, what: str) -> int:
    try:
        size = parse_size(str(value))
    except ValueError as error:
        raise SoftSgxError(f"{what} = {value!r}: {error}") from error
    if size < SMALLEST_PAGES * PAGE_BYTES:
        least = size_text(SMALLEST_PAGES * PAGE_BYTES)
        raise SoftSgxError(f"{what} = {value!r}: too small for an enclave; give at least {least}")
    return size
