"""The registry of leaves: their names, the registers of their operands, the features they need.

Typed functions, the three instructions and guests use this registry and one tracing wrapper.

Source:
    SDM vol. 3D, tables "Supervisor and User Mode Enclave Instruction Leaf Functions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from softsgx.arch import Encls, Enclu, Enclv, SgxFeature, Status
from softsgx.hw.events import LeafDone
from softsgx.hw.faults import Fault, VmExit
from softsgx.hw.leaves.eaccept import eaccept
from softsgx.hw.leaves.eacceptcopy import eacceptcopy
from softsgx.hw.leaves.eadd import eadd
from softsgx.hw.leaves.eaug import eaug
from softsgx.hw.leaves.eblock import eblock
from softsgx.hw.leaves.ecreate import ecreate
from softsgx.hw.leaves.edbgrd import edbgrd
from softsgx.hw.leaves.edbgwr import edbgwr
from softsgx.hw.leaves.edeccssa import edeccssa
from softsgx.hw.leaves.eenter import eenter
from softsgx.hw.leaves.eexit import eexit
from softsgx.hw.leaves.eextend import eextend
from softsgx.hw.leaves.egetkey import egetkey
from softsgx.hw.leaves.einit import einit
from softsgx.hw.leaves.eld import eldb, eldbc, eldu, elduc
from softsgx.hw.leaves.emodpe import emodpe
from softsgx.hw.leaves.emodpr import emodpr
from softsgx.hw.leaves.emodt import emodt
from softsgx.hw.leaves.epa import epa
from softsgx.hw.leaves.erdinfo import erdinfo
from softsgx.hw.leaves.eremove import eremove
from softsgx.hw.leaves.ereport import ereport
from softsgx.hw.leaves.eresume import eresume
from softsgx.hw.leaves.esetcontext import esetcontext
from softsgx.hw.leaves.etrack import etrack, etrackc
from softsgx.hw.leaves.eupdatesvn import eupdatesvn
from softsgx.hw.leaves.everifyreport2 import everifyreport2
from softsgx.hw.leaves.ewb import ewb
from softsgx.hw.leaves.virtchild import edecvirtchild, eincvirtchild
from softsgx.hw.processor import LogicalProcessor
from softsgx.ondemand import dataclass
from softsgx.trace import Tracer

__all__ = ["ENCLS", "ENCLU", "ENCLV", "Leaf", "OptimisedLeaves", "eid_inside", "eid_of", "traced"]

_Function: TypeAlias = Callable[..., Any]
_Number: TypeAlias = Encls | Enclu | Enclv


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf.

    Attributes:
        number: its number, a member of its instruction's enumeration.
        function: the readable implementation; the processor is its first parameter, the others
            have the names of the registers that hold them.
        needs: the feature of CPUID.12H.0:EAX that brings it.
        registers: the names of its operands' registers, in the function's order.
        page: which of them holds the EPC page or TCS that its event names; ``None`` without one.
    """

    number: _Number
    function: _Function
    needs: int
    registers: tuple[str, ...]
    page: int | None

    @property
    def name(self) -> str:
        """The name in lower case, as events and attributes have it: ``ewb``."""
        return self.number.name.lower()


class OptimisedLeaves(Protocol):
    """Second implementations of leaves, for a machine whose leaves do not interleave.

    Each falls back to the readable leaf, and changes no state then, in cases that it does not
    handle.
    """

    def kernel(self, cpu: LogicalProcessor) -> Mapping[str, _Function]:
        """Return ENCLS leaves by name, bound to a processor that has the direct map."""

    def user(self, cpu: LogicalProcessor, leaves: Any) -> Mapping[str, _Function]:
        """Return ENCLU leaves by name, bound to a processor; ``leaves`` has the readable ones."""


def traced(
    leaf: Leaf,
    function: _Function,
    tracer: Tracer,
    eid: Callable[[LogicalProcessor, int], int],
) -> _Function:
    """Return ``function`` with a :class:`LeafDone` at its end, also when it raises.

    Args:
        leaf: the leaf that ``function`` carries out.
        function: takes the processor and the operands.
        tracer: receives the event.
        eid: returns the identifier of the enclave from the processor and the leaf's page, 0 where
            none is known; called before the leaf and, if that gives 0, after it.
    """
    name, place = leaf.name, leaf.page
    register = None if place is None else leaf.registers[place]

    def run(cpu: LogicalProcessor, *operands: Any, **named: Any) -> Any:
        operand: Any = 0
        if place is not None:
            operand = operands[place] if place < len(operands) else named.get(str(register))
        page = operand if isinstance(operand, int) else 0
        before, text = eid(cpu, page), "aborted"
        try:
            result = function(cpu, *operands, **named)
            status = result[0] if isinstance(result, tuple) else result  # EDBGRD has data, too
            text = (status if isinstance(status, Status) else Status.SUCCESS).manual_name
        except (Fault, VmExit) as fault:
            text = str(fault)
            raise
        finally:
            tracer(LeafDone(name, cpu.index, page, before or eid(cpu, page), text))
        return result

    run.__name__, run.__doc__ = name, leaf.function.__doc__
    return run


def eid_of(cpu: LogicalProcessor, page: int) -> int:
    """Return the identifier of the enclave that an EPC page belongs to, 0 without one."""
    found = cpu.hw.pages.get(page & ~0xFFF)
    if found is None or not found.valid or (found.secs is None and found.enclave is None):
        return 0
    return found.owner.eid


def eid_inside(cpu: LogicalProcessor, page: int) -> int:
    """Return the identifier of the enclave that the processor is in, 0 outside."""
    return 0 if cpu.inside is None else cpu.inside.enclave.eid


def _registers(function: _Function) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[1 : code.co_argcount]


def _kernel(number: Encls | Enclv, function: _Function, needs: SgxFeature) -> Leaf:
    registers = _registers(function)
    page = registers.index("rcx") if "rcx" in registers else 0 if registers else None
    return Leaf(number, function, int(needs), registers, page)


def _user(number: Enclu, function: _Function, needs: SgxFeature, page: str | None = None) -> Leaf:
    registers = _registers(function)
    return Leaf(
        number, function, int(needs), registers, None if page is None else registers.index(page)
    )


def _by_number(*leaves: Leaf) -> Mapping[int, Leaf]:
    numbers = {int(leaf.number): leaf for leaf in leaves}
    assert len(numbers) == len(leaves), "two leaves have one number"
    for leaf in leaves:
        assert leaf.function.__name__ == leaf.name, f"{leaf.number!r} is {leaf.function.__name__}"
    return numbers


_SGX1, _SGX2, _ENCLV = SgxFeature.SGX1, SgxFeature.SGX2, SgxFeature.ENCLV
_OVERSUBSCRIPTION = SgxFeature.OVERSUB_ENCLS

# A table for each instruction: members of different enumerations are equal when their numbers are.
ENCLS: Mapping[int, Leaf] = _by_number(
    _kernel(Encls.ECREATE, ecreate, _SGX1),
    _kernel(Encls.EADD, eadd, _SGX1),
    _kernel(Encls.EEXTEND, eextend, _SGX1),
    _kernel(Encls.EINIT, einit, _SGX1),
    _kernel(Encls.EPA, epa, _SGX1),
    _kernel(Encls.EBLOCK, eblock, _SGX1),
    _kernel(Encls.ETRACK, etrack, _SGX1),
    _kernel(Encls.ETRACKC, etrackc, _OVERSUBSCRIPTION),
    _kernel(Encls.EWB, ewb, _SGX1),
    _kernel(Encls.ELDB, eldb, _SGX1),
    _kernel(Encls.ELDU, eldu, _SGX1),
    _kernel(Encls.ELDBC, eldbc, _OVERSUBSCRIPTION),
    _kernel(Encls.ELDUC, elduc, _OVERSUBSCRIPTION),
    _kernel(Encls.EREMOVE, eremove, _SGX1),
    _kernel(Encls.ERDINFO, erdinfo, _OVERSUBSCRIPTION),
    _kernel(Encls.EAUG, eaug, _SGX2),
    _kernel(Encls.EMODPR, emodpr, _SGX2),
    _kernel(Encls.EMODT, emodt, _SGX2),
    _kernel(Encls.EDBGRD, edbgrd, _SGX1),
    _kernel(Encls.EDBGWR, edbgwr, _SGX1),
    _kernel(Encls.EUPDATESVN, eupdatesvn, SgxFeature.EUPDATESVN),
)
"""Leaves of ENCLS by number."""

ENCLV: Mapping[int, Leaf] = _by_number(
    _kernel(Enclv.EDECVIRTCHILD, edecvirtchild, _ENCLV),
    _kernel(Enclv.EINCVIRTCHILD, eincvirtchild, _ENCLV),
    _kernel(Enclv.ESETCONTEXT, esetcontext, _ENCLV),
)
"""Leaves of ENCLV by number."""

ENCLU: Mapping[int, Leaf] = _by_number(
    _user(Enclu.EREPORT, ereport, _SGX1),
    _user(Enclu.EGETKEY, egetkey, _SGX1),
    _user(Enclu.EENTER, eenter, _SGX1, "rbx"),
    _user(Enclu.ERESUME, eresume, _SGX1, "rbx"),
    _user(Enclu.EEXIT, eexit, _SGX1),
    _user(Enclu.EACCEPT, eaccept, _SGX2, "rcx"),
    _user(Enclu.EMODPE, emodpe, _SGX2, "rcx"),
    _user(Enclu.EACCEPTCOPY, eacceptcopy, _SGX2, "rcx"),
    _user(Enclu.EVERIFYREPORT2, everifyreport2, SgxFeature.EVERIFYREPORT2),
    _user(Enclu.EDECCSSA, edeccssa, SgxFeature.EDECCSSA),
)
"""Leaves of ENCLU by number."""
