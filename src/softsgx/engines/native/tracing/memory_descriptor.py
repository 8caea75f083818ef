"""Descriptors of ``/proc/PID/mem``, which read and write what a debugger may.

Source:
    proc(5).
"""

from __future__ import annotations

import os

from softsgx.engines.native.limits import keep_spare
from softsgx.engines.native.vdso.elf import Vdso
from softsgx.errors import SoftSgxError

__all__ = ["open_inherited", "open_memory"]


def open_memory(pid: int) -> int:
    """Open the memory of a process.

    Raises:
        OSError: EMFILE: too few descriptors are left; another: the process has ended.
    """
    return keep_spare(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))


def open_inherited(pid: int, vdso_base: int, vdso: Vdso) -> int:
    """Open the memory of a process that has our vDSO from its parent; otherwise as above.

    Raises:
        SoftSgxError: it has not inherited what the supervisor needs of the vDSO.
    """
    memory = open_memory(pid)
    try:
        for place in (vdso.inject, vdso.permits_at):
            os.pread(memory, 1, vdso_base + place)
    except OSError as error:
        os.close(memory)
        raise SoftSgxError(
            f"vDSO at {vdso_base:#x}: not in the child of fork ({error.strerror}); let the "
            "program not apply MADV_DONTFORK to it"
        ) from None
    return memory
