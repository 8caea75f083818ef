"""clone and clone3: no thread or process of the program may be made untraced.

A child made with CLONE_UNTRACED has our seccomp filters and no tracer, so each call that they stop
would fail with ENOSYS, and entering an enclave with it.

Deviation: CLONE_UNTRACED is taken out of RDI, or out of ``struct clone_args`` in the program's
memory; it stays out when the call returns.

Source:
    clone(2), seccomp(2) ("SECCOMP_RET_TRACE": without a tracer the call fails with ENOSYS).
"""

from __future__ import annotations

import os

from softsgx.engines.native import abi
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["clone", "clone3"]

_FLAGS_BYTES = 8


def clone(thread: ProgramThread) -> int | None:
    """Do ``clone`` (flags, …)."""
    regs = thread.regs
    if regs.rdi & abi.CLONE_UNTRACED:
        regs.rdi &= ~abi.CLONE_UNTRACED
        thread.store()
    return None


def clone3(thread: ProgramThread) -> int | None:
    """Do ``clone3`` (arguments, size)."""
    at = thread.regs.rdi
    flags = int.from_bytes(thread.image.read(at, _FLAGS_BYTES), "little")
    if flags & abi.CLONE_UNTRACED:
        kept = flags & ~abi.CLONE_UNTRACED
        os.pwrite(thread.image.memory_fd, kept.to_bytes(_FLAGS_BYTES, "little"), at)
    return None
