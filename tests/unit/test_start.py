"""What a run of a program without a device imports: it would wait for each module.

Method: a new interpreter imports the command, or runs a program, and prints its modules.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.support.native import needs_tracing

#: Each run waits for the import of each module: raise this with a reason.
MODULES_OF_A_RUN = 290
#: What only programs that use SGX, other verbs, other engines, or options of ``run`` need.
NOT_FOR_A_RUN = (
    "ast",
    "cryptography",
    "dataclasses",
    "datetime",
    "fractions",
    "hashlib",
    "inspect",
    "ipaddress",
    "logging",
    "pathlib",
    "platform",
    "rich",
    "string",
    "tempfile",
    "textwrap",
    "tokenize",
    "tomllib",
    "traceback",
    "softsgx.arch.keys",
    "softsgx.arch.measurement",
    "softsgx.arch.secs",
    "softsgx.arch.sigstruct",
    "softsgx.arch.tcs",
    "softsgx.cgroup.events",
    "softsgx.cgroup.files",
    "softsgx.driver.build",
    "softsgx.driver.debug",
    "softsgx.driver.sgx2",
    "softsgx.engines.native.faults.abort",
    "softsgx.engines.native.faults.breakpoints",
    "softsgx.engines.native.faults.enclave",
    "softsgx.engines.native.faults.enclu",
    "softsgx.engines.native.faults.exceptions",
    "softsgx.engines.native.faults.exits",
    "softsgx.engines.native.faults.extended",
    "softsgx.engines.native.faults.faulting_instruction",
    "softsgx.engines.native.faults.logged",
    "softsgx.engines.native.faults.non_enclave",
    "softsgx.engines.native.faults.strict",
    "softsgx.engines.native.gdb.loop",
    "softsgx.engines.native.gdb.server",
    "softsgx.engines.native.memory.fetches",
    "softsgx.engines.native.memory.foreign",
    "softsgx.engines.native.memory.mprotect",
    "softsgx.engines.native.recording.page_table",
    "softsgx.engines.native.recording.pagers",
    "softsgx.engines.native.recording.recorder",
    "softsgx.engines.native.recording.recording",
    "softsgx.engines.native.syscalls.call_log",
    "softsgx.engines.native.syscalls.ioctl",
    "softsgx.engines.native.syscalls.maps",
    "softsgx.engines.native.tracing.orphans",
    "softsgx.engines.native.vdso.areas",
    "softsgx.engines.native.vdso.crossing",
    "softsgx.engines.native.vdso.crossing_sites",
    "softsgx.engines.native.vdso.entry_code",
    "softsgx.engines.native.vdso.host_jumps",
    "softsgx.engines.native.vdso.moved_state",
    "softsgx.engines.native.vdso.out_of_line",
    "softsgx.engines.native.vdso.state_code",
    "softsgx.engines.native.x86.cpuinfo",
    "softsgx.engines.native.x86.forbidden",
    "softsgx.engines.native.x86.state",
    "softsgx.host.guest",
    "softsgx.hw.access",
    "softsgx.hw.cet",
    "softsgx.hw.dispatch",
    "softsgx.hw.entry",
    "softsgx.hw.events",
    "softsgx.hw.extended_state",
    "softsgx.hw.leaves.aex",
    "softsgx.hw.leaves.registry",
    "softsgx.hw.msr",
    "softsgx.hw.optimised.entry",
    "softsgx.hw.optimised.paging",
    "softsgx.hw.secs",
    "softsgx.hw.tracking",
    "softsgx.image",
    "softsgx.kvm.device",
    "softsgx.kvm.guest",
    "softsgx.live.runs",
    "softsgx.report.html",
    "softsgx.report.perfetto",
    "softsgx.report.run_document",
    "softsgx.report.sampler",
    "softsgx.report.tables",
    "softsgx.runtime.exploration",
    "softsgx.runtime.seeded",
    "softsgx.runtime.threads",
    "softsgx.sim",
    "softsgx.userland.process",
)


IMPORT = "import sys, softsgx.cli.run; print(*sys.modules)"
RUN = (
    "import sys; from softsgx.cli import main;"
    "main(['run', '--quiet', '--', '/bin/true']); print(*sys.modules)"
)


@pytest.mark.parametrize("code", [IMPORT, pytest.param(RUN, marks=needs_tracing)])
def test_the_run_command_imports_nothing_that_a_run_does_not_need(code: str) -> None:
    # Without site, which may import for tools that measure the tests.
    argv = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "softsgx.engines.native.supervisor" in modules
    early = sorted(set(NOT_FOR_A_RUN) & set(modules))
    assert not early, f"a program without a device imports {early}; import them at their first use"
    assert len(modules) < MODULES_OF_A_RUN, f"a program without a device imports {modules}"
