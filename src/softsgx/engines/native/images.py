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
from softsgx.engines.native.syscalls.advice import drop_left_behind
from softsgx.engines.native.syscalls.code import NewCode
from softsgx.engines.native.syscalls.registry import Registry
from softsgx.engines.native.tracing.fresh import CopiedImage
from softsgx.engines.native.tracing.image_services import ImageServices
from softsgx.engines.native.tracing.memory_descriptor import open_inherited, open_memory
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.start import install_vdso
from softsgx.engines.native.tracing.tracee import Thread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.vdso.cpuid_jumps import CpuidAnswers
from softsgx.engines.native.vdso.path_calls import PathCalls

__all__ = ["AddressSpaces"]


class AddressSpaces:
    """See the module.

    Args:
        images: the address spaces by number, which this class adds and removes.
        registry: the open devices.
        answers: what CPUID gives the program.
        paths: what is known of its calls with paths.
        code: replaces CPUID in code; ``None`` where it faults.
        make_services: makes what address spaces need, given what to call when one has ended.
    """

    def __init__(
        self,
        images: dict[int, ProcessImage],
        registry: Registry,
        answers: CpuidAnswers,
        paths: PathCalls,
        code: NewCode | None,
        make_services: Callable[[Callable[[ProcessImage], None]], ImageServices],
    ) -> None:
        self._images, self._registry = images, registry
        self._answers, self._paths, self._code = answers, paths, code
        self._services = make_services(self._ended)
        self._numbers = count(1)

    def load(self, thread: Thread, *, cpuid_faults: bool) -> ProcessImage:
        """Prepare the address space of a new program.

        Args:
            thread: its only thread, stopped at the event or at the end of its execve.
            cpuid_faults: whether to make CPUID of the program fault.
        """
        memory = open_memory(thread.tid)
        with ExitStack() as undo:
            undo.callback(os.close, memory)
            base, vdso, loader = install_vdso(thread, memory, cpuid_faults=cpuid_faults)
            number = next(self._numbers)
            image = ProcessImage(
                *(number, thread.tid, base, vdso, self._services), memory_fd=memory, thread=thread
            )
            image.loader = loader
            if self._code is not None:
                self._code.executed(image, thread.tid)
            self._answers.loaded(image)
            self._paths.loaded(image)
            thread.flush()
            undo.pop_all()
        self._images[image.index] = image
        return image

    def fork(self, tid: int, parent: ProcessImage | CopiedImage, waits: Waits) -> ProcessImage:
        """Copy an address space: same vDSO, same replaced code, page tables of its own.

        Args:
            tid: the only thread in the copy, stopped before its first step.
            parent: the original.
            waits: receives stops of the thread.
        """
        number, vdso_base, vdso = next(self._numbers), parent.vdso_base, parent.vdso
        if parent.uninvolved:  # most such children need nothing of it
            image = ProcessImage(number, tid, vdso_base, vdso, self._services, parent=parent)
            self._images[number] = image
            return image
        thread = Thread(tid, waits)
        thread.inject_at = vdso_base + vdso.inject
        memory = open_inherited(tid, vdso_base, vdso)
        with ExitStack() as undo:
            undo.callback(os.close, memory)
            image = ProcessImage(
                *(number, tid, vdso_base, vdso, self._services),
                parent=parent,
                memory_fd=memory,
                thread=thread,
            )
            if image.permits_at:
                from softsgx.engines.native.vdso.permit_table import reserve_table

                reserve_table(thread, image)
            thread.flush()
            undo.pop_all()
        self._images[number] = image
        return image

    def adopt_fork(self, thread: ProgramThread) -> None:
        """Set up paging in a fork child, which has inherited mappings but not their watching."""
        image = thread.image
        if not image.has_enclaves:
            return
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
        if not image.uninvolved:
            self._registry.forget_page_table(image.page_table)
        image.pager.close()
        image.close_memory()
        if image.permits is not None:
            image.permits.close()
        del self._images[image.index]
        self._registry.sweep()
