"""A second implementation of what the reclaimer asks of a page of an enclave.

Each method handles the common case: no task holds a lock that the method needs, and the enclave is
alive.  It does in one function what the readable one does in many, in the same order, and falls
back to it otherwise; then no state has changed.  It is for runtimes that do not interleave tasks:
a lock that is free stays free, since none of the methods waits.  Neither tracer nor defects are
looked at, so a driver that has them uses the readable methods.  ``tests/differential`` runs both
on the same histories.
"""

from __future__ import annotations

from softsgx.arch import PAGE_SHIFT, Status
from softsgx.driver.page import EnclavePage
from softsgx.hw import Fault

__all__ = ["PlainPage"]

_SUCCESS = Status.SUCCESS


class PlainPage(EnclavePage):
    """See the module."""

    __slots__ = ()

    def get(self) -> bool:
        """As :meth:`EnclavePage.get`."""
        enclave = self.enclave
        if enclave.references:
            enclave.references += 1
            return True
        return False

    def put(self) -> None:
        """As :meth:`EnclavePage.put`."""
        enclave = self.enclave
        if enclave.references > 1:
            enclave.references -= 1
        else:
            enclave.put()

    def age(self) -> bool:
        """As :meth:`EnclavePage.age`."""
        enclave = self.enclave
        if enclave.dead:
            return True
        linaddr = enclave.base + (self.index << PAGE_SHIFT)
        young = False
        for entry in enclave.mms:
            mm = entry.mm
            if mm.mmap_lock.has_writer:
                return super().age() and not young
            if not mm.users:
                continue
            vma = mm.found
            if vma is None or not vma.start <= linaddr < vma.end:
                vma = mm.find(linaddr)
            if vma is not None and vma.enclave is enclave:
                young |= mm.ptes.test_and_clear_accessed(linaddr)
        return not young

    def block(self) -> bool:
        """As :meth:`EnclavePage.block`."""
        enclave, epc = self.enclave, self.epc
        if enclave.dead or enclave.lock.held() or epc is None:
            return super().block()
        linaddr = enclave.base + (self.index << PAGE_SHIFT)
        for entry in enclave.mms:
            mm = entry.mm
            if mm.mmap_lock.has_writer:
                return super().block()
            if not mm.users:
                continue
            vma = mm.found
            if vma is None or not vma.start <= linaddr < vma.end:
                vma = mm.find(linaddr)
            if vma is not None and vma.enclave is enclave:
                mm.ptes.zap(linaddr)
        eblock = enclave.driver.core.leaves.eblock
        try:
            status = eblock(epc.addr)
        except Fault:
            return super().block()  # EBLOCK again, which has changed nothing
        if status is not _SUCCESS:
            return super().block()
        epc.blocked = True
        return True
