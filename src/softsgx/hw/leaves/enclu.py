"""The ENCLU leaves as typed functions, bound to one logical processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from softsgx.arch import Enclu, Status
from softsgx.hw.events import LeafDone
from softsgx.hw.fast_entry import fast_entry
from softsgx.hw.faults import Fault, VmExit
from softsgx.hw.leaves.eaccept import eaccept
from softsgx.hw.leaves.eacceptcopy import eacceptcopy
from softsgx.hw.leaves.edeccssa import edeccssa
from softsgx.hw.leaves.eenter import eenter
from softsgx.hw.leaves.eexit import eexit
from softsgx.hw.leaves.egetkey import egetkey
from softsgx.hw.leaves.emodpe import emodpe
from softsgx.hw.leaves.ereport import ereport
from softsgx.hw.leaves.eresume import eresume
from softsgx.hw.leaves.everifyreport2 import everifyreport2
from softsgx.hw.processor import LogicalProcessor
from softsgx.trace import Tracer

__all__ = ["ENCLU_LEAVES", "EncluLeaves"]

ENCLU_LEAVES: dict[Enclu, Callable[..., Any]] = {
    Enclu.EREPORT: ereport,
    Enclu.EGETKEY: egetkey,
    Enclu.EENTER: eenter,
    Enclu.ERESUME: eresume,
    Enclu.EEXIT: eexit,
    Enclu.EACCEPT: eaccept,
    Enclu.EMODPE: emodpe,
    Enclu.EACCEPTCOPY: eacceptcopy,
    Enclu.EVERIFYREPORT2: everifyreport2,
    Enclu.EDECCSSA: edeccssa,
}


class EncluLeaves:
    """What user code of a processor can do about enclaves: ``cpu.enclu.eenter(tcs, aep)``.

    Operands are linear addresses in the processor's address space.  Each attribute is the leaf's
    own function, whose docstring says what it takes, returns and raises; EENTER, ERESUME and
    EEXIT work on ``cpu.regs``.  An interrupt of the processor waits for the leaf's end.

    The checks that come before any leaf, on mode and privilege, are ``hw.dispatch``'s.
    """

    ereport: Callable[[int, int, int], None]
    egetkey: Callable[[int, int], Status]
    eenter: Callable[[int, int], None]
    eresume: Callable[[int, int], None]
    eexit: Callable[[int], None]
    eaccept: Callable[[int, int], Status]
    emodpe: Callable[[int, int], None]
    eacceptcopy: Callable[[int, int, int], Status]
    everifyreport2: Callable[[int], Status]
    edeccssa: Callable[[], None]

    def __init__(self, cpu: LogicalProcessor) -> None:
        self._cpu = cpu
        self.listen(None)

    def listen(self, tracer: Tracer | None) -> None:
        """Bind every leaf, with an event at its end when somebody listens, bare otherwise."""
        for leaf in ENCLU_LEAVES.values():
            made = leaf if tracer is None else traced_enclu(leaf, tracer)
            setattr(self, leaf.__name__, _instruction(self._cpu, made))
        cpu = self._cpu
        if tracer is None and type(cpu) is LogicalProcessor and cpu.hw.fast:
            for name, fast in fast_entry(cpu, self.eenter, self.eexit).items():
                setattr(self, name, fast)


def _instruction(cpu: LogicalProcessor, leaf: Callable[..., Any]) -> Callable[..., Any]:
    busy = cpu.busy

    def run(*operands: int) -> Any:
        try:
            with busy:
                return leaf(cpu, *operands)
        except VmExit as exit:
            return cpu.hosted(exit, partial(once, *operands))

    def once(*operands: int) -> Any:
        with busy:
            return leaf(cpu, *operands)

    run.__name__, run.__doc__ = leaf.__name__, leaf.__doc__
    return run


def traced_enclu(leaf: Callable[..., Any], tracer: Tracer) -> Callable[..., Any]:
    """Return an ENCLU leaf with a :class:`LeafDone` at each end, fault or not."""
    name = leaf.__name__
    place = {"eenter": 0, "eresume": 0, "eaccept": 1, "emodpe": 1, "eacceptcopy": 1}.get(name, -1)

    def run(cpu: LogicalProcessor, *operands: int) -> Any:
        page = operands[place] if place >= 0 else 0
        before = cpu.inside  # EEXIT leaves it, EENTER finds it
        result = text = None
        try:
            result = leaf(cpu, *operands)
            text = result.manual_name if isinstance(result, Status) else "SGX_SUCCESS"
        except Fault as fault:
            text = str(fault)
            raise
        finally:
            inside = before or cpu.inside
            eid = 0 if inside is None else inside.enclave.eid
            tracer(LeafDone(name, cpu.number, page, eid, text or "aborted"))
        return result

    run.__name__, run.__doc__ = name, leaf.__doc__
    return run
