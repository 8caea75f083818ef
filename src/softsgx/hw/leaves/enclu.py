"""The ENCLU leaves as typed functions, bound to one logical processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from softsgx.arch import Status
from softsgx.hw.faults import VmExit
from softsgx.hw.leaves.registry import ENCLU, eid_inside, traced
from softsgx.hw.processor import LogicalProcessor
from softsgx.trace import Tracer

__all__ = ["EncluLeaves"]


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
        """Bind every leaf, with an event at its end for a listener, bare otherwise."""
        cpu = self._cpu
        for leaf in ENCLU.values():
            function = leaf.function
            if tracer is not None:
                function = traced(leaf, function, tracer, eid_inside)
            setattr(self, leaf.name, _instruction(cpu, function))
        if tracer is None and cpu.hw.optimised is not None:
            for name, function in cpu.hw.optimised.user(cpu, self).items():
                setattr(self, name, function)


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
