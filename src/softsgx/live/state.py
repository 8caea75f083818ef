"""The state of a run as one JSON object, documented in ``docs/reference/status-json.md``.

Another thread than the supervisor's reads the counts without locks, so that no fault waits for a
reader.  The supervisor may change a count while this thread reads the others.  So the counts are
read until two successive readings are equal, or :data:`_READINGS` times.

Names end with their units.  Within one ``format`` names are added, never removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import softsgx
from softsgx.arch import PAGE_BYTES
from softsgx.cgroup import EpcCgroup
from softsgx.host import Platform
from softsgx.ondemand import dataclass
from softsgx.report import Collector, LivingEnclave, Totals

__all__ = [
    "FORMAT",
    "About",
    "described",
    "epc_state",
    "group_states",
    "names_of",
    "settled",
    "state",
]

FORMAT = "softsgx-status/1"
_READINGS = 8


@dataclass(frozen=True, slots=True)
class About:
    """The part of the state that is constant during a run.

    Attributes:
        pid: process of the supervisor; the name of the socket has it.
        verb: the command, ``run`` or ``record``.
        command: the program and its arguments.
        began: date and time of the start, ISO 8601 in UTC.
    """

    pid: int
    verb: str
    command: Sequence[str]
    began: str


def state(collector: Collector, about: About) -> dict[str, Any]:
    """Return the object; :mod:`json` can encode it.

    Any thread may call it after a platform was attached to the collector.
    """
    platform = collector.platform
    assert platform is not None, "a state before the collector was attached"
    counts = settled(lambda: _counts(collector, platform))
    names = names_of(pid for enclave in counts["enclaves"] for pid in enclave["pids"])
    for enclave in counts["enclaves"]:
        enclave["name"] = next(filter(None, map(names.get, enclave["pids"])), "")
    return {
        **described(about, collector.elapsed_s),
        "profile": platform.config.profile,
        "pager": collector.pager,
        **counts,
    }


def described(about: About, elapsed_s: float) -> dict[str, Any]:
    """Return what the object says first, of every kind of run."""
    return {
        "format": FORMAT,
        "version": softsgx.__version__,
        "pid": about.pid,
        "verb": about.verb,
        "command": list(about.command),
        "began": about.began,
        "elapsed_seconds": round(elapsed_s, 6),
    }


def settled(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return counts of one moment, which another thread may be changing."""
    counts = read()
    for _reading in range(_READINGS - 1):
        again = read()
        if again == counts:
            break
        counts = again
    return counts


def names_of(pids: Iterable[int]) -> dict[int, str]:
    """Return the names of processes; empty: it has ended."""
    return {pid: _comm(pid) for pid in pids}


def _counts(collector: Collector, platform: Platform) -> dict[str, Any]:
    core = platform.core
    return {
        "epc": epc_state(platform),
        "totals": _totals(collector.totals()),
        "reclaim": {
            "batches": core.counters.batches,
            "seconds": round(core.reclaim_ns / 1e9, 6),
        },
        "groups": group_states(platform),
        "enclaves": [_enclave(living) for living in collector.living_enclaves()],
    }


def epc_state(platform: Platform) -> dict[str, Any]:
    """Return what the object says of the EPC."""
    core = platform.core
    free = core.free_pages
    return {
        "size_bytes": core.epc_pages * PAGE_BYTES,
        "used_bytes": (core.epc_pages - free) * PAGE_BYTES,
        "free_bytes": free * PAGE_BYTES,
        # dict() copies without running Python code, while the supervisor may add kinds.
        "pages": dict(core.counters.held),
    }


def group_states(platform: Platform) -> list[dict[str, Any]]:
    """Return what the object says of each group, the root first."""
    return [_group(group) for group in platform.cgroups.root.subtree()]


def _totals(totals: Totals) -> dict[str, Any]:
    return {
        "faults": totals.faults,
        "fault_seconds": round(totals.fault_s, 6),
        "evictions": totals.evictions,
        "reloads": totals.reloads,
        "eenter": totals.eenter,
        "eexit": totals.eexit,
        "aex": totals.aex,
        "eresume": totals.eresume,
    }


def _group(group: EpcCgroup) -> dict[str, Any]:
    limit = group.max_pages
    return {
        "path": group.path,
        "usage_bytes": group.usage_pages * PAGE_BYTES,
        "max_bytes": None if limit is None else limit * PAGE_BYTES,
        "peak_bytes": group.peak_pages * PAGE_BYTES,
        "refused": group.events_local,
    }


def _enclave(living: LivingEnclave) -> dict[str, Any]:
    enclave, totals = living.enclave, _totals(living.totals)
    group = enclave.group
    return {
        "number": enclave.number,
        "pids": [entry.mm.pid for entry in reversed(enclave.mms) if entry.mm.pid],
        "group": group.path if isinstance(group, EpcCgroup) else "/",
        "state": living.state,
        "mrenclave": living.mrenclave,
        "base": enclave.base,
        "size_bytes": enclave.size,
        "resident_bytes": enclave.swap.children * PAGE_BYTES,
        "faults_by_kind": dict(enclave.counts.faults),
        **totals,
    }


def _comm(pid: int) -> str:
    """Return the name of a process; empty: it has ended."""
    with suppress(OSError), open(f"/proc/{pid}/comm", errors="replace") as file:
        return file.read().rstrip("\n")
    return ""
