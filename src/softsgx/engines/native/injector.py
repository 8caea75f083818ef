"""Causes the failures that the user has asked for, at the times that the user has named.

Losses of power and timer interrupts happen between two events of the loop, when it serves no
thread.  A timer interrupt makes each thread that executes enclave code leave by an asynchronous
exit; then the program's code at the AEP runs, and resumes the enclave or does not.

A page is poisoned when the driver has mapped it: the instruction that has faulted gets the machine
check when it is executed again.

Deviation: every use of a poisoned page is a machine check, also a store, which on hardware leaves
the error for a later load.

Deviation: ticks come at multiples of the period in real time, for all processors together; a thread
that has stopped for the supervisor when one is due does not get it, nor does one that is outside.
The time that the supervisor needs passes for the program, too.

Source:
    SDM vol. 3D, "Intel SGX Interactions with S-States", "Asynchronous Enclave Exit";
    arch_memory_failure(), arch/x86/kernel/cpu/sgx/main.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from softsgx.engines.native.injections import Injections
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.hw import EpcPage, Machine
from softsgx.ondemand import dataclass, field_names
from softsgx.paging import EpcCore

__all__ = ["Injected", "Injector", "RefusedInits", "Ticks"]


@dataclass(slots=True)
class Injected:
    """Number of failures and ticks that were caused.

    Attributes:
        power_losses: losses of power.
        refused_inits: INITs whose EINIT did not succeed.
        poisoned_pages: EPC pages that were poisoned.
        ticks: asynchronous exits by timer interrupts.
    """

    power_losses: int = 0
    refused_inits: int = 0
    poisoned_pages: int = 0
    ticks: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return all of it by name."""
        return {name: getattr(self, name) for name in field_names(Injected)}


class Ticks:
    """When timer interrupts are due.

    Args:
        period_ns: from one to the next.
    """

    def __init__(self, period_ns: int) -> None:
        self._period_ns = period_ns
        self._due_ns: int | None = None

    def is_due(self, now_ns: int) -> bool:
        """Return whether a processor that was inside at :meth:`arm` is to be interrupted now."""
        return self._due_ns is not None and now_ns >= self._due_ns

    def arm(self, now_ns: int, *, inside: bool) -> int | None:
        """Return when the next one is due, ``None`` while no processor is inside."""
        period_ns = self._period_ns
        self._due_ns = (now_ns // period_ns + 1) * period_ns if inside else None
        return self._due_ns


class RefusedInits:
    """Sets the outcome of EINIT for some INITs.

    Args:
        injections: which INITs, by number from 1, and how their EINIT ends.
        machine: the machine that executes EINIT.
        injected: counts them.
    """

    def __init__(self, injections: Injections, machine: Machine, injected: Injected) -> None:
        self._outcomes, self._machine, self._injected = injections.refused_inits, machine, injected
        self._inits = 0

    @contextmanager
    def around_init(self) -> Iterator[None]:
        """Count one INIT, and set the outcome of its EINIT if the user has asked for one."""
        self._inits += 1
        outcome = self._outcomes.get(self._inits)
        self._injected.refused_inits += outcome is not None
        self._machine.einit_outcome = outcome
        try:
            yield
        finally:
            self._machine.einit_outcome = None


class Injector:
    """See the module.

    Args:
        injections: the failures to cause.
        tick_ns: period of timer interrupts, ``None`` for none.
        machine: the machine.
        core: its EPC core.
        loop: interrupts threads.
        waits: receives the signals that take the power, and has the clock.
        images: the address spaces of the program, by number.
        injected: counts them.
    """

    def __init__(
        self,
        injections: Injections,
        tick_ns: int | None,
        machine: Machine,
        core: EpcCore,
        loop: Loop,
        waits: Waits,
        images: Mapping[int, ProcessImage],
        injected: Injected,
    ) -> None:
        self._injected = injected
        self._injections, self._machine, self._core = injections, machine, core
        self._loop, self._waits, self._images = loop, waits, images
        self._power_losses = list(injections.power_losses)
        self._lost_entries = self._mapped = 0
        self._ticks = None if tick_ns is None else Ticks(tick_ns)

    def between(self) -> int | None:
        """Cause what is due, while no thread is served; return when the next one is due."""
        if self._power_losses and self._entries() >= self._power_losses[0]:
            del self._power_losses[0]
            self._lose_power()
        if self._waits.received():
            self._lose_power()
        return None if self._ticks is None else self._tick(self._ticks)

    def has_work(self) -> bool:
        """Return whether :meth:`between` may ever cause something."""
        return bool(self._power_losses or self._ticks or self._injections.power_signals)

    def page_mapped(self, page: EpcPage) -> None:
        """Poison a page that a page fault has just mapped, if the user has asked for that."""
        self._mapped += 1
        if self._mapped not in self._injections.poisoned_faults:
            return
        store = self._machine.store
        assert isinstance(store, NativeStore), "the native engine keeps the pages itself"
        self._core.poison(page.addr)
        store.poison(page)
        self._injected.poisoned_pages += 1

    # --- power ----------------------------------------------------------------------------------

    def _entries(self) -> int:
        """Return how often enclaves were entered until now."""
        return self._lost_entries + sum(each.eenter for each in self._machine.crossings.values())

    def _lose_power(self) -> None:
        self._lost_entries = self._entries()
        self._interrupt(thread for thread in self._threads() if thread.cpu.inside is not None)
        self._machine.power_transition()
        self._injected.power_losses += 1

    # --- timer interrupts -----------------------------------------------------------------------

    def _tick(self, ticks: Ticks) -> int | None:
        clock = self._waits.clock
        if ticks.is_due(clock()):
            self._injected.ticks += self._interrupt(self._executing())
        return ticks.arm(clock(), inside=bool(self._executing()))

    def _executing(self) -> list[ProgramThread]:
        """Return the threads that execute enclave code."""
        return [
            thread for thread in self._threads() if thread.cpu.inside is not None and thread.running
        ]

    def _threads(self) -> list[ProgramThread]:
        return [thread for image in self._images.values() for thread in image.threads.values()]

    def _interrupt(self, threads: Iterable[ProgramThread]) -> int:
        """Interrupt threads that are inside; return how many have left their enclave."""
        return sum(self._loop.interrupt(thread) for thread in threads)
