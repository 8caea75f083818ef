"""A run as one JSON object, documented in ``docs/reference/run-json.md``.

Units are in the names: ``_bytes``, ``_seconds``, ``_cycles``.  Names are only ever added within
one ``format``.
"""

from __future__ import annotations

from typing import Any

from softsgx.costs import Estimate, Price
from softsgx.report.summary import EnclaveSummary, RunSummary
from softsgx.report.verdict import verdict

__all__ = ["FORMAT", "document"]

FORMAT = "softsgx-run/1"


def document(run: RunSummary) -> dict[str, Any]:
    """Return the object, of types that :mod:`json` writes."""
    judged = verdict(run)
    return {
        "format": FORMAT,
        "verdict": {
            "epc": judged.fit.value,
            "text": judged.text,
            "limited_by": list(judged.limited_by),
            "evictions": judged.evictions,
            "reloads": judged.reloads,
            "pages_touched": judged.touched,
            "pages_added": judged.added,
            "fault_share_of_run": round(judged.here, 6),
            "paging_share_on_silicon": round(judged.silicon, 6),
            "next_option": judged.next_option,
        },
        "command": list(run.command),
        "options": list(run.options),
        "version": run.version,
        "began": run.began,
        "exit_status": run.exit_status,
        "signal": run.signal,
        "wall_seconds": round(run.wall_s, 6),
        "program_cpu_seconds": round(run.program_s, 6),
        "supervisor_cpu_seconds": round(run.supervisor_s, 6),
        "platform": {
            "epc_bytes": run.platform.epc_bytes,
            "peak_epc_bytes": run.platform.peak_epc_bytes,
            "processors": run.platform.processors,
            "profile": run.platform.profile,
            "engine": run.platform.engine,
            "pager": run.platform.pager,
            "fault_delivery": run.platform.fault_delivery,
            "defects": list(run.platform.defects),
            "reclaim_seconds": round(run.platform.reclaim_s, 6),
            "counters": run.platform.counters,
        },
        "groups": [
            {
                "path": group.path,
                "max_bytes": group.max_bytes,
                "peak_bytes": group.peak_bytes,
                "refused": group.refused,
            }
            for group in run.groups
        ],
        "enclaves": [_enclave(enclave) for enclave in run.enclaves],
        "injected": dict(run.injected),
        "silicon": {
            **_estimate(run.estimate),
            "prices": [_price(item.price) for item in run.estimate.items],
        },
    }


def _enclave(enclave: EnclaveSummary) -> dict[str, Any]:
    return {
        "number": enclave.number,
        "state": enclave.state,
        "group": enclave.group,
        "mrenclave": enclave.mrenclave,
        "base": enclave.base,
        "size_bytes": enclave.size_bytes,
        "pages_added": enclave.pages_added,
        "pages_touched": enclave.pages_touched,
        "resident_bytes": enclave.resident_bytes,
        "peak_resident_bytes": enclave.peak_resident_bytes,
        "created_seconds": round(enclave.created_s, 6),
        "initialized_seconds": _rounded(enclave.initialized_s),
        "released_seconds": _rounded(enclave.released_s),
        "faults": enclave.fault_count,
        "faults_by_kind": enclave.faults,
        "fault_seconds": round(enclave.fault_s, 6),
        "evictions": enclave.evictions,
        "reloads": enclave.reloads,
        "ewb": enclave.ewb,
        "eldu": enclave.reloads,
        "etrack": enclave.etrack,
        "ipi": enclave.ipi,
        "eenter": enclave.eenter,
        "eexit": enclave.eexit,
        "aex": enclave.aex,
        "eresume": enclave.eresume,
        "silicon": _estimate(enclave.estimate),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "profile": estimate.profile.name,
        "hertz": estimate.profile.hertz,
        "low_cycles": estimate.low,
        "typical_cycles": estimate.typical,
        "high_cycles": estimate.high,
        "typical_seconds": round(estimate.seconds, 6),
        "counts": {item.price.event: item.count for item in estimate.items},
        "unpriced": list(estimate.unpriced),
    }


def _price(price: Price) -> dict[str, Any]:
    return {
        "event": price.event,
        "what": price.what,
        "low_cycles": price.low,
        "typical_cycles": price.typical,
        "high_cycles": price.high,
        "source": price.source,
        "basis": price.basis,
        "printed": price.printed or None,
        "checked": price.checked,
    }
