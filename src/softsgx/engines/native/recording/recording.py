"""When intervals end: a time after their first access, so a program that sleeps has none.

To begin an interval is to settle permits, so that the next EENTER by each TCS stops and its leaf is
seen, and to watch all pages of all address spaces.  Threads keep running until one of their address
space has to make the calls for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from softsgx.engines.native.recording.page_table import RecordedPageTable
from softsgx.engines.native.recording.recorder import Recorder
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.vdso.permits import Permits

__all__ = ["Recording"]


class Recording:
    """See the module.

    Args:
        recorder: what is recorded.
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

    def start(self) -> None:
        """The program is about to take its first step."""
        self._recorder.start()

    def between(self) -> int | None:
        """No thread is being served: do what is due; return when something is due next."""
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
            self._begin()
            self._served_ns = self._cpu_clock()
            return 0  # threads inside have begun another one
        ends = self._clock() + end_ns - now_ns
        return ends if due is None else min(due, ends)

    def end(self) -> None:
        """The program has ended."""
        self._recorder.end_interval()

    def _begin(self) -> None:
        """End an interval, and begin the next one."""
        began_ns = self._clock()
        self._permits.settle()  # tells of entries that belong to the interval that ends
        self._recorder.end_interval()
        for image in list(self._images.values()):
            self._watch(image)
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
