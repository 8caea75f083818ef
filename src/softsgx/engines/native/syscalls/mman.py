"""mmap, mprotect, munmap, mremap: the driver decides, the kernel executes, both agree afterwards.

A mapping of an enclave device becomes a shared mapping of its memory file at the offset that equals
the address.  Other mappings are the kernel's; when they replace one of an enclave, the driver
unmaps it first.

Source:
    mmap(2), mprotect(2), munmap(2), mremap(2).
"""

from __future__ import annotations

from errno import EACCES, EFAULT, EINVAL, ENODEV, EPERM
from typing import TYPE_CHECKING

from softsgx.driver import EnclaveFile
from softsgx.engines.native import abi
from softsgx.engines.native.mappings import mappings
from softsgx.engines.native.syscalls.advice import drop_left_behind
from softsgx.engines.native.syscalls.code import NewCode
from softsgx.engines.native.syscalls.registry import Device, Registry
from softsgx.engines.native.tracing.filters import watch_devices
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.ondemand import replace

if TYPE_CHECKING:
    from softsgx.engines.native.memory.foreign import ForeignMapping

__all__ = ["Mappings"]

_NO_FD = (1 << 64) - 1
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4
_MREMAP_FLAGS = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
_RIGHTS = abi.PROT_READ | abi.PROT_WRITE | abi.PROT_EXEC


class Mappings:
    """Handlers of system calls that change mappings: a result, or ``None`` to let the call run.

    Args:
        registry: which descriptors are devices.
        code: replaces CPUID in new code; ``None`` where it traps by itself.
        noexec: whether /dev is to be as if mounted so.
    """

    def __init__(self, registry: Registry, *, code: NewCode | None, noexec: bool = False) -> None:
        self._registry, self._code, self._noexec = registry, code, noexec

    # --- mmap -----------------------------------------------------------------------------------

    def mmap(self, thread: ProgramThread) -> int | None:
        """Do ``mmap`` (address, length, prot, flags, descriptor, offset)."""
        regs = thread.regs
        prot, flags = regs.rdx, regs.r10
        if not flags & abi.MAP_ANONYMOUS:
            device = self._registry.of_descriptor(thread.tid, _int32(regs.r8))
            if device is not None:
                return self._map_device(thread, device)
        private_file = flags & (abi.MAP_TYPE | abi.MAP_ANONYMOUS) == abi.MAP_PRIVATE
        code = self._code if private_file and prot & abi.PROT_EXEC else None
        length, descriptor, offset = regs.rsi, _int32(regs.r8), regs.r9
        displaces = flags & abi.MAP_FIXED and _overlaps(thread, regs.rdi, length)
        if not displaces and (code is None or self._concerns_nothing(thread)):
            return None
        start = regs.rdi
        address = thread.finish_syscall()
        if -4096 < address < 0:
            if displaces:
                self._lost(thread, start, length)
            return address
        if displaces:
            self._displaced(thread, address, length)
        if code is not None:
            code.mapped(thread, address, length, descriptor, offset)
        return address

    def _concerns_nothing(self, thread: ProgramThread) -> bool:
        """Return whether nothing is to be done when the kernel has mapped code of a file.

        Another thread could put another file in its place meanwhile.
        """
        regs, image = thread.regs, thread.image
        if self._code is None or image.members > 1:
            return False
        return self._code.knows_none(thread, regs.rsi, _int32(regs.r8), regs.r9)

    def _map_device(self, thread: ProgramThread, device: Device) -> int:
        if self._noexec and thread.regs.rdx & abi.PROT_EXEC:
            return -EPERM
        if not isinstance(device.file, EnclaveFile):
            return -ENODEV  # its file operations have no mmap
        unwatched = watch_devices(thread)  # it may have received the descriptor
        if unwatched:
            return unwatched
        regs = thread.regs
        address, length, prot, flags = regs.rdi, regs.rsi, regs.rdx, regs.r10
        descriptor = regs.r8
        length = -(-length // abi.PAGE) * abi.PAGE
        image, file = thread.image, device.file
        shared = flags & abi.MAP_TYPE != abi.MAP_PRIVATE
        if shared and not _allows(device, prot):
            return -EACCES
        reserved = bool(not flags & abi.MAP_FIXED and length and shared)
        if reserved:
            # The kernel chooses; what it chose is reserved until the driver has agreed.
            anonymous = abi.MAP_PRIVATE | abi.MAP_ANONYMOUS
            anonymous |= flags & abi.MAP_FIXED_NOREPLACE
            address = thread.finish_syscall(
                abi.SYS_MMAP, address, length, abi.PROT_NONE, anonymous, _NO_FD, 0
            )
            if -4096 < address < 0:
                return address
        try:
            kind = flags & ~(abi.MAP_FIXED | abi.MAP_FIXED_NOREPLACE) | abi.MAP_FIXED
            file.mmap(image.mm, address, length, prot, kind, task=thread)
        except OSError as error:
            if reserved:
                thread.syscall(abi.SYS_MUNMAP, address, length)
            return -(error.errno or EINVAL)
        if image.page_table not in device.memory.users:
            device.memory.end_jumps()  # they lead to the vDSO of those who have it already
            device.memory.users.append(image.page_table)
        # Without rights at first: after mlockall the kernel fills what it maps, if it may be used,
        # and nothing may be used before the pager knows of it.
        result = thread.finish_syscall(
            abi.SYS_MMAP,
            address,
            length,
            abi.PROT_NONE,
            abi.MAP_SHARED | abi.MAP_FIXED,
            descriptor,
            address,
        )
        if -4096 < result < 0:
            image.mm.munmap(address, length)
            return result
        image.foreign_mappings.forget(address, address + length)
        image.mapped(address, address + length, prot)
        if not image.is_covered(address):
            image.pager.reveal(address, address + length, prot)
        # Mappings of enclaves are VM_IO: nothing locks them, and a core dump has nothing of them.
        image.inject(
            [
                (abi.SYS_MUNLOCK, address, length),
                (abi.SYS_MADVISE, address, length, abi.MADV_DONTDUMP),
            ]
        )
        return address

    def _displaced(self, thread: ProgramThread, address: int, length: int) -> None:
        """The kernel has put something else where mappings of enclaves were.

        Args:
            thread: which has asked for it.
            address: where it is.
            length: its bytes.
        """
        from softsgx.engines.native.memory.foreign import ForeignMapping

        image, end = thread.image, address + -(-length // abi.PAGE) * abi.PAGE
        taken = image.foreign_mappings.within(address, end)
        for vma in image.mm.vmas(address, end):
            device = self._registry.of_file(vma.file)
            start, stop = max(vma.start, address), min(vma.end, end)
            taken.append(ForeignMapping(start, stop, abi.PROT_NONE, device))
        image.mm.munmap(address, length)
        self._registry.sweep()
        image.foreign_mappings.forget(address, end)
        taken = [each for each in taken if self._registry.has(each.device)]
        if taken:
            image.foreign_mappings.place(_with_rights(taken, thread.tid))

    def _lost(self, thread: ProgramThread, address: int, length: int) -> None:
        """Unmap what the kernel has unmapped for a mapping that then failed.

        Linux unmaps a range before it asks a file to be mapped there, and cannot take it back.
        """
        image = thread.image
        for start, end in _holes(thread.tid, address, address + _rounded(length)):
            image.mm.munmap(start, end - start)
            image.foreign_mappings.forget(start, end)
        self._registry.sweep()

    # --- the others -----------------------------------------------------------------------------

    def munmap(self, thread: ProgramThread) -> int | None:
        """Do ``munmap`` (address, length)."""
        regs, image = thread.regs, thread.image
        address, length = regs.rdi, regs.rsi
        if image.foreign_mappings.ranges and address % abi.PAGE == 0:
            image.foreign_mappings.forget(address, address + -(-length // abi.PAGE) * abi.PAGE)
        if not length or address % abi.PAGE or not image.mm.vmas(address, address + length):
            return None
        try:
            image.mm.munmap(address, length)
        except OSError as error:
            return -(error.errno or EINVAL)
        result = thread.finish_syscall()
        self._registry.sweep()
        return result

    def mprotect(self, thread: ProgramThread) -> int | None:
        """Do ``mprotect`` (address, length, prot), and pkey_mprotect without looking at the key."""
        regs, image = thread.regs, thread.image
        address, length, prot = regs.rdi, regs.rsi, regs.rdx
        length = -(-length // abi.PAGE) * abi.PAGE
        if prot & abi.PROT_WRITE:
            from softsgx.engines.native.vdso.host_jumps import put_back

            put_back(thread, address, address + length)
        foreign = image.foreign_mappings.within(address, address + length)
        if foreign and address % abi.PAGE == 0 and not image.mm.vmas(address, address + length):
            result = thread.finish_syscall()
            if not result:
                image.foreign_mappings.place(
                    [replace(each, prot=prot & _RIGHTS) for each in foreign]
                )
            return result
        if not length or address % abi.PAGE or not image.mm.vmas(address, address + length):
            return None
        if self._noexec and prot & abi.PROT_EXEC:
            return -EACCES
        for vma in image.mm.vmas(address, address + length):
            if prot & abi.PROT_WRITE and not _allows(self._registry.of_file(vma.file), prot):
                return -EACCES
        try:
            image.mm.mprotect(address, length, prot, task=thread)
        except OSError as error:
            return -(error.errno or EINVAL)
        covered = any(
            image.is_covered(vma.start) for vma in image.mm.vmas(address, address + length)
        )
        if image.pager.map_prot(prot) == prot and not covered:
            result = thread.finish_syscall()
            for vma in image.mm.vmas(address, address + length):
                low, high = max(vma.start, address), min(vma.end, address + length)
                image.mapped(low, high, prot)
            return result
        return self._mprotect_around(thread, address, address + length, prot)

    def _mprotect_around(self, thread: ProgramThread, start: int, end: int, prot: int) -> int:
        """Protect the parts that are no enclave's natively, the others by the pager."""
        image = thread.image
        result, at = 0, start
        for vma in image.mm.vmas(start, end):
            low, high = max(vma.start, start), min(vma.end, end)
            if at < low:
                result = result or thread.syscall(abi.SYS_MPROTECT, at, low - at, prot)
            image.mapped(low, high, prot)
            if not image.is_covered(low):
                image.pager.reveal(low, high, prot)
            at = high
        if at < end:
            result = result or thread.syscall(abi.SYS_MPROTECT, at, end - at, prot)
        return result

    def mremap(self, thread: ProgramThread) -> int | None:
        """Do ``mremap`` (old, old length, new length, flags, new)."""
        regs, image = thread.regs, thread.image
        old, old_length, new_length = regs.rdi, _rounded(regs.rsi), _rounded(regs.rdx)
        flags, new = regs.r10, regs.r8
        if _is_invalid(old, old_length, new_length, flags, new):
            return None
        if image.mm.find(old) is None:
            target = new if flags & _MREMAP_FIXED else None
            return self._mremap_ordinary(thread, old, old_length, new_length, target)
        if flags & _MREMAP_DONTUNMAP:
            return -EINVAL  # VM_PFNMAP
        if flags & _MREMAP_FIXED:
            # Deviation: pages of an enclave are usable at their own address only, so a moved
            # mapping would be good for nothing; it is refused instead.
            return -EFAULT
        try:
            image.mm.mremap(old, old_length, new_length)
        except OSError as error:
            return -(error.errno or EFAULT)
        result = thread.finish_syscall()
        self._registry.sweep()
        return result

    def _mremap_ordinary(
        self, thread: ProgramThread, old: int, old_length: int, new_length: int, new: int | None
    ) -> int | None:
        """Move or resize what is no enclave's; ``new`` is where it shall go.

        Enclaves are unmapped at its target, and where what shrinks reaches over them, also by a
        call that fails after that.
        """
        from softsgx.engines.native.vdso.host_jumps import put_back

        image = thread.image
        put_back(thread, old, old + old_length)
        foreign = image.foreign_mappings.within(old, old + old_length)
        replaces = new is not None and _overlaps(thread, new, new_length)
        if not (foreign or replaces or image.mm.vmas(old + new_length, old + old_length)):
            return None
        image.foreign_mappings.give_back(old, old + old_length)
        result = thread.finish_syscall()
        if -4096 < result < 0:
            image.foreign_mappings.place(foreign)
        elif result == old:
            image.foreign_mappings.place(
                [
                    replace(each, end=min(each.end, old + new_length))
                    for each in foreign
                    if each.start < old + new_length
                ]
            )
        else:
            self._displaced(thread, result, new_length)
        drop_left_behind(image, thread.tid, self._registry)
        self._registry.sweep()
        return result


def _allows(device: Device, prot: int) -> bool:
    """Return whether a descriptor opened as this one was can be mapped shared with such rights."""
    return device.mode == abi.O_RDWR or (device.mode == abi.O_RDONLY and not prot & abi.PROT_WRITE)


def _overlaps(thread: ProgramThread, address: int, length: int) -> bool:
    """Return whether enclaves are, or were, mapped in a range that the kernel would replace."""
    end, image = address + length, thread.image
    fits = bool(length) and address % abi.PAGE == 0 and end <= abi.TASK_SIZE
    if not (fits and image.has_had_enclaves):
        return False
    return bool(image.mm.vmas(address, end) or image.foreign_mappings.within(address, end))


def _rounded(length: int) -> int:
    """Return a length in whole pages, as the kernel rounds it: the longest become 0."""
    return -(-length // abi.PAGE) * abi.PAGE & (1 << 64) - 1


def _is_invalid(old: int, old_length: int, new_length: int, flags: int, new: int) -> bool:
    """Return whether mremap fails with EINVAL whatever is mapped; lengths are whole pages."""
    placed = flags & (_MREMAP_FIXED | _MREMAP_DONTUNMAP)
    if flags & ~_MREMAP_FLAGS or old % abi.PAGE or not new_length:
        return True
    if placed and not flags & _MREMAP_MAYMOVE:
        return True
    if flags & _MREMAP_DONTUNMAP and old_length != new_length:
        return True
    if not flags & _MREMAP_FIXED:
        return False
    overlaps = new < old + old_length and old < new + new_length
    return bool(new % abi.PAGE or overlaps or new + new_length > abi.TASK_SIZE - abi.PAGE)


def _with_rights(ranges: list[ForeignMapping], tid: int) -> list[ForeignMapping]:
    """Return the parts of ranges where something is mapped, with the rights it has."""
    return [
        replace(each, start=max(each.start, at.start), end=min(each.end, at.end), prot=at.prot)
        for at in mappings(tid)
        for each in ranges
        if each.start < at.end and at.start < each.end
    ]


def _holes(tid: int, start: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of a range where nothing is mapped."""
    found, at = [], start
    for each in mappings(tid):
        if at < min(each.start, end):
            found.append((at, min(each.start, end)))
        at = max(at, each.end)
    return [*found, (at, end)] if at < end else found


def _int32(value: int) -> int:
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value
