"""Ends intervals: a fixed time after their first access, so a program that sleeps has none.

An interval lasts longer while a thread that has faulted in it waits for a processor.

To begin an interval, the supervisor settles permits, so that the next EENTER with each TCS stops
and is recorded, and watches all pages of all address spaces.  In each address space one thread
stops to make the calls for that; the others keep running.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from softsgx.engines.native.recording.page_table import RecordedPageTable
from softsgx.engines.native.recording.recorder import Recorder
from softsgx.engines.native.recording.starved import Starved
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.vdso.permits import Permits

__all__ = ["Recording"]

_RETRY_NS = 200_000


class Recording:
    """See the module.

    Args:
        recorder: receives the accesses.
        images: the address spaces of the program, by number.
        permits: crossings that do not stop.
        clock: returns nanoseconds of real time.
        cpu_clock: returns nanoseconds of processor time of the supervisor.
    """

    def __init__(
        self,
        recorder: Recorder,
        images: Mapping[int, ProcessImage],
        permits: Permits,
        clock: Callable[[], int] = time.monotonic_ns,
        cpu_clock: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._recorder, self._images, self._permits = recorder, images, permits
        self._clock, self._cpu_clock = clock, cpu_clock
        self._served_ns = cpu_clock()
        self._starved = Starved()

    def start(self) -> None:
        """Begin the recording; the program's first instruction follows."""
        self._recorder.start()

    def between(self) -> int | None:
        """Flush the trace and end the interval, if it is time; the loop calls it between stops.

        Returns:
            The clock's time of the next call that has work; ``None``: no time is set.
        """
        recorder, overhead = self._recorder, self._recorder.overhead
        cpu_ns = self._cpu_clock()
        if recorder.faulted:
            recorder.faulted = False
            overhead.faults += 1
            overhead.serving_ns += cpu_ns - self._served_ns
        self._served_ns = cpu_ns
        due = recorder.flush_when_due()
        end_ns = recorder.interval_end_ns
        if end_ns is None:
            return due
        now_ns = recorder.now_ns
        if now_ns >= end_ns:
            if self._starved.any():
                return min(self._clock() + _RETRY_NS, due or sys.maxsize)
            self._begin()
            self._served_ns = self._cpu_clock()
            return 0  # threads that are inside an enclave have begun the next interval
        ends = self._clock() + end_ns - now_ns
        return ends if due is None else min(due, ends)

    def resuming(self) -> None:
        """The supervisor is about to resume the current thread of one address space."""
        recorder, starved = self._recorder, self._starved
        if self._recorder.interval_ns is None or not (recorder.shown or starved.follows):
            return
        for image in self._images.values():
            if image.current is not None:
                starved.resuming(image.current, faulted=recorder.shown)
                recorder.shown = False
                return

    def end(self) -> None:
        """The program has ended."""
        self._recorder.end_interval()

    def _begin(self) -> None:
        """End an interval, and begin the next one."""
        began_ns = self._clock()
        self._permits.settle()  # reports entries that belong to the interval that ends
        self._recorder.end_interval()
        for image in list(self._images.values()):
            self._watch(image)
        self._starved.begin()
        self._recorder.overhead.hiding_ns += self._clock() - began_ns

    def _watch(self, image: ProcessImage) -> None:
        page_table = image.page_table
        assert isinstance(page_table, RecordedPageTable), "an address space that is not recorded"
        page_table.pager.watch_all([(vma.start, vma.end) for vma in image.mm.vmas()])
        for thread in image.threads.values():
            inside = thread.cpu.inside
            if inside is not None:
                page_table.occupied(inside.tcs_linaddr)
                for page in (*inside.frame.xsave, inside.frame.gpr):
                    page_table.occupied(page.linaddr)
