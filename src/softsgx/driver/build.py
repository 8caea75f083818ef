"""The ioctls that build an enclave: CREATE, ADD_PAGES, INIT, PROVISION.

Each takes the enclave, the calling task and the address of its structure, and returns the number of
bytes processed.  They raise ``OSError``, ``BadAddress`` and exceptions of the core; :mod:`.file`
converts the latter two into errno values.

Source:
    arch/x86/kernel/cpu/sgx/ioctl.c.
"""

from __future__ import annotations

from errno import EACCES, EBUSY, EFAULT, EINTR, EINVAL, EIO, ENOMEM, EPERM
from hashlib import sha256
from struct import unpack
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from softsgx.arch import (
    PAGE_BYTES,
    PAGE_SHIFT,
    VENDOR_INTEL,
    AttributesFlags,
    EinitToken,
    PageType,
    SecInfo,
    SecInfoFlags,
    Secs,
    SigStruct,
    Status,
)
from softsgx.defects import Defect
from softsgx.driver.events import EnclaveCreated, EnclaveInitialized
from softsgx.driver.page import LABELS, EnclavePage
from softsgx.driver.task import Task
from softsgx.driver.uapi import (
    ERESTARTSYS,
    PROT_READ,
    PROT_WRITE,
    AddPages,
    AddPagesFlags,
    Create,
    Init,
    LeafRefused,
    Provision,
    refuse,
)
from softsgx.hw import Fault, PageInfoArgs
from softsgx.layout import Structure
from softsgx.paging import BackingError, EnclaveSwap, Interrupted, LoadFailed, SgxEpcPage

if TYPE_CHECKING:
    from softsgx.driver.enclave import Enclave

__all__ = ["add_pages", "check_range", "copy_in", "copy_out", "create", "init", "provision"]

EINIT_SPIN_COUNT, EINIT_SLEEP_COUNT, EINIT_SLEEP_NS = 20, 50, 20_000_000
_U64 = 1 << 64
_SECINFO_LEGAL = int(SecInfoFlags.RWX | SecInfoFlags.TYPE_MASK)

S = TypeVar("S", bound=Structure)


class _LaunchControl(Protocol):
    """A machine whose launch key hash can be written: SGX_LC."""

    launch_key_hash: list[int]


def copy_in(task: Task, kind: type[S], address: int) -> S:
    """Return a structure from the task's memory.

    Raises:
        BadAddress: the address is not readable.
    """
    return kind.unpack(task.memory.read(address, kind.SIZE))


def copy_out(task: Task, address: int, value: Structure) -> None:
    """Store a structure into the task's memory.

    Raises:
        BadAddress: the address is not writable.
    """
    task.memory.write(address, value.pack())


def check_range(enclave: Enclave, offset: int, length: int) -> None:
    """Check the range of pages of an ioctl.

    Raises:
        OSError: EINVAL: not page aligned, empty, or not all in the enclave.
    """
    end = offset + length
    if Defect.PAGE_RANGE_OVERFLOW in enclave.driver.defects:
        end %= _U64
    if offset % PAGE_BYTES or length % PAGE_BYTES or not length or end > enclave.size:
        refuse(EINVAL, f"{length:#x} bytes at offset {offset:#x}")


# --- CREATE ---------------------------------------------------------------------------------------


def create(enclave: Enclave, task: Task, arg: int) -> int:
    """SGX_IOC_ENCLAVE_CREATE."""
    if enclave.created:
        refuse(EINVAL, "the enclave is created already")
    args = copy_in(task, Create, arg)
    image = task.memory.read(args.src, Secs.SIZE)
    secs = Secs.unpack(image)
    if secs.size <= 0 or secs.size & (secs.size - 1):
        refuse(EINVAL, f"enclave size {secs.size:#x} is no power of two")

    driver = enclave.driver
    group, node = driver.group_and_node(task)
    pages = secs.size >> PAGE_SHIFT
    try:
        backing = driver.backing(pages)
    except BackingError as error:
        refuse(ENOMEM, str(error))
    swap = driver.swap_type(backing)(
        driver.core,
        backing,
        pages=pages,
        base=secs.base,
        lock=enclave.lock,
        pin=enclave,
        kick=enclave.kick,
        group=group,
    )
    created = False
    try:
        swap.grow(cpu_node=node, signal_pending=task.signal_pending)
        _ecreate(enclave, task, swap, image)
        created = True
    except LoadFailed as error:
        refuse(EFAULT, f"VA page: {error}")
    finally:
        if not created:
            with enclave.lock:
                swap.destroy()

    enclave.create(swap, secs, group, driver.new_number())
    if Defect.ALLOWED_ATTRIBUTES_RESET_BY_CREATE in driver.defects:
        enclave.allowed = driver.unprivileged
    driver.trace_lifecycle(EnclaveCreated(enclave.number, secs.base, secs.size, enclave.attributes))
    return 0


def _ecreate(enclave: Enclave, task: Task, swap: EnclaveSwap, image: bytes) -> None:
    """Execute ECREATE; a failure is undone completely."""
    driver = enclave.driver
    group, node = driver.group_and_node(task)
    epc = driver.core.alloc(
        None,
        reclaim=True,
        group=group,
        kind="secs",
        cpu_node=node,
        signal_pending=task.signal_pending,
    )
    try:
        driver.core.leaves.ecreate(PageInfoArgs(0, image, SecInfo.of(PageType.SECS), 0), epc.addr)
    except Fault as fault:
        if Defect.SECS_LEAKED_BY_FAILED_ECREATE not in driver.defects:
            driver.core.remove(epc)
        raise LeafRefused(EIO, "ECREATE", fault) from None
    with enclave.lock:
        swap.set_secs(epc)


# --- ADD_PAGES ------------------------------------------------------------------------------------


def add_pages(enclave: Enclave, task: Task, arg: int) -> int:
    """SGX_IOC_ENCLAVE_ADD_PAGES; returns the bytes added."""
    if not enclave.created or enclave.initialized:
        refuse(EINVAL, "the enclave is not being built")
    args = copy_in(task, AddPages, arg)
    if args.src % PAGE_BYTES:
        refuse(EINVAL, f"source {args.src:#x}")
    if args.length or Defect.EMPTY_ADD_PAGES_ACCEPTED not in enclave.driver.defects:
        check_range(enclave, args.offset, args.length)
    secinfo = copy_in(task, SecInfo, args.secinfo)
    _check_secinfo(secinfo)

    args.count = 0
    source = _Source(task, args.src, args.src + args.length)
    template = _Template(secinfo, measure=bool(args.flags & AddPagesFlags.MEASURE))
    try:
        while args.count < args.length:
            if not source.read_ahead and task.signal_pending():
                if not args.count:
                    refuse(_interrupted(enclave))
                break
            _add_page(enclave, task, (args.offset + args.count) >> PAGE_SHIFT, template, source)
            args.count += PAGE_BYTES
    except Interrupted:
        # Deviation: Linux returns ERESTARTSYS here even after some pages were added, so that the
        # restarted call fails with EBUSY at its first page.
        if not args.count:
            refuse(_interrupted(enclave))
    finally:
        copy_out(task, arg, args)
    return args.count


class _Template:
    """The properties that all pages of one ADD_PAGES share.

    Attributes:
        secinfo: the caller's.
        kind: the page type.
        max_prot: the PROT_* rights that a mapping may have at most.
        measure: whether the content is measured.
    """

    def __init__(self, secinfo: SecInfo, *, measure: bool) -> None:
        self.secinfo, self.measure = secinfo, measure
        self.kind = PageType(secinfo.page_type)
        self.max_prot = PROT_READ | PROT_WRITE
        if self.kind is PageType.REG:
            self.max_prot = secinfo.flags & int(SecInfoFlags.RWX)


class _Source:
    """The memory that ADD_PAGES copies, page by page.

    Deviation: several pages are read at once, as many as the caller's memory returns, and signals
    are checked before each such read; Linux does both for each page.

    Args:
        task: the caller.
        start: the first page.
        end: behind the last.

    Attributes:
        read_ahead: pages that were read and not taken yet, the next one last.
    """

    def __init__(self, task: Task, start: int, end: int) -> None:
        self._task, self._next, self._end = task, start, end
        self._vma_end = start  # up to where the mapping is known to be a legal source
        self.read_ahead: list[bytes] = []

    def take(self) -> bytes:
        """Return the next page.

        Raises:
            OSError: EFAULT: nothing is mapped there; EACCES: it is from a noexec mount.
            BadAddress: it cannot be read.
        """
        at = self._next
        if not self.read_ahead:
            if at >= self._vma_end:
                self._vma_end = self._find_vma(at)
            pages = (min(self._vma_end, self._end) - at) >> PAGE_SHIFT
            self.read_ahead = self._task.memory.read_pages(at, pages)
            self.read_ahead.reverse()
        self._next = at + PAGE_BYTES
        return self.read_ahead.pop()

    def _find_vma(self, address: int) -> int:
        vma = self._task.memory.vma_info(address)
        if vma is None:
            refuse(EFAULT, f"nothing is mapped at {address:#x}")
        if not vma.may_exec:
            refuse(EACCES, f"{address:#x} is mapped from a noexec mount")
        return vma.end


def _interrupted(enclave: Enclave) -> int:
    # With either defect the errno does not restart the call.
    not_restarted = {Defect.CREATE_NOT_RESTARTED, Defect.EMPTY_ADD_PAGES_ACCEPTED}
    return EINTR if enclave.driver.defects & not_restarted else ERESTARTSYS


def _check_secinfo(secinfo: SecInfo) -> None:
    rights = secinfo.flags & SecInfoFlags.RWX
    match secinfo.page_type:
        case PageType.REG:
            legal = not (rights & SecInfoFlags.W and not rights & SecInfoFlags.R)
        case PageType.TCS:
            legal = not rights
        case _:
            legal = False
    if not legal or secinfo.flags & ~_SECINFO_LEGAL or any(secinfo.reserved):
        refuse(EINVAL, f"SECINFO flags {secinfo.flags:#x}")


def _add_page(
    enclave: Enclave, task: Task, index: int, template: _Template, source: _Source
) -> None:
    """Add one page; a failure is undone, except for the measurement."""
    driver, core, swap = enclave.driver, enclave.driver.core, enclave.swap
    page = driver.page_type(enclave, index, template.max_prot, template.kind)
    group, node = driver.group_and_node(task)
    epc = core.alloc(
        page,
        reclaim=True,
        group=group,
        kind=LABELS[template.kind],
        cpu_node=node,
        signal_pending=task.signal_pending,
    )
    grown = added = False
    try:
        swap.grow(cpu_node=node, signal_pending=task.signal_pending)
        grown = True
        with task.mm.mmap_lock.reading(), enclave.lock:
            if enclave.dead:
                refuse(EFAULT, "the enclave was killed")
            if index in enclave.pages:
                refuse(EBUSY, f"page {index:#x} is added already")
            _eadd(enclave, page, epc, template, source.take())
            added = True
    except LoadFailed as error:
        refuse(EFAULT, f"VA page: {error}")
    finally:
        if not added:
            with enclave.lock:
                core.remove(epc)
                if grown:
                    swap.shrink()


def _eadd(
    enclave: Enclave, page: EnclavePage, epc: SgxEpcPage, template: _Template, data: bytes
) -> None:
    """EADD, and EEXTEND every chunk; the lock is held."""
    driver, swap = enclave.driver, enclave.swap
    leaves = driver.core.leaves
    assert swap.secs is not None, "the SECS of an enclave being built never leaves"
    secs = swap.secs.addr
    try:
        leaves.eadd(PageInfoArgs(page.linaddr, data, template.secinfo, secs), epc.addr)
    except Fault as fault:
        raise LeafRefused(EIO, "EADD", fault) from None
    swap.child_added()
    try:
        if template.measure:
            leaves.eextend_page(secs, epc.addr)
    except Fault as fault:
        if Defect.CHILD_COUNTED_AFTER_FAILED_EEXTEND not in driver.defects:
            swap.child_removed()
        raise LeafRefused(EIO, "EEXTEND", fault) from None
    page.epc = epc
    enclave.pages[page.index] = page
    driver.core.mark_reclaimable(epc)


# --- INIT -----------------------------------------------------------------------------------------


def init(enclave: Enclave, task: Task, arg: int) -> int:
    """SGX_IOC_ENCLAVE_INIT."""
    if not enclave.created or enclave.initialized:
        refuse(EINVAL, "the enclave is not being built")
    args = copy_in(task, Init, arg)
    sigstruct = copy_in(task, SigStruct, args.sigstruct)
    if sigstruct.vendor not in (0, VENDOR_INTEL):
        refuse(EINVAL, f"vendor {sigstruct.vendor:#x}")
    _check_attributes(enclave, sigstruct)
    status = _einit(enclave, task, sigstruct)
    if status is not Status.SUCCESS:
        raise LeafRefused(EPERM, "EINIT", status)
    return 0


def _check_attributes(enclave: Enclave, sigstruct: SigStruct) -> None:
    forbidden = enclave.attributes & ~enclave.allowed
    if forbidden:
        refuse(EACCES, f"attributes {forbidden:#x} need a permission")
    config = enclave.driver.core.hw.config
    wants = (
        (sigstruct.attributes.flags & sigstruct.attribute_mask.flags, int(config.attributes)),
        (sigstruct.attributes.xfrm & sigstruct.attribute_mask.xfrm, config.xfrm),
        (sigstruct.miscselect & sigstruct.misc_mask, int(config.miscselect)),
    )
    for wanted, supported in wants:
        if wanted & ~supported:
            refuse(EINVAL, f"SIGSTRUCT wants {wanted:#x}, the machine has {supported:#x}")


def _einit(enclave: Enclave, task: Task, sigstruct: SigStruct) -> Status:
    driver, swap = enclave.driver, enclave.swap
    token = driver.tokens.get(sigstruct.enclave_hash, EinitToken())
    with enclave.lock:
        if enclave.dead:
            refuse(EFAULT, "the enclave was killed")
        assert swap.secs is not None, "the SECS of an enclave being built never leaves"
        for _sleep in range(EINIT_SLEEP_COUNT):
            for _spin in range(EINIT_SPIN_COUNT):
                status = _einit_once(enclave, sigstruct, swap.secs.addr, token)
                if status is not Status.UNMASKED_EVENT:
                    break
            if status is not Status.UNMASKED_EVENT:
                break
            driver.runtime.sleep(EINIT_SLEEP_NS)
            if task.signal_pending():
                refuse(_interrupted(enclave))
        if status is Status.SUCCESS:
            enclave.initialized = True
            swap.secs_may_leave = True
            driver.trace_lifecycle(EnclaveInitialized(enclave.number, len(enclave.pages)))
    return status


def _einit_once(enclave: Enclave, sigstruct: SigStruct, secs: int, token: EinitToken) -> Status:
    """Write the launch key hash, which another task may have changed, and execute EINIT."""
    driver = enclave.driver
    with driver.launch_lock:
        if driver.launch_control:
            digest = sha256(sigstruct.modulus).digest()
            machine = cast(_LaunchControl, driver.core.hw)
            machine.launch_key_hash[:] = unpack("<4Q", digest)
        try:
            return driver.core.leaves.einit(sigstruct, secs, token)
        except Fault as fault:
            raise LeafRefused(EIO, "EINIT", fault) from None


# --- PROVISION ------------------------------------------------------------------------------------


def provision(enclave: Enclave, task: Task, arg: int) -> int:
    """SGX_IOC_ENCLAVE_PROVISION."""
    args = copy_in(task, Provision, arg)
    if not enclave.driver.is_provision(task.file(args.fd)):
        refuse(EINVAL, f"descriptor {args.fd} is not /dev/sgx_provision")
    enclave.allowed |= AttributesFlags.PROVISIONKEY.value
    return 0
