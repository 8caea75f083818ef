"""The supervisor: assembles the parts that run a program, and follows its threads and processes.

Machine, EPC core and driver run on an inline runtime in the calling OS thread, which is the
program's tracer.  When the supervisor ends, also by SIGKILL, the kernel ends the program.

Deviation: while a program runs, the supervisor reaps every child of the calling process that ends.

Source:
    ptrace(2), PTRACE_O_EXITKILL.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from types import FrameType
from typing import TYPE_CHECKING

from softsgx import hw
from softsgx.driver import Driver
from softsgx.engines.native import abi, libc, recording
from softsgx.engines.native import gdb as debugging
from softsgx.engines.native.doctor import (
    can_answer_cpuid,
    can_cross_unseen,
    can_fault_cpuid,
    can_keep_flags,
    can_load_components,
    choose_pager,
)
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.images import AddressSpaces
from softsgx.engines.native.injector import Injected, Injector, RefusedInits
from softsgx.engines.native.instruments import Instruments
from softsgx.engines.native.limits import raise_limits, set_limits, with_raised_priority
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.memory.pagers import check_pager
from softsgx.engines.native.memory.ram import NativeRam
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.shortages import Shortages
from softsgx.engines.native.syscalls.code import NewCode
from softsgx.engines.native.syscalls.descriptors import DeviceDescriptors
from softsgx.engines.native.syscalls.handlers import Opener, make_handlers
from softsgx.engines.native.syscalls.mman import Mappings
from softsgx.engines.native.syscalls.nodes import Nodes
from softsgx.engines.native.syscalls.paths import NamedFiles
from softsgx.engines.native.syscalls.registry import Device, Registry
from softsgx.engines.native.syscalls.remote import RemoteMemory
from softsgx.engines.native.syscalls.sched import Affinity
from softsgx.engines.native.tracing.bpf import build_filter
from softsgx.engines.native.tracing.fresh import CopiedImage, FreshChild
from softsgx.engines.native.tracing.image_services import ImageServices
from softsgx.engines.native.tracing.lifecycle import Lifecycle
from softsgx.engines.native.tracing.loop import Handler, Loop
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import Process, ProgramThread
from softsgx.engines.native.tracing.start import EndedEarly, start_program
from softsgx.engines.native.tracing.tracee import Thread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.vdso.cpuid_jumps import CpuidAnswers
from softsgx.engines.native.vdso.path_calls import PathCalls
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.vdso.state_jumps import StateJumps
from softsgx.engines.native.x86.areas import AreaLayouts
from softsgx.engines.native.x86.cpuid import CpuidLeaf, host_cpuid, xsave_components
from softsgx.errors import SoftSgxError
from softsgx.hw import LogicalProcessor, Machine
from softsgx.paging import Group
from softsgx.runtime import InlineRuntime

if TYPE_CHECKING:
    from softsgx.engines.native.faults.abort import AbortPage
    from softsgx.engines.native.faults.breakpoints import Breakpoints
    from softsgx.engines.native.faults.pauses import SignalPauses
    from softsgx.engines.native.gdb.server import GdbServer
    from softsgx.engines.native.syscalls.call_log import CallLog
    from softsgx.engines.native.syscalls.ioctl import EnclaveIoctls

__all__ = ["Supervisor"]


class Supervisor(Lifecycle):
    """Runs one program, with all its children.

    Args:
        machine: its store is a :class:`NativeStore`.
        driver: the driver on it.
        group: the limit group that EPC of the program is charged to.
        cpuid: what CPUID (leaf, sub-leaf) gives the program.
        nodes: names that exist for the program only.
        pager: which pager to use; the best one by default.
        cpus: the processors that program and supervisor may run on; by default one while one
            thread of the program runs at a time, and otherwise those of the calling process.
        strict: give the abort page to code outside that touches an enclave.
        instruments: what the run is examined with.

    Attributes:
        pager: the name of the pager in use.
        injected: what was done on demand until now.
    """

    def __init__(
        self,
        machine: Machine,
        driver: Driver,
        *,
        group: Group,
        cpuid: Callable[[int, int], CpuidLeaf],
        nodes: Nodes,
        pager: str | None = None,
        cpus: set[int] | None = None,
        strict: bool = False,
        instruments: Instruments | None = None,
    ) -> None:
        assert isinstance(machine.store, NativeStore), "the native engine keeps the pages itself"
        assert isinstance(machine.ram, NativeRam), "the program's memory is the machine's RAM"
        assert isinstance(driver.runtime, InlineRuntime), "everything runs in the tracer's thread"
        instruments = Instruments() if instruments is None else instruments
        self._machine, self._driver, self._nodes = machine, driver, nodes
        self._store: NativeStore = machine.store
        self._images = machine.ram.images
        self._runtime = driver.runtime
        self._group, self._cpus, self._strict = group, cpus, strict
        self._injections, self._recorder = instruments.injections, instruments.recorder
        self._free_cpus: list[LogicalProcessor] = list(reversed(machine.cpus))
        self._affinity: Affinity | None = None
        recorded = self._recorder is not None
        self._leaves_alone = not (strict or recorded or instruments.gdb is not None)
        self.pager = pager or choose_pager(recorded=recorded)
        check_pager(self.pager, recorded=recorded)
        self.injected, self._shortages = Injected(), Shortages()
        self._faulting = can_fault_cpuid()
        self._code = None if self._faulting else NewCode()
        self._xcr0, real = xsave_components(host_cpuid())
        self._areas = AreaLayouts(real, machine.config.xsave)
        self._permits = Permits(
            instruments.allow_unseen_crossings and not strict and can_cross_unseen(),
            lambda thread: self._loop.hold(thread),
            lambda image, error: self._loop.image_failed(image, error),
        )
        self._registry = Registry(self._store, self._device_removed)
        self._remote = RemoteMemory(self._image_of)
        self._descriptors = DeviceDescriptors(self._registry, self._remote)
        # A debugger shows the loader's code, and steps through it.
        jumping = instruments.gdb is None and can_answer_cpuid()
        answers = CpuidAnswers(cpuid, jumping=jumping, faulting=self._faulting)
        # Where a node's name is a file's, calls on it have to stop.
        jumping = jumping and not any(map(os.path.lexists, nodes.devices))
        self._paths = PathCalls(jumping=jumping and not strict)
        wakes = set() if instruments.gdb is None else {signal.SIGIO}
        self._waits = Waits(self._injections.power_signals, wakes=wakes)
        self._loop = self._make_loop(
            self._make_transitions(answers, instruments),
            self._make_handlers(instruments.calls),
            instruments.gdb,
            logged=instruments.calls is not None,
        )
        self._injector = Injector(
            self._injections,
            instruments.tick_ns,
            machine,
            driver.core,
            self._loop,
            self._waits,
            self._images,
            self.injected,
        )
        self._address_spaces = AddressSpaces(
            self._images, self._registry, answers, self._paths, self._code, self._make_services
        )
        self._recording = None
        if self._recorder is not None:
            self._recording = recording.Recording(self._recorder, self._images, self._permits)

    @cached_property
    def _ioctls(self) -> EnclaveIoctls:
        """What does the ioctls; made for the first."""
        from softsgx.engines.native.syscalls.ioctl import EnclaveIoctls

        refused = RefusedInits(self._injections, self._machine, self.injected)
        return EnclaveIoctls(
            self._machine,
            self._registry,
            self._descriptors,
            self._shortages,
            around_init=refused.around_init,
            cpuid_faults=self._faulting,
            xcr0=self._xcr0,
            areas=self._areas,
            recorder=self._recorder,
        )

    def _make_transitions(self, answers: CpuidAnswers, instruments: Instruments) -> Transitions:
        make: Callable[..., Transitions] = Transitions
        log = instruments.calls
        if log is not None:
            from softsgx.engines.native.faults.logged import LoggedTransitions

            make = partial(LoggedTransitions, log)
        return make(
            answers,
            self._make_abort_page,
            self._shortages.report_refused,
            self._permits,
            self._make_breakpoints,
            # gdb steps through code, and stops at breakpoints in it.
            StateJumps(
                instruments.gdb is None and can_keep_flags(),
                can_load_components(),
                self._permits.stop_others,
            ),
            partial(self._make_pauses, usable=instruments.gdb is None),
        )

    def _make_abort_page(self) -> AbortPage:
        from softsgx.engines.native.faults.abort import AbortPage

        return AbortPage(self._store, self._stop_other_users)

    def _make_breakpoints(self) -> Breakpoints:
        from softsgx.engines.native.faults.breakpoints import Breakpoints

        return Breakpoints(self._stopped_inside)

    def _make_pauses(self, *, usable: bool) -> SignalPauses:
        from softsgx.engines.native.faults.pauses import SignalPauses

        return SignalPauses(self._waits, usable=usable)

    def _make_loop(
        self,
        transitions: Transitions,
        handlers: dict[int, Handler],
        gdb: GdbServer | None,
        *,
        logged: bool,
    ) -> Loop:
        if gdb is not None:
            assert not self._strict, "gdb lets threads run that have to wait for their turn"
            files = debugging.EnclaveFiles(gdb.enclave_files)
            return debugging.DebugLoop(
                self, self._waits, transitions, handlers, server=gdb, files=files
            )
        if self._strict:
            from softsgx.engines.native.faults.strict import StrictLoop

            return StrictLoop(self, self._waits, transitions, handlers)
        loop = Loop(self, self._waits, transitions, handlers)
        if self._recorder is None and not logged:
            loop.serve_plain_faults(self._store, self._runtime)
        return loop

    def _make_services(self, ended: Callable[[ProcessImage], None]) -> ImageServices:
        return ImageServices(
            pager=self.pager,
            strict=self._strict,
            runtime=self._runtime,
            mm_type=self._driver.mm_type,
            registry=self._registry,
            store=self._store,
            pages=self._machine.pages,
            hold=self._loop.hold,
            failed=self._loop.image_failed,
            kick=self._loop.kick,
            ended=ended,
            installed=self._injector.page_mapped if self._injections.poisoned_faults else None,
            may_be_uninvolved=self._leaves_alone,
            recorder=self._recorder,
            waits=self._waits,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdio: tuple[int, int, int] | None = None,
        started: Callable[[int], None] | None = None,
    ) -> int:
        """Run ``argv`` and return its exit status: -n when signal n ended it.

        ``started`` is called with its id before its first step.

        Raises:
            SoftSgxError: it cannot be started, or this machine does not allow it.
        """
        self._affinity = Affinity(self._cpus, self._waits)
        # The terminal's interrupt goes to the program as well; what it means is for it to say.
        main = threading.current_thread() is threading.main_thread()
        handled = main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
        interrupt_handler = signal.signal(signal.SIGINT, _left_to_program) if handled else None
        limits, dumpable = raise_limits(), libc.dumpable()
        try:
            first = start_program(
                argv,
                build_filter(
                    everything=self._strict,
                    code=self._code is not None,
                    executions=not self._leaves_alone,
                ),
                self._waits,
                env=env,
                cwd=cwd,
                cpus=self._cpus,
                stdio=stdio,
                limits=limits,
                ends=not self._leaves_alone,
            )
            self._supervise(first, started)
            status = self._loop.statuses.get(first.tid)
            return -9 if status is None else os.waitstatus_to_exitcode(status)
        except EndedEarly as ended:
            return -ended.number
        finally:
            self._registry.close()
            self._affinity.close()
            set_limits(limits)
            libc.set_dumpable(dumpable)
            if interrupt_handler is not None:
                signal.signal(signal.SIGINT, interrupt_handler)

    def _supervise(self, first: Thread, started: Callable[[int], None] | None) -> None:
        """Serve the program of thread ``first`` until its last thread is gone."""
        try:
            with self._waits.signals_blocked(), with_raised_priority():
                # Hidden pages and the paging key are in our memory.  Not earlier: a child that
                # has not executed yet would inherit it, and could not be traced.
                libc.set_dumpable(False)
                if self.pager == "userfaultfd" and self._loop.resolves_faults_of_waiting_threads():
                    self._waits.accept_faults()
                resume = self._loop.executed(first, Process(first.tid, self._group))
                if started is not None:
                    started(first.tid)
                if self._recording is not None:
                    self._recording.start()
                resume()
                self._loop.run()
            self.background()  # work that background tasks have begun is completed
            if self._recording is not None:
                self._recording.end()
        except SoftSgxError:
            self._end(first.tid)
            raise
        except Exception as error:
            self._loop.failures.note(f"every process is ended: {error!r}", error)
            self._end(first.tid)
        except BaseException:
            self._end(first.tid)
            raise

    def _device_removed(self, memory: EnclaveMemory) -> None:
        """The driver does not use the file of a device any more."""
        if self._recorder is not None:
            self._recorder.enclave_ended(memory)

    @property
    def fault_delivery(self) -> str:
        """How faults reach the supervisor: see :class:`softsgx.engines.native.run.RunResult`."""
        if self._waits.faults is not None:
            return "events"
        return "sigbus" if self.pager == "userfaultfd" else "sigsegv"

    @property
    def failures(self) -> list[Exception]:
        """Exceptions that are bugs of softsgx; see :mod:`.tracing.failures`."""
        return self._loop.failures.errors

    def _end(self, first: int) -> None:
        """End every process; ``first`` may be unknown to the loop."""
        self._loop.kill()
        _kill(first)

    def background(self) -> None:
        """Let ksgxd evict up to its high watermark, and address spaces end that have no user."""
        if self._runtime.has_pending():
            self._permits.settle()
            self._runtime.run_pending()
        for name, error in self._runtime.take_failures():
            self._loop.failures.note(f"task {name} has failed: {error!r}", error)

    # --- system calls ---------------------------------------------------------------------------

    def _make_handlers(self, log: CallLog | None) -> dict[int, Handler]:
        handlers = make_handlers(
            lambda thread: self._ioctls.ioctl(thread),
            NamedFiles(
                Opener(self._driver, provision=self._injections.provision),
                self._registry,
                self._nodes,
                self._descriptors.open_memory,
                self._image_of,
            ),
            self._descriptors,
            Mappings(self._registry, code=self._code, noexec=self._injections.noexec),
            self._remote,
            lambda: self._affinity,
        )
        handlers = self._paths.watching(handlers)
        return handlers if log is None else log.watching(handlers, self._registry)

    def _image_of(self, pid: int) -> ProcessImage | None:
        """Return the address space of a process or thread of the program."""
        thread = self._loop.find(pid)
        return None if thread is None else thread.image

    def _stop_other_users(self, thread: ProgramThread, device: Device) -> None:
        """Stop the other threads that could use the memory of ``device`` now."""
        for image in list(self._images.values()):
            if image.page_table not in device.memory.users:
                continue
            for other in list(image.threads.values()):
                able = other.cpu.inside is not None or self._strict
                if other is not thread and able and not other.in_call and not other.unstoppable:
                    self._loop.hold(other)

    def _stopped_inside(self, thread: ProgramThread, memory: EnclaveMemory) -> list[ProgramThread]:
        """Stop the other threads that are inside an enclave of ``memory``, and return them."""
        return [
            other
            for image in list(self._images.values())
            if image.page_table in memory.users
            for other in list(image.threads.values())
            if other is not thread and other.cpu.inside is not None and self._loop.hold(other)
        ]

    def between(self) -> int | None:
        """Do what was asked to happen now."""
        due = self._injector.between()
        if self._recording is None:
            return due
        also = self._recording.between()
        return min((each for each in (due, also) if each is not None), default=None)

    def has_timed_work(self) -> bool:
        """Return whether anything was asked to happen at a time, or is recorded."""
        return self._recording is not None or self._injector.has_work()

    # --- life cycle of threads and images --------------------------------------------------------

    def new_thread(self, tid: int, process: Process, image: ProcessImage) -> ProgramThread:
        """Give a new thread a logical processor."""
        cpu = self._free_cpus.pop() if self._free_cpus else self._another_cpu()
        cpu.cpl = 3
        cpu.space = image.page_table
        thread = ProgramThread(tid, self._waits, process, image, cpu, self._areas)
        image.threads[tid] = thread
        image.members += 1
        process.alive += 1
        if self._affinity is not None:
            self._affinity.born(tid, alone=process.alive == 1)
        return thread

    def _another_cpu(self) -> LogicalProcessor:
        """Add a processor: each thread is one, so no thread waits, however few are configured."""
        return self._machine.add_processor()

    def new_process(self, pid: int, parent: Process) -> Process:
        """A child is charged to its parent's group."""
        return Process(pid, parent.group, parent)

    def fork_fresh(self, tid: int, parent: ProgramThread) -> FreshChild | None:
        """Keep what a child needs when it stops for the first time."""
        if not parent.image.is_left_alone:
            return None
        if self._affinity is not None:
            self._affinity.born(tid)
        return FreshChild(self.new_process(tid, parent.process), CopiedImage(parent.image))

    def fresh_ended(self, tid: int) -> None:
        """It had nothing but its processor; its descriptors are closed."""
        if self._affinity is not None:
            self._affinity.gone(tid)
        self._registry.sweep()

    def fork_image(self, tid: int, parent: ProcessImage | CopiedImage) -> ProcessImage:
        """Copy an image; see :meth:`.images.AddressSpaces.fork`."""
        return self._address_spaces.fork(tid, parent, self._waits)

    def adopt_fork(self, thread: ProgramThread) -> None:
        """Set up paging in a fork child; see :meth:`.images.AddressSpaces.adopt_fork`."""
        self._address_spaces.adopt_fork(thread)

    def exec_image(self, tid: int, process: Process) -> ProgramThread:
        """Prepare the program that execve has loaded."""
        return self._adopt_program(Thread(tid, self._waits), process)

    def served_first(self) -> ProgramThread | None:
        """The thread that holds the EPC."""
        holder = self._driver.core.claims.holder
        if holder is None:
            return None
        threads = self._loop.threads.values()
        return next((thread for thread in threads if thread.claim is holder), None)

    def before_resume(self) -> None:
        """Hide the pages that page tables have lost."""
        self._store.hide_unmapped()
        if self._recording is not None:
            self._recording.resuming()

    def thread_died(self, thread: ProgramThread) -> None:
        """An interrupt takes its processor out of any enclave, and it never resumes."""
        thread.image.thread_died(thread.tid)
        self._driver.core.claims.release(thread.claim)
        if self._affinity is not None:
            self._affinity.gone(thread.tid)
        if thread.cpu.inside is not None:
            hw.interrupt(thread.cpu)

    def thread_gone(self, thread: ProgramThread) -> None:
        """Take back the processor, and the address space from the last of its threads."""
        image, process = thread.image, thread.process
        self._free_cpus.append(thread.cpu)
        image.members -= 1
        if not image.members:
            image.exit()
        process.alive -= 1
        if not process.alive:  # its descriptors are closed
            self._registry.sweep()

    def _adopt_program(self, bare: Thread, process: Process) -> ProgramThread:
        """Prepare a new program; ``bare`` is stopped at the end of its execve."""
        image = self._address_spaces.load(bare, cpuid_faults=self._faulting)
        thread = self.new_thread(bare.tid, process, image)
        self._loop.add(thread)
        image.current = thread
        return thread


def _left_to_program(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal that is the program's.  If it were ignored, the program would begin so."""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
        os.waitpid(pid, abi.WALL)
    except (ProcessLookupError, ChildProcessError):
        return
