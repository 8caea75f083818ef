"""clone and clone3 make no thread that is not traced, and change no other argument."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.syscalls.clone import clone, clone3

OTHERS = 0x0123_4567_89AB_CDEF & ~abi.CLONE_UNTRACED
AT, AFTER = 0x1238, b"the next argument"


@pytest.mark.parametrize("flags", [0, OTHERS, abi.CLONE_UNTRACED, OTHERS | abi.CLONE_UNTRACED])
def test_clone_loses_the_flag_alone(flags: int) -> None:
    stored: list[int] = []
    thread: Any = SimpleNamespace(regs=SimpleNamespace(rdi=flags, rsi=abi.CLONE_UNTRACED))
    thread.store = lambda: stored.append(thread.regs.rdi)
    assert clone(thread) is None, "the kernel makes the call"
    assert thread.regs.rdi == flags & ~abi.CLONE_UNTRACED
    assert thread.regs.rsi == abi.CLONE_UNTRACED
    assert stored == ([thread.regs.rdi] if flags & abi.CLONE_UNTRACED else [])


@pytest.mark.parametrize("flags", [0, OTHERS, abi.CLONE_UNTRACED, OTHERS | abi.CLONE_UNTRACED])
def test_clone3_loses_the_flag_alone(flags: int) -> None:
    memory = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(memory, flags.to_bytes(8, "little") + AFTER, AT)
        thread: Any = SimpleNamespace(
            regs=SimpleNamespace(rdi=AT),
            image=SimpleNamespace(
                memory_fd=memory, read=lambda at, size: os.pread(memory, size, at)
            ),
        )
        if not flags & abi.CLONE_UNTRACED:
            thread.image.memory_fd = -1  # a structure that may be read-only is not written to
        assert clone3(thread) is None, "the kernel makes the call"
        seen = os.pread(memory, AT + 8 + len(AFTER), 0)
        kept = flags & ~abi.CLONE_UNTRACED
        assert seen == bytes(AT) + kept.to_bytes(8, "little") + AFTER
        assert thread.regs.rdi == AT
    finally:
        os.close(memory)
