"""ENCLS, ENCLV and ENCLU leaves, one file each; here the ones that operating systems use.

Source:
    SDM vol. 3D, "SGX Instruction References".
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from softsgx.arch import PAGE_BYTES, SecInfo, Status
from softsgx.hw.leaves.late import LateLeaves
from softsgx.hw.operands import Buffer, PageInfoArgs, Ref, Sealed
from softsgx.hw.processor import LogicalProcessor
from softsgx.trace import Tracer

if TYPE_CHECKING:
    from softsgx.arch import EinitToken, RdInfo, SigStruct
    from softsgx.hw.leaves.registry import Leaf, OptimisedLeaves

__all__ = ["Leaves"]


class Leaves(LateLeaves):
    """Leaves as typed functions, bound to one logical processor in kernel mode.

    EPC operands are linear addresses (with the default address space: physical ones); operands in
    ordinary memory may be given as objects.  Each attribute is the leaf's own function, whose
    docstring says what it takes, returns and raises.

    ``eextend_page`` is EEXTEND of each chunk of a page, lowest first; it ends with the first that
    faults.  ``try_ewb`` and ``try_eldu`` are EWB and ELDU of a child page without buffers between
    hardware and backing: slot and EPC page as of the leaf, ciphertext ‖ MAC as one object.  They do
    the case that succeeds, and of EWB the one that returns NOT_TRACKED.  Otherwise they return
    ``None`` or ``False``, as they always do without ``optimised``; nothing has changed then, and
    the leaf itself gives the reason.  ``eblock_pages`` and ``ewb_pages`` do the same for pages in
    turn, and end before the first page whose EBLOCK or EWB would not succeed at once; without
    ``optimised`` that is the first one.  They return the number of pages that were blocked, and
    what EWB has made of each page.

    Args:
        cpu: the processor; with ``optimised``, one that has the direct map.
        tracer: receives an event at the end of each leaf.
        optimised: second implementations, used where there is no tracer.
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
    eextend_page: Callable[[int, int], None]
    try_ewb: Callable[[int, int], Sealed | Status | None]
    try_eldu: Callable[[int, int, Buffer, int, int, int], bool]
    eblock_pages: Callable[[list[int]], int]
    ewb_pages: Callable[[list[int], list[int]], list[Sealed]]

    def __init__(
        self,
        cpu: LogicalProcessor,
        *,
        tracer: Tracer | None = None,
        optimised: OptimisedLeaves | None = None,
    ) -> None:
        self._cpu, self._tracer = cpu, tracer
        self._optimised = optimised if tracer is None else None

    def _bind(self) -> None:
        from softsgx.hw.leaves.registry import ENCLS, ENCLV, traced

        cpu, tracer = self._cpu, self._tracer
        fast = {} if self._optimised is None else self._optimised.kernel(cpu)
        for leaf in (*ENCLS.values(), *ENCLV.values()):
            function = self._function(leaf)
            if tracer is not None:
                function = traced(leaf, function, tracer, self._eid_of)
            setattr(self, leaf.name, fast.get(leaf.name) or MethodType(function, cpu))
        self.eextend_page = fast.get("eextend_page") or self._eextend_page
        self.try_ewb = fast.get("try_ewb") or _try_no_ewb
        self.try_eldu = fast.get("try_eldu") or _try_no_eldu
        self.eblock_pages = fast.get("eblock_pages") or _block_no_page
        self.ewb_pages = fast.get("ewb_pages") or _evict_no_page

    def _function(self, leaf: Leaf) -> Callable[..., Any]:
        """Return what executes a leaf here; the processor is its first parameter."""
        return leaf.function

    def _eid_of(self, cpu: LogicalProcessor, page: int) -> int:
        """Return the enclave identifier that a leaf's event names."""
        from softsgx.hw.leaves.registry import eid_of

        return eid_of(cpu, page)

    def _eextend_page(self, secs: int, page: int) -> None:
        from softsgx.arch import CHUNK_BYTES

        for chunk in range(page, page + PAGE_BYTES, CHUNK_BYTES):
            self.eextend(secs, chunk)


def _try_no_ewb(_page: int, _slot: int) -> None:
    """As ``try_ewb``, never plain."""


def _try_no_eldu(
    _linaddr: int, _secs: int, _sealed: Buffer, _flags: int, _page: int, _slot: int
) -> bool:
    """As ``try_eldu``, never plain."""
    return False


def _block_no_page(_pages: list[int]) -> int:
    """As ``eblock_pages``, never plain."""
    return 0


def _evict_no_page(_pages: list[int], _slots: list[int]) -> list[Sealed]:
    """As ``ewb_pages``, never plain."""
    return []
