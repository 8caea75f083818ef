"""``run``: a program on a platform of its own, from one call.

::

    result = run(["./app"], epc="64MiB")
    print(result.exit_code, result.counters["eldu"])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from softsgx.engines.native import recording
from softsgx.engines.native.doctor import requirements
from softsgx.engines.native.injections import Injections, tick_period_ns
from softsgx.engines.native.instruments import Instruments
from softsgx.engines.native.memory.pagers import PAGERS
from softsgx.engines.native.memory.ram import NativeRam
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.supervisor import Supervisor
from softsgx.engines.native.syscalls.nodes import CGROUP, Nodes
from softsgx.engines.native.x86.cpuid import (
    CpuidLeaf,
    host_cpuid,
    virtual_leaf,
    xsave_components,
)
from softsgx.engines.native.x86.profile import ProfileCpuid, intel_layout
from softsgx.engines.native.x86.tsc import tsc_khz
from softsgx.errors import NotRun, SoftSgxError
from softsgx.host import Platform, PlatformConfig
from softsgx.hw import MachineConfig
from softsgx.ondemand import dataclass, field_names, replace
from softsgx.trace import Tracer

if TYPE_CHECKING:
    from softsgx.engines.native.gdb.server import GdbServer
    from softsgx.engines.native.syscalls.call_log import CallLog

__all__ = [
    "CPUID_SOURCES",
    "GROUP_VARIABLE",
    "NativePlatformConfig",
    "Observer",
    "RunFailed",
    "RunResult",
    "cpuid_of",
    "native_platform",
    "run",
]

GROUP_VARIABLE = "SOFTSGX_CGROUP"
"""The environment variable that names the directory of the program's group."""

CPUID_SOURCES = ("profile", "host")
"""What CPUID describes to the program: the profile's machine, or this one, with SGX."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes:
        exit_code: the program's exit status, or -n when signal n ended it.
        pager: the mechanism that was used.
        fault_delivery: how faults reached the supervisor: as ``events`` of userfaultfd, which stop
            no thread, or as stops of threads for a signal, ``sigbus`` or ``sigsegv`` (mprotect).
        epc_pages: pages of the EPC.
        counters: how often things happened, by name (:class:`softsgx.paging.Counters`).
        injected: how often what was asked for happened, by name: failures on demand and ticks.
    """

    exit_code: int
    pager: str
    fault_delivery: str
    epc_pages: int
    counters: dict[str, object]
    injected: dict[str, int]


class RunFailed(AssertionError):
    """Bugs of softsgx have ended processes or a background task; the other processes continued.

    Attributes:
        result: how the run ended.
        errors: the mistakes, the earliest first.
    """

    def __init__(self, result: RunResult, errors: Sequence[Exception]) -> None:
        super().__init__("; ".join(repr(error) for error in errors))
        self.result, self.errors = result, list(errors)


class Observer(Protocol):
    """What watches a run: makes reports, passes signals on."""

    def attached(self, platform: Platform, pager: str) -> None:
        """The platform is ready and the program is about to start."""

    def started(self, pid: int) -> None:
        """The program is about to take its first step."""


@dataclass(frozen=True)
class NativePlatformConfig(PlatformConfig):
    """A platform whose processors are this machine's, as far as their registers go.

    Attributes:
        cpuid: one of :data:`CPUID_SOURCES`.
    """

    cpuid: str = "profile"

    def machine(self) -> MachineConfig:
        """Return the machine described, with the XSAVE state that threads here really have."""
        described, host = super().machine(), host_cpuid()
        xcr0, real = xsave_components(host)
        layout = intel_layout(host) if self.cpuid == "profile" else real
        return replace(described, xsave=layout, xfrm=described.xfrm & xcr0)


def native_platform(
    config: PlatformConfig, tracer: Tracer | None = None, *, cpuid: str = "profile"
) -> Platform:
    """Return a platform for a :class:`Supervisor`: made of ``config``, pages in memory files."""
    values = {name: getattr(config, name) for name in field_names(PlatformConfig)}
    return Platform(
        NativePlatformConfig(**values, cpuid=cpuid),
        store=NativeStore(),
        ram=NativeRam(),
        tracer=tracer,
    )


def cpuid_of(config: MachineConfig, source: str) -> Callable[[int, int], CpuidLeaf]:
    """Return what CPUID (leaf, sub-leaf) gives the program on a machine.

    Args:
        config: the machine, of a :func:`native_platform`.
        source: one of :data:`CPUID_SOURCES`.

    Raises:
        SoftSgxError: the time-stamp counter's frequency is not known.
    """
    host = host_cpuid()
    if source == "host":
        return partial(virtual_leaf, host, config)
    return ProfileCpuid(host, config, tsc_khz(host), os.cpu_count() or 1)


def _call_log(write: Callable[[str], None]) -> CallLog:
    from softsgx.engines.native.syscalls.call_log import CallLog

    return CallLog(write)


def _cpuinfo(leaves: Callable[[int, int], CpuidLeaf]) -> bytes:
    from softsgx.engines.native.x86.cpuinfo import rewrite_cpuinfo

    with open("/proc/cpuinfo") as cpuinfo:
        return rewrite_cpuinfo(cpuinfo.read(), leaves).encode()


def run(
    argv: Sequence[str],
    config: PlatformConfig | None = None,
    *,
    group: str = "/",
    pager: str | None = None,
    cpuid: str = "profile",
    cpus: set[int] | None = None,
    strict: bool = False,
    inject: Sequence[str] = (),
    tick: str | None = None,
    gdb: GdbServer | None = None,
    syscalls: Callable[[str], None] | None = None,
    recorder: recording.Recorder | None = None,
    tracer: Tracer | None = None,
    observer: Observer | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdio: tuple[int, int, int] | None = None,
    **keywords: Any,
) -> RunResult:
    """Run a program, with all its children, and return when the last of them has ended.

    Args:
        argv: program, looked up in PATH, and its arguments.
        config: the platform; or give its fields as keywords (``epc="64MiB"``).
        group: path of the limit group that its EPC is charged to.
        pager: one of :data:`PAGERS`; the best this machine allows by default.
        cpuid: what CPUID describes: the machine of the profile, as far as this one can keep the
            promise, or this one, with SGX ("host").
        cpus: processors that program and supervisor may run on; by default one while one thread of
            the program runs at a time, which is the fastest for it, and otherwise all that we may
            use.
        strict: code outside that touches an enclave's memory reads ones and stores nothing, as
            on hardware; by default the bytes are there, and everything is faster.
        inject: failures on demand, ``WHAT`` or ``WHAT@WHEN`` of :data:`INJECTIONS`.  A signal that
            takes the power is blocked in this thread meanwhile; other threads of this process must
            block it, too.
        tick: period of timer interrupts for threads inside enclaves, as "4ms"; none by default.
        gdb: where a gdb connects that debugs the program, which waits for it before its first
            step; not with ``strict``.  The caller closes it.
        syscalls: receives a line, as strace prints it, for each call that the program makes to SGX.
        recorder: records which pages of enclaves the program uses; not with ``gdb``.
        tracer: receives every event of every layer.
        observer: receives the platform and the program's start.
        env: the program's environment; by default that of this process.  :data:`GROUP_VARIABLE` is
            added.
        cwd: the program's working directory; by default that of this process.
        stdio: descriptors to be its standard input, output and error.
        keywords: fields of :class:`~softsgx.host.PlatformConfig`.

    Raises:
        NotRun: the program cannot be started, or this machine lacks something the engine needs.
        SoftSgxError: the configuration is impossible.
        RunFailed: the program has ended, and we have made mistakes.
    """
    if pager is not None and pager not in PAGERS:
        raise SoftSgxError(f"pager = {pager!r}: not known; give one of {', '.join(PAGERS)}")
    if cpuid not in CPUID_SOURCES:
        raise SoftSgxError(f"cpuid = {cpuid!r}: not known; give {' or '.join(CPUID_SOURCES)}")
    if gdb is not None and strict:
        raise SoftSgxError("gdb: not possible in a strict run; remove one of the two")
    injections = Injections.of(inject)
    tick_ns = None if tick is None else tick_period_ns(tick)
    for finding in requirements():
        if not finding.ok:
            raise NotRun(f"{finding.name}: {finding.text}; see softsgx doctor")
    described = config.but(**keywords) if config else PlatformConfig.of(**keywords)
    with native_platform(described, tracer, cpuid=cpuid) as platform:
        assert platform.driver is not None, "a platform that runs has its driver"
        pays = platform.cgroups.make(group) if group.strip("/") else platform.cgroups.root
        leaves = cpuid_of(platform.machine.config, cpuid)
        supervisor = Supervisor(
            platform.machine,
            platform.driver,
            group=pays,
            cpuid=leaves,
            nodes=Nodes(platform.cgroups, partial(_cpuinfo, leaves)),
            pager=pager,
            cpus=cpus,
            strict=strict,
            instruments=Instruments(
                injections,
                tick_ns,
                gdb,
                None if syscalls is None else _call_log(syscalls),
                recorder,
            ),
        )
        if observer is not None:
            observer.attached(platform, supervisor.pager)
        started = None if observer is None else observer.started
        told = {GROUP_VARIABLE: os.fsdecode(CGROUP) + pays.path.rstrip("/")}
        environment = {**(os.environ if env is None else env), **told}
        exit_code = supervisor.run(argv, env=environment, cwd=cwd, stdio=stdio, started=started)
        failures = supervisor.failures
        if not failures:  # else counts may be wrong, and that is no news
            platform.check()
        result = RunResult(
            exit_code,
            supervisor.pager,
            supervisor.fault_delivery,
            platform.core.epc_pages,
            platform.core.counters.as_dict(),
            supervisor.injected.as_dict(),
        )
        if failures:
            raise RunFailed(result, failures) from failures[0]
        return result
