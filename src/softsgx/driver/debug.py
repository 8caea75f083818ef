"""Access from outside to a debug enclave's memory: ptrace, /proc/PID/mem.

Source:
    sgx_vma_access(), encl.c.
"""

from __future__ import annotations

from errno import EFAULT, EIO
from typing import TYPE_CHECKING

from softsgx.arch import Status, page_of
from softsgx.driver.fault import PageBusy, load, wait_while_busy
from softsgx.driver.uapi import refuse
from softsgx.hw import Fault
from softsgx.paging import BackingError, EpcBusy, LoadFailed, NoEpc, SgxEpcPage

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave
    from softsgx.driver.mm import Mm
    from softsgx.driver.task import Task

__all__ = ["peek", "poke"]

_WORD = 8


def peek(mm: Mm, addr: int, size: int, task: Task | None = None) -> bytes:
    """Return up to ``size`` bytes of a debug enclave; fewer where it ends or a leaf refuses.

    Args:
        mm: the address space that maps it.
        addr: the first byte.
        size: bytes.
        task: its group is charged for pages that must be loaded.

    Raises:
        OSError: nothing could be read.  EFAULT: no debug enclave is mapped there, or it has no
            such page; EIO: the processor refused.
    """
    data = b""
    try:
        while len(data) < size:
            at = addr + len(data)
            word = _word(mm, at, None, task)
            data += word[at % _WORD :][: size - len(data)]
    except OSError:
        if not data:
            raise
    return data


def poke(mm: Mm, addr: int, data: bytes, task: Task | None = None) -> int:
    """Write ``data`` to a debug enclave; return how many bytes were written.

    Raises:
        OSError: as for :func:`peek`, when no byte was written.
    """
    done = 0
    try:
        while done < len(data):
            at = addr + done
            part = data[done : done + _WORD - at % _WORD]
            _word(mm, at, part, task)
            done += len(part)
    except OSError:
        if not done:
            raise
    return done


def _word(mm: Mm, addr: int, part: bytes | None, task: Task | None) -> bytes:
    """Read the 8 bytes that hold ``addr``; replace some of them when ``part`` is given."""
    while True:
        with mm.mmap_lock.reading():
            vma = mm.find(addr)
            enclave = None if vma is None else vma.enclave
            if enclave is None or not enclave.debug:
                refuse(EFAULT, f"no debug enclave is mapped at {addr:#x}")
            assert vma is not None
            try:
                with enclave.lock:
                    epc = _page(enclave, addr, vma.prot, task)
                    return _access(enclave, epc, addr, part)
            except PageBusy as error:
                wait, busy = wait_while_busy, error.page
            except EpcBusy as error:
                epc_busy = error
                busy = None
        if busy is not None:
            wait(busy)
        else:
            enclave.driver.core.wait_for_page(epc_busy)


def _page(enclave: Enclave, addr: int, prot: int, task: Task | None) -> SgxEpcPage:
    page = enclave.pages.get(enclave.index_of(addr))
    if page is None or enclave.dead or prot & ~page.max_prot:
        refuse(EFAULT, f"the enclave has no page at {page_of(addr):#x}")
    try:
        return load(page, task)
    except (NoEpc, LoadFailed, BackingError) as error:
        refuse(EFAULT, str(error))


def _access(enclave: Enclave, epc: SgxEpcPage, addr: int, part: bytes | None) -> bytes:
    leaves = enclave.driver.core.leaves
    start = addr % _WORD
    word = epc.addr + addr % 4096 - start
    try:
        status, value = leaves.edbgrd(word)
        if status is Status.SUCCESS and part is not None:
            old = value.to_bytes(_WORD, "little")
            new = old[:start] + part + old[start + len(part) :]
            status = leaves.edbgwr(int.from_bytes(new, "little"), word)
    except Fault as fault:
        refuse(EIO, str(fault))
    if status is not Status.SUCCESS:
        refuse(EIO, status.manual_name)
    return value.to_bytes(_WORD, "little")
