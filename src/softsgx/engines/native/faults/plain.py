"""Plain faults: those that the driver resolves, at which nothing else happens, on a short path.

A fault is *plain* if a thread inside an enclave has touched a page without an entry, in a mapping
that may be read and written, and would resume its enclave at once.  :meth:`PlainFaults.next` waits
for faults, serves plain ones as long as they come one after the other, and returns the first stop
that is none.  It has the effects of :class:`~softsgx.engines.native.tracing.loop.Loop` and
:mod:`.enclave` in the same order.  A stop by SIGBUS that is no plain fault goes to the loop, before
anything has changed but that the stop is recorded and the crossings of its thread are reported.

Where faults are events (:mod:`softsgx.engines.native.tracing.fault_events`), the thread of a plain
fault does not stop: it waits in the kernel and is woken.  It counts as running, so a kick, or a
call in its name, stops it, and the loop resumes it.  The thread of another fault is stopped.

A loop that has more to do at a stop or between two stops (strict mode, gdb, recordings, timed work)
does not use it.

Source:
    ``tracing/loop.py``, ``faults/transitions.py``, ``faults/enclave.py`` for the readable path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from softsgx import compiled
from softsgx.arch import PAGE_BYTES, Vector
from softsgx.driver import FaultResult
from softsgx.engines.native import abi, kernel
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.tracing.fault_events import FaultEvent
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import Stop, decode_stop
from softsgx.engines.native.tracing.waits import LONGEST_WAIT_S, Waits
from softsgx.engines.native.vdso.permit_table import CLOSED_BEHIND, EXITED_WORD
from softsgx.engines.native.vdso.permits import Permits
from softsgx.hw import READ, WRITE, EnclaveMode
from softsgx.runtime import InlineRuntime

if TYPE_CHECKING:
    from softsgx.engines.native.faults.transitions import Transitions

__all__ = ["PlainFaults", "Server"]

_SIGBUS_STOP = abi.SIGBUS << 8 | 0x7F  # of wait(2)
_READ_WRITE = READ | WRITE
_NOPAGE, _RETRY = FaultResult.NOPAGE, FaultResult.RETRY
_NO_REPETITION = 0, (0, 0)


class Server(Protocol):
    """What a loop does at stops.

    Attributes:
        threads: living threads by id.
        held: threads whose stops the loop has to handle before it waits.
    """

    threads: dict[int, ProgramThread]
    held: list[ProgramThread]

    def resume_thread(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a stopped thread, delivering signal ``number``."""

    def guard(self, thread: ProgramThread, stop: Stop) -> None:
        """Handle a stop of a thread."""

    def hold(self, thread: ProgramThread) -> bool:
        """Stop a running thread; the loop handles the stop later.  ``False``: it has died."""

    def background(self) -> None:
        """Let background tasks run until each of them waits."""

    def failed(self, pid: int, tid: int, error: Exception) -> None:
        """End the process of a thread that could not be served, unless the thread had ended."""


@compiled.record
class PlainFaults:
    """See the module.

    Args:
        server: handles what is not plain.
        waits: receives stops and ends.
        transitions: has what handles faults of enclave code, and asynchronous exits.
        permits: crossings that do not stop.
        store: content of the EPC.
        runtime: has the background tasks.

    Attributes:
        served: number of plain faults.
    """

    __slots__ = (
        *("_permits", "_runtime", "_server", "_store", "_transitions", "_waits", "served"),
    )

    def __init__(
        self,
        server: Server,
        waits: Waits,
        transitions: Transitions,
        permits: Permits,
        store: NativeStore,
        runtime: InlineRuntime,
    ) -> None:
        self._server, self._waits = server, waits
        self._transitions, self._permits = transitions, permits
        self._store, self._runtime = store, runtime
        self.served = 0

    def next(self) -> tuple[int, int, int] | None:
        """Serve plain faults; return the first stop or end that is none, as :meth:`Waits.next`.

        Returns:
            ``None``: the loop or its waits hold a stop already.

        Raises:
            ChildProcessError: there is no thread, and no other child.
        """
        return serve(self)

    def _next(self) -> tuple[int, int, int] | None:
        """As :meth:`next`, in Python."""
        server, waits, wait = self._server, self._waits, kernel.next_stop
        held, threads, kept, places = server.held, server.threads, waits.kept, waits.places
        while not (held or kept):
            faults = waits.faults
            if faults is not None and faults.images:
                if faults.may_have_stopped or waits.look_ns is not None:
                    report = waits.next_or_fault()
                    if not isinstance(report, FaultEvent):
                        return report
                else:
                    fault = faults.wait(LONGEST_WAIT_S)
                    if fault is None:
                        continue  # a thread may have stopped
                    report = fault
                self.resolve(report)
                continue
            event = wait(0, places) if waits.look_ns is None else waits.next()
            if event is None or event[1] != _SIGBUS_STOP:
                return event
            thread = threads.get(event[0])
            if thread is None:
                return event
            thread.running = thread.unstoppable = False
            stop = thread.stopped(_SIGBUS_STOP, event[2])
            if not self._serve(thread):
                server.guard(thread, stop)
        return None

    def _serve(self, thread: ProgramThread) -> bool:
        """Handle a fault, and resume its thread; ``False``: it is not plain."""
        image, cpu, permits = thread.image, thread.cpu, self._permits
        image.current = thread
        try:
            permits.report(thread)
            inside = cpu.inside
            if inside is None or not self._is_plain(thread, inside):
                return False
            self.served += 1
            permits.settle()
            address = thread.siginfo().addr
            result = image.mm.fault(address, READ, thread)
            usual = cpu.inside is inside and (result is _NOPAGE or result is _RETRY)
            if not usual or cpu.hw.tracer is not None or not self._runtime.is_quiet():
                number = self._transitions.enclave.faulted(thread, address, abi.BUS_ADRERR, result)
                self._server.resume_thread(thread, number)
                return True
            thread.spurious = _NO_REPETITION
            crossings = inside.enclave.crossings
            crossings.aex += 1
            crossings.eresume += 1
            self._store.hide_unmapped()
            image.flush()
            permits.going(thread)
            thread.running = True
            image.current = None
            thread.resume()
        except Exception as error:
            self._server.failed(thread.process.pid, thread.tid, error)
        finally:
            image.current = None
        return True

    def resolve(self, event: FaultEvent) -> None:
        """Handle the fault of a thread that waits, and wake it; or make the thread stop."""
        faults, permits = self._waits.faults, self._permits
        assert faults is not None, "an event where faults are signals"
        thread = faults.thread(event)
        if thread is None:
            return
        image, cpu, address = thread.image, thread.cpu, event.address
        thread.unstoppable = False
        try:
            permits.report(thread)
            inside = cpu.inside
            if (
                inside is None
                or event.flags & abi.UFFD_PAGEFAULT_FLAG_WP
                or not permits.has_slot(thread, inside)
                or not self._may_be_plain(thread, inside, address)
            ):
                self._waits.stop_at(event)
                return
            self.served += 1
            image.faulting = thread
            permits.settle()
            result = image.mm.fault(address, READ, thread)
            if not thread.running:
                return  # it was stopped meanwhile
            if result is not _NOPAGE and result is not _RETRY:
                self._waits.stop_at(event)
                return
            assert cpu.inside is inside, f"thread {thread.tid} has left its enclave without a stop"
            thread.spurious = _NO_REPETITION
            if cpu.hw.tracer is None:
                crossings = inside.enclave.crossings
                crossings.aex += 1
                crossings.eresume += 1
            else:
                self._transitions.exits.skip(thread, Vector.PF)
            if not self._runtime.is_quiet():
                self._server.background()
            self._store.hide_unmapped()
            image.flush()
            if thread.running:
                permits.going(thread)
                kernel.wake_page(event.uffd, address & -PAGE_BYTES)
        except Exception as error:
            self._server.hold(thread)  # requests to it have to succeed
            self._server.failed(thread.process.pid, thread.tid, error)
        finally:
            image.faulting = None

    def _is_plain(self, thread: ProgramThread, inside: EnclaveMode) -> bool:
        """Return whether the fault of a stopped thread is plain; its crossings were reported."""
        info = thread.siginfo()
        return info.code == abi.BUS_ADRERR and self._may_be_plain(thread, inside, info.addr)

    def _may_be_plain(self, thread: ProgramThread, inside: EnclaveMode, address: int) -> bool:
        """Return whether a fault at an address is plain."""
        image = thread.image
        if thread.breakpoints or (image.watched and not thread.watched):
            return False
        vma = image.mm.find(address)
        return (
            vma is not None
            and vma.prot == _READ_WRITE
            and image.page_table.entry(address) is None
            and (thread.resumes is inside or self._transitions.exits.return_at_once(thread))
        )


serve_in_python = PlainFaults._next
serve = serve_in_python
if compiled.speedups is not None:
    for name, value in {
        "BUS_ADRERR": abi.BUS_ADRERR,
        "FaultEvent": FaultEvent,
        "NO_REPETITION": _NO_REPETITION,
        "PF": Vector.PF,
        "Permits": Permits,
        "ProcessImage": ProcessImage,
        "ProgramThread": ProgramThread,
        "READ": READ,
        "RETRY": _RETRY,
        "closed_behind": CLOSED_BEHIND,
        "exited_word": EXITED_WORD,
        "sigbus_stop": decode_stop(_SIGBUS_STOP),
    }.items():
        compiled.speedups.give(name, value)
    compiled.speedups.bind("PlainFaults", PlainFaults)
    serve = compiled.speedups.serve_faults
