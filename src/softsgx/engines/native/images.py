"""The address spaces of a program: made by execve and fork, released when their last user ends.

The supervisor follows threads and processes; it asks this module for a prepared
:class:`~.tracing.process_image.ProcessImage` when one of them gets a new address space.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count

from softsgx.engines.native import abi
from softsgx.engines.native.limits import keep_spare
from softsgx.engines.native.syscalls.advice import drop_left_behind
from softsgx.engines.native.syscalls.registry import Registry
from softsgx.engines.native.tracing.process_image import ImageServices, ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.start import install_vdso
from softsgx.engines.native.tracing.tracee import Thread
from softsgx.engines.native.vdso.cpuid_jumps import CpuidAnswers
from softsgx.engines.native.vdso.path_calls import PathCalls
from softsgx.engines.native.vdso.permit_table import reserve_table
from softsgx.errors import SoftSgxError

__all__ = ["AddressSpaces"]


class AddressSpaces:
    """See the module.

    Args:
        images: the address spaces by number, which this class adds and removes.
        registry: the open devices.
        answers: what CPUID gives the program.
        paths: what is known of its calls with paths.
        make_services: makes what address spaces need, given what to call when one has ended.
    """

    def __init__(
        self,
        images: dict[int, ProcessImage],
        registry: Registry,
        answers: CpuidAnswers,
        paths: PathCalls,
        make_services: Callable[[Callable[[ProcessImage], None]], ImageServices],
    ) -> None:
        self._images, self._registry = images, registry
        self._answers, self._paths = answers, paths
        self._services = make_services(self._ended)
        self._numbers = count(1)

    def load(self, thread: Thread, *, cpuid_faults: bool) -> ProcessImage:
        """Prepare the address space of a new program.

        Args:
            thread: its only thread, stopped at the event or at the end of its execve.
            cpuid_faults: whether to make CPUID of the program fault.
        """
        memory = _open_memory(thread.tid)
        with ExitStack() as undo:
            undo.callback(os.close, memory)
            base, vdso, loader = install_vdso(thread, memory, cpuid_faults=cpuid_faults)
            number = next(self._numbers)
            image = ProcessImage(number, thread, memory, base, vdso, self._services)
            image.loader = loader
            self._answers.loaded(image)
            self._paths.loaded(image)
            thread.flush()
            undo.pop_all()
        self._images[image.index] = image
        return image

    def fork(self, thread: Thread, parent: ProcessImage) -> ProcessImage:
        """Copy an address space: same vDSO, same replaced code, page tables of its own.

        Args:
            thread: the only thread in the copy, stopped before its first step.
            parent: the original.
        """
        thread.inject_at = parent.vdso_base + parent.vdso.inject
        memory = _open_memory(thread.tid)
        with ExitStack() as undo:
            undo.callback(os.close, memory)
            _check_vdso(memory, parent)
            image = ProcessImage(
                next(self._numbers),
                thread,
                memory,
                parent.vdso_base,
                parent.vdso,
                self._services,
                parent=parent,
            )
            if image.permits_at:
                reserve_table(thread, image)
            thread.flush()
            undo.pop_all()
        self._images[image.index] = image
        return image

    def adopt_fork(self, thread: ProgramThread) -> None:
        """Set up paging in a fork child, which has inherited mappings but not their watching."""
        image = thread.image
        drop_left_behind(image, thread.tid, self._registry)
        for vma in image.mm.vmas():
            device = self._registry.of_file(vma.file)
            if image.page_table not in device.memory.users:
                device.memory.users.append(image.page_table)
            image.mapped(vma.start, vma.end, vma.prot)
            if image.is_covered(vma.start) or image.pager.map_prot(vma.prot) != vma.prot:
                # It has the rights that the parent had when it was made, also those to pages that
                # were hidden since.
                image.pager.reveal(vma.start, vma.end, abi.PROT_NONE)

    def _ended(self, image: ProcessImage) -> None:
        """The driver has let go of an address space."""
        self._registry.forget_page_table(image.page_table)
        image.pager.close()
        os.close(image.memory_fd)
        if image.permits is not None:
            image.permits.close()
        del self._images[image.index]
        self._registry.sweep()


def _check_vdso(memory: int, parent: ProcessImage) -> None:
    """Raise an error if a fork child has not inherited what the supervisor needs of its vDSO."""
    vdso = parent.vdso
    try:
        for place in (vdso.inject, vdso.permits_at):
            os.pread(memory, 1, parent.vdso_base + place)
    except OSError as error:
        raise SoftSgxError(
            f"vDSO at {parent.vdso_base:#x}: not in the child of fork ({error.strerror}); let the "
            "program not apply MADV_DONTFORK to it"
        ) from None


def _open_memory(pid: int) -> int:
    return keep_spare(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))
