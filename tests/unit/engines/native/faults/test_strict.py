"""Threads that wait for their turn in strict mode."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from softsgx.engines.native import abi
from softsgx.engines.native.faults.strict import StrictLoop
from softsgx.engines.native.tracing.stopped import Gone
from softsgx.engines.native.tracing.tracee import Stop


def test_what_a_killed_thread_waits_for_is_known_until_its_end_is_reported() -> None:
    """ptrace gives no registers of it any more."""
    device = object()
    vmas = {0x7000: SimpleNamespace(file=device)}
    image = Mock(view=None)
    image.mm.find = vmas.get
    registers = [SimpleNamespace(rbx=0x7000)]

    def load() -> SimpleNamespace:
        if not registers:
            raise Gone(1)
        return registers.pop()

    thread: Any = SimpleNamespace(image=image, load=load)
    loop: Any = StrictLoop.__new__(StrictLoop)
    loop._turns, loop._clock = {}, lambda: 0
    loop._transitions = SimpleNamespace(is_entry=lambda *_: True)
    loop._handle(thread, Stop(abi.SIGILL, 0, False))
    (waiting,) = loop._turns[image].waiting
    assert waiting.wanted is device
