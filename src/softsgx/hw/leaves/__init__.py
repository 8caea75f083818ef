"""ENCLS, ENCLV and ENCLU leaves, one file each; here the ones that operating systems use.

Source:
    SDM vol. 3D, "SGX Instruction References".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any, ClassVar, ParamSpec, TypeVar

from softsgx.arch import EinitToken, RdInfo, SecInfo, SigStruct, Status
from softsgx.hw.epcm import EpcPage
from softsgx.hw.events import LeafDone
from softsgx.hw.faults import Fault, VmExit
from softsgx.hw.leaves.eadd import eadd
from softsgx.hw.leaves.eaug import eaug
from softsgx.hw.leaves.eblock import eblock
from softsgx.hw.leaves.ecreate import ecreate
from softsgx.hw.leaves.edbgrd import edbgrd
from softsgx.hw.leaves.edbgwr import edbgwr
from softsgx.hw.leaves.eextend import eextend
from softsgx.hw.leaves.einit import einit
from softsgx.hw.leaves.eld import eldb, eldbc, eldu, elduc
from softsgx.hw.leaves.emodpr import emodpr
from softsgx.hw.leaves.emodt import emodt
from softsgx.hw.leaves.epa import epa
from softsgx.hw.leaves.erdinfo import erdinfo
from softsgx.hw.leaves.eremove import eremove
from softsgx.hw.leaves.esetcontext import esetcontext
from softsgx.hw.leaves.etrack import etrack, etrackc
from softsgx.hw.leaves.eupdatesvn import eupdatesvn
from softsgx.hw.leaves.ewb import ewb
from softsgx.hw.leaves.virtchild import edecvirtchild, eincvirtchild
from softsgx.hw.operands import PageInfoArgs, Ref
from softsgx.hw.processor import LogicalProcessor
from softsgx.trace import Tracer

__all__ = ["Leaves", "traced"]

P = ParamSpec("P")
R = TypeVar("R")


class Leaves:
    """Leaves as typed functions, bound to one logical processor in kernel mode.

    EPC operands are linear addresses (with the default address space: physical ones); operands in
    ordinary memory may be given as objects.  Each attribute is the leaf's own function, whose
    docstring says what it takes, returns and raises.

    Attributes:
        FUNCTIONS: all of them; the first parameter of each is the processor.
    """

    ecreate: Callable[[Ref | PageInfoArgs, int], None]
    eadd: Callable[[Ref | PageInfoArgs, int], None]
    eextend: Callable[[int, int], None]
    einit: Callable[[Ref | SigStruct, int, Ref | EinitToken], Status]
    epa: Callable[[int, int], None]
    eblock: Callable[[int], Status]
    etrack: Callable[[int], Status]
    etrackc: Callable[[int], Status]
    ewb: Callable[[Ref | PageInfoArgs, int, int], Status]
    eldb: Callable[[Ref | PageInfoArgs, int, int], Status]
    eldu: Callable[[Ref | PageInfoArgs, int, int], Status]
    eldbc: Callable[[Ref | PageInfoArgs, int, int], Status]
    elduc: Callable[[Ref | PageInfoArgs, int, int], Status]
    eremove: Callable[[int], Status]
    erdinfo: Callable[[Ref | RdInfo, int], Status]
    eaug: Callable[[Ref | PageInfoArgs, int], None]
    emodpr: Callable[[Ref | SecInfo, int], Status]
    emodt: Callable[[Ref | SecInfo, int], Status]
    edbgrd: Callable[[int], tuple[Status, int]]
    edbgwr: Callable[[int, int], Status]
    eupdatesvn: Callable[[], Status]
    edecvirtchild: Callable[[int, int], Status]
    eincvirtchild: Callable[[int, int], Status]
    esetcontext: Callable[[int, Ref], Status]

    FUNCTIONS: ClassVar[tuple[Callable[..., Any], ...]] = (
        ecreate,
        eadd,
        eextend,
        einit,
        epa,
        eblock,
        etrack,
        etrackc,
        ewb,
        eldb,
        eldu,
        eldbc,
        elduc,
        eremove,
        erdinfo,
        eaug,
        emodpr,
        emodt,
        edbgrd,
        edbgwr,
        eupdatesvn,
        edecvirtchild,
        eincvirtchild,
        esetcontext,
    )

    def __init__(
        self, cpu: LogicalProcessor, fast: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        self._cpu, self._fast = cpu, fast or {}
        self.listen(None)

    def listen(self, tracer: Tracer | None) -> None:
        """Bind every leaf, with an event at its end when somebody listens, bare otherwise."""
        for leaf in self.FUNCTIONS:
            bound = leaf if tracer is None else traced(leaf, tracer)
            setattr(self, leaf.__name__, MethodType(bound, self._cpu))
        if tracer is None:
            for name, fast in self._fast.items():
                setattr(self, name, fast)


def traced(leaf: Callable[P, R], tracer: Tracer) -> Callable[P, R]:
    """Return ``leaf`` with a :class:`LeafDone` at each end, fault or not."""
    name = leaf.__name__
    registers = list(signature(leaf).parameters)
    register = "rcx" if "rcx" in registers else "rbx"
    place = registers.index(register) if register in registers else len(registers)

    @wraps(leaf)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        cpu = args[0]
        assert isinstance(cpu, LogicalProcessor), f"{name} without a processor"
        operand = args[place] if place < len(args) else kwargs.get(register)
        target = operand if isinstance(operand, int) else 0
        eid = _eid(cpu, target)
        try:
            result = leaf(*args, **kwargs)
        except (Fault, VmExit) as fault:
            tracer(LeafDone(name, cpu.number, target, eid, str(fault)))
            raise
        status = result[0] if isinstance(result, tuple) else result  # EDBGRD has data, too
        text = status.manual_name if isinstance(status, Status) else "SGX_SUCCESS"
        tracer(LeafDone(name, cpu.number, target, eid or _eid(cpu, target), text))
        return result

    return run


def _eid(cpu: LogicalProcessor, target: int) -> int:
    page: EpcPage | None = cpu.hw.pages.get(target & ~0xFFF)
    if page is None or not page.valid or (page.secs is None and page.enclave is None):
        return 0
    return page.owner.eid
