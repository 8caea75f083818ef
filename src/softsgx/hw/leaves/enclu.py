"""The ENCLU leaves as typed functions, bound to one logical processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from softsgx.arch import Status
from softsgx.hw.faults import VmExit
from softsgx.hw.leaves.late import LateLeaves
from softsgx.hw.processor import LogicalProcessor
from softsgx.trace import Tracer

__all__ = ["EncluLeaves"]


class EncluLeaves(LateLeaves):
    """ENCLU leaves, bound to one logical processor: ``cpu.enclu.eenter(tcs, aep)``.

    Operands are linear addresses in the processor's address space.  Each attribute is the leaf's
    own function, whose docstring says what it takes, returns and raises; EENTER, ERESUME and
    EEXIT work on ``cpu.regs``.  An interrupt of the processor waits for the leaf's end.

    ``hw.dispatch`` has the checks of mode and privilege that come before any leaf.

    Args:
        cpu: the processor.
        tracer: receives an event at the end of each leaf; without one, the machine's second
            implementations are used.
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

    def __init__(self, cpu: LogicalProcessor, *, tracer: Tracer | None = None) -> None:
        self._cpu, self._tracer = cpu, tracer

    def _bind(self) -> None:
        from softsgx.hw.leaves.registry import ENCLU, eid_inside, traced

        cpu, tracer = self._cpu, self._tracer
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
            return cpu.handle_vm_exit(exit, partial(once, *operands))

    def once(*operands: int) -> Any:
        with busy:
            return leaf(cpu, *operands)

    run.__name__, run.__doc__ = leaf.__name__, leaf.__doc__
    return run
