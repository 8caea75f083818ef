"""Loading an enclave file into a simulated process, and inspecting the enclave.

The loader makes the system calls of an untrusted runtime: open, CREATE, ADD_PAGES, INIT,
mmap.  It runs no code of the enclave; a :class:`~softsgx.userland.SoftThread` enters it.

Source:
    tools/testing/selftests/sgx/load.c for the order of calls; SDM vol. 3D, "EINIT".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from softsgx.arch import (
    PAGE_BYTES,
    AttributesFlags,
    PageType,
    SecInfoFlags,
    Secs,
    SigStruct,
    Status,
)
from softsgx.driver import PROT_EXEC, PROT_READ, PROT_WRITE, LeafRefused, peek, poke
from softsgx.errors import SoftSgxError
from softsgx.image import (
    MASK_ALL,
    MASK_NONE,
    EnclaveImage,
    Plan,
    Run,
    SecsLimits,
    SignOptions,
    choose_secs,
    measure,
    mrsigner,
    new_key,
    open_image,
    sign,
    unsigned_sigstruct,
    verify,
)

if TYPE_CHECKING:
    from softsgx.driver import Enclave
    from softsgx.userland.process import SoftProcess

__all__ = ["EnclaveLoadError", "LoadedEnclave", "PageState", "Residency", "load_enclave"]

_BATCH_PAGES = 256  # of one ADD_PAGES: its source is a copy, freed after the call
_REASONS = {
    Status.INVALID_EINITTOKEN.manual_name: "the launch key hash is another signer's, and no valid "
    "token permits this enclave",
}
_PROVISIONKEY = AttributesFlags.PROVISIONKEY.value
_EINITTOKENKEY = AttributesFlags.EINITTOKENKEY.value


class EnclaveLoadError(SoftSgxError):
    """A leaf or a system call has refused the enclave.

    Attributes:
        leaf: the leaf's name, or the ioctl's where no leaf has refused: ``EINIT``.
        status: the name of its return code, ``SGX_INVALID_MEASUREMENT``; empty for a fault or an
            errno.
        differences: fields of the SIGSTRUCT that do not fit, one sentence each.
    """

    def __init__(self, text: str, leaf: str, status: str, differences: tuple[str, ...]) -> None:
        super().__init__(text)
        self.leaf, self.status, self.differences = leaf, status, differences


@dataclass(frozen=True, slots=True)
class PageState:
    """One page of a loaded enclave.

    Attributes:
        offset: bytes from the enclave's base.
        kind: its page type.
        rights: R, W and X that it may be mapped with, as PROT_* bits.
        resident: whether it is in the EPC now.
    """

    offset: int
    kind: PageType
    rights: int
    resident: bool


@dataclass(frozen=True, slots=True)
class Residency:
    """How many pages of an enclave are resident and evicted.

    Attributes:
        resident: pages in the EPC.
        evicted: pages in the backing store.
        secs_resident: whether its SECS is in the EPC.
    """

    resident: int
    evicted: int
    secs_resident: bool


class LoadedEnclave:
    """An initialised enclave in a process; a context manager that closes it.

    Attributes:
        process: the process that maps it.
        image: the file that was loaded.
        secs: the SECS it was created with.
        sigstruct: the SIGSTRUCT it was initialised with.
        mrenclave: its measurement, 32 bytes.
        fd: the descriptor of its device file.
    """

    def __init__(
        self,
        process: SoftProcess,
        image: EnclaveImage,
        secs: Secs,
        sigstruct: SigStruct,
        mrenclave: bytes,
        fd: int,
    ) -> None:
        self.process, self.image, self.secs = process, image, secs
        self.sigstruct, self.mrenclave, self.fd = sigstruct, mrenclave, fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<enclave {self.image.name} at {self.base:#x}, MRENCLAVE {self.mrenclave.hex()}>"

    # --- identity -------------------------------------------------------------------------------

    @property
    def base(self) -> int:
        """Its first linear address."""
        return self.secs.base

    @property
    def size(self) -> int:
        """Bytes of its linear range."""
        return self.secs.size

    @property
    def mrsigner(self) -> bytes:
        """The hash of its signer's key, 32 bytes."""
        return mrsigner(self.sigstruct)

    @property
    def debug(self) -> bool:
        """Whether its memory can be read and written from outside (ATTRIBUTES.DEBUG)."""
        return bool(self.secs.attributes.flags & AttributesFlags.DEBUG)

    @property
    def tcs(self) -> tuple[int, ...]:
        """The linear addresses of its threads' TCS pages, in the order of the file."""
        return tuple(self.base + offset for offset in self.image.plan.tcs)

    # --- pages ----------------------------------------------------------------------------------

    @property
    def pages(self) -> Mapping[int, PageState]:
        """Its pages as they are now, by offset, lowest first."""
        enclave = self._enclave
        found = {}
        for index in sorted(enclave.pages):
            page = enclave.pages[index]
            offset = index * PAGE_BYTES
            resident = page.epc is not None
            found[offset] = PageState(offset, page.kind, page.max_prot, resident)
        return found

    def residency(self) -> Residency:
        """Count where its pages are now."""
        enclave = self._enclave
        resident = sum(page.epc is not None for page in enclave.pages.values())
        secs = enclave.swap.secs is not None
        return Residency(resident, len(enclave.pages) - resident, secs)

    def evict(self, offset: int) -> bool:
        """Evict the page at ``offset``, even if it is in use: EBLOCK, ETRACK, IPI, EWB.

        Returns:
            ``False`` when it stays: it is not in the EPC, it is being loaded or evicted, it is
            poisoned, or the backing store has no room.

        Raises:
            SoftSgxError: the enclave has no page there.
        """
        page = self._enclave.pages.get(offset // PAGE_BYTES)
        if page is None or offset % PAGE_BYTES:
            raise SoftSgxError(f"{self.image.name}: no page at offset {offset:#x}; see .pages")
        epc = page.epc
        return epc is not None and self.process.driver.core.evict(epc)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a debug enclave, by EDBGRD.

        Raises:
            SoftSgxError: it is no debug enclave, or not all of the bytes can be read.
        """
        try:
            data = peek(self.process.mm, self.base + offset, size, self.process)
        except OSError as error:
            raise self._no_access(offset, error) from None
        if len(data) < size:
            raise self._no_access(offset + len(data), None)
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes into a debug enclave, by EDBGWR.

        Raises:
            SoftSgxError: it is no debug enclave, or not all of the bytes can be written.
        """
        try:
            done = poke(self.process.mm, self.base + offset, data, self.process)
        except OSError as error:
            raise self._no_access(offset, error) from None
        if done < len(data):
            raise self._no_access(offset + done, None)

    def close(self) -> None:
        """Unmap and close it; its EPC pages are free then."""
        if self.fd >= 0:
            self.process.munmap(self.base, self.size)
            self.process.close(self.fd)
            self.fd = -1

    @property
    def _enclave(self) -> Enclave:
        if self.fd < 0:
            raise SoftSgxError(f"{self.image.name}: the enclave is closed; load it again")
        return self.process.enclave_file(self.fd).enclave

    def _no_access(self, offset: int, error: OSError | None) -> SoftSgxError:
        if not self.debug:
            why = "it is not a debug enclave; load it with debug=True"
        else:
            why = str(error) if error is not None else "not a REG page; see enclave.pages"
        return SoftSgxError(f"{self.image.name}: offset {offset:#x}: {why}")


def load_enclave(
    process: SoftProcess,
    file: str | os.PathLike[str] | EnclaveImage,
    *,
    sigstruct: str | os.PathLike[str] | None = None,
    base: int | None = None,
    debug: bool | None = None,
) -> LoadedEnclave:
    """Create, fill and initialise an enclave, and map its pages.

    Args:
        process: the process that maps it.
        file: an enclave file of any format that ``softsgx.image`` reads, or what it has read.
        sigstruct: a bare SIGSTRUCT to use instead of the file's.  A file that has none anywhere is
            signed with a key that is used once.
        base: its linear address, a multiple of its size; by default a free place.
        debug: whether to set ATTRIBUTES.DEBUG; by default as the SIGSTRUCT has it.

    Raises:
        SoftSgxError: the file cannot be read, or the SIGSTRUCT forbids attributes of this machine.
        EnclaveLoadError: a leaf or a system call refuses it.
    """
    image = file if isinstance(file, EnclaveImage) else open_image(file, sigstruct)
    config = process.driver.core.hw.config
    limits = SecsLimits(int(config.attributes), config.xfrm, int(config.miscselect))
    if base is None and image.plan.base is None:
        base = process.free_range(image.plan.size)
    secs = choose_secs(image, base=base, debug=debug, limits=limits)
    _check_permissions(process, image, secs)
    mrenclave = measure(image.plan)
    signed = image.sigstruct or _throwaway(mrenclave, secs)
    fd = process.open()
    loaded = LoadedEnclave(process, image, secs, signed, mrenclave, fd)
    mapped = False
    try:
        if secs.attributes.flags & _PROVISIONKEY & ~process.driver.unprivileged:
            _provision(process, fd)
        _step(image, "ECREATE", lambda: process.create(fd, secs.pack()))
        for run in image.plan.runs:
            _add(process, image, fd, run)
        _step(
            image,
            "EINIT",
            lambda: process.init(fd, signed.pack()),
            lambda: _differences(signed, mrenclave, secs),
        )
        for start, end, prot in _mappings(image.plan):
            mapped = True
            process.mmap(fd, secs.base + start, end - start, prot)
    except BaseException:
        if mapped:
            process.munmap(secs.base, secs.size)
        process.close(fd)
        raise
    return loaded


def _check_permissions(process: SoftProcess, image: EnclaveImage, secs: Secs) -> None:
    """Raise before any page is added, if INIT would refuse the attributes."""
    flags, allowed = secs.attributes.flags, process.driver.unprivileged
    if flags & _EINITTOKENKEY & ~allowed:
        raise SoftSgxError(
            f"{image.name}: needs EINITTOKENKEY, which Linux gives to no enclave; "
            "launch enclaves are for drivers without flexible launch control"
        )
    if flags & _PROVISIONKEY & ~allowed and not process.may_provision:
        raise SoftSgxError(
            f"{image.name}: needs PROVISIONKEY, and the process may not open "
            "/dev/sgx_provision; allow it (may_provision, --provision)"
        )


def _provision(process: SoftProcess, fd: int) -> None:
    device = process.open_provision()
    try:
        process.provision(fd, device)
    finally:
        process.close(device)


def _throwaway(mrenclave: bytes, secs: Secs) -> SigStruct:
    """Sign for this SECS alone, with a key that is not kept."""
    flags = secs.attributes.flags & ~AttributesFlags.INIT.value
    options = SignOptions(
        attributes=flags, xfrm=secs.attributes.xfrm, miscselect=int(secs.miscselect)
    )
    return sign(unsigned_sigstruct(mrenclave, options), new_key())


def _add(process: SoftProcess, image: EnclaveImage, fd: int, run: Run) -> None:
    """ADD_PAGES for a run, in calls; the source of each is freed after it."""
    if run.mask not in (MASK_ALL, MASK_NONE):
        raise SoftSgxError(
            f"{image.name}: pages at {run.offset:#x} measure some of their chunks; "
            "Linux's driver measures all of a page or none"
        )
    for first in range(0, run.pages, _BATCH_PAGES):
        count = min(_BATCH_PAGES, run.pages - first)
        data = b"".join(run.source.page(first + index) for index in range(count))
        offset = run.offset + first * PAGE_BYTES
        _step(
            image,
            "EADD",
            partial(process.add_pages, fd, offset, data, run.flags, measure=run.mask == MASK_ALL),
        )


def _step(
    image: EnclaveImage,
    leaf: str,
    call: Callable[[], object],
    differences: Callable[[], tuple[str, ...]] = tuple,
) -> None:
    """Make a system call; its error names the leaf, the status and what differs."""
    try:
        call()
    except OSError as error:
        found = differences()
        status = error.status if isinstance(error, LeafRefused) else ""
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        what = f"{image.name}: {leaf}: {status or name}"
        why = "; ".join(found) or _REASONS.get(status) or error.strerror
        raise EnclaveLoadError(f"{what}: {why}", leaf, status, found) from error


def _differences(sigstruct: SigStruct, mrenclave: bytes, secs: Secs) -> tuple[str, ...]:
    checks = verify(sigstruct, mrenclave=mrenclave, secs=secs)
    return tuple(f"{check.name}: {check.detail}" for check in checks if not check.ok)


def _mappings(plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, PROT_*) of mappings for all pages, lowest first, joined where they can."""
    start = end = prot = 0
    for run in sorted(plan.runs, key=lambda run: run.offset):
        rights = _prot(run)
        if run.offset == end and rights == prot and end:
            end = run.end
            continue
        if end:
            yield start, end, prot
        start, end, prot = run.offset, run.end, rights
    if end:
        yield start, end, prot


def _prot(run: Run) -> int:
    if run.is_tcs:
        return PROT_READ | PROT_WRITE
    prot = 0
    for flag, bit in (
        (SecInfoFlags.R, PROT_READ),
        (SecInfoFlags.W, PROT_WRITE),
        (SecInfoFlags.X, PROT_EXEC),
    ):
        prot |= bit if run.flags & flag else 0
    return prot
