"""``softsgx record --as-enclave``: ordinary programs, recorded as if they ran in enclaves."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from typing import Any

from softsgx.arch import PAGE_BYTES
from softsgx.cli._live import Live
from softsgx.cli._signals import ProgramSignals
from softsgx.cli._trace_file import TraceFile, describe_overhead, shell_status
from softsgx.engines.ordinary import AsEnclaveResult, Progress, RecordFailed, record_as_enclave
from softsgx.errors import SoftSgxError
from softsgx.live import OrdinaryState
from softsgx.sizes import parse_size

__all__ = ["describe_ordinary", "record_ordinary", "refuse_machine"]

_OF_MACHINES = ("limit", "group", "profile", "config", "cpus", "pager", "strict")


def refuse_machine(args: argparse.Namespace) -> None:
    """Refuse options of an SGX machine and its driver, which an ordinary program does not use.

    Raises:
        SoftSgxError: one of them was given.
    """
    given = [name for name in _OF_MACHINES if getattr(args, name)]
    given += ["cpuid"] if args.cpuid != "profile" else []
    if given:
        raise SoftSgxError(f"--{given[0]}: not possible with --as-enclave; remove one of them")


def record_ordinary(
    argv: list[str],
    signals: ProgramSignals,
    trace: TraceFile,
    interval_ns: int,
    epc: str | None,
    offer: Callable[[OrdinaryState], Live],
) -> tuple[AsEnclaveResult, list[Exception]]:
    """Run the program; return how it ended, and exceptions that are bugs of the recorder.

    Args:
        argv: the program and its arguments.
        signals: passes signals on to it.
        trace: receives its accesses.
        interval_ns: length of an interval, without an EPC.
        epc: size of the EPC for its memory; ``None``: its memory is not paged.
        offer: returns the object that serves the state of the recording to other processes.
    """
    epc_pages = 0 if epc is None else parse_size(epc) // PAGE_BYTES

    state = OrdinaryState()
    live = offer(state)

    def started(pid: int, progress: Progress) -> None:
        signals.started(pid)
        trace.open(epc_pages)
        state.started(progress)
        live.start()

    with signals.waiting(), trace, closing(live):
        try:
            result = record_as_enclave(
                argv, trace, interval_ns=interval_ns, epc=epc, started=started
            )
        except RecordFailed as failed:  # the trace is not complete
            trace.is_whole = False
            return failed.result, failed.errors
        signals.ended(result.exit_code)
    return result, []


def describe_ordinary(result: AsEnclaveResult, trace: TraceFile) -> dict[str, Any]:
    """Return the object that ``--json`` writes."""
    counts = result.counts
    return {
        "exit_status": shell_status(result.exit_code),
        "address_spaces": result.address_spaces,
        "pages": counts.pages,
        "most_pages": counts.most_pages,
        "loads": result.loads,
        "evictions": result.evictions,
        "trace": trace.describe(
            epc_pages=result.epc_pages,
            enclaves=result.address_spaces,
            accesses=counts.accesses,
            writes=counts.writes,
        ),
        "overhead": describe_overhead(
            wall_ns=result.wall_ns,
            hiding_ns=counts.hiding_ns,
            serving_ns=counts.serving_ns,
            faults=max(counts.accesses, counts.shown) + counts.stores,
            intervals=counts.intervals,
            late_intervals=counts.long,
            longest_interval_ns=counts.longest_ns,
        ),
    }
