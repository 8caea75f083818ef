"""Doctor tells what this machine allows, in words, and chooses a pager that works."""

from __future__ import annotations

from errno import ENODEV
from importlib import import_module

import pytest

from softsgx.engines.native import PAGERS, abi, choose_pager, doctor, requirements

MODULE = import_module("softsgx.engines.native.doctor")  # the package has a function of that name


def test_every_finding_says_something() -> None:
    findings = doctor()
    assert {finding.name for finding in findings} >= {
        *("platform", "ptrace", "seccomp", "pidfd_getfd", "userfaultfd", "CPUID faulting"),
        "ENCLU",
    }
    assert all(finding.text for finding in findings)
    assert all("\n" not in finding.text for finding in findings)


def test_the_chosen_pager_is_the_first_that_works() -> None:
    works = {finding.name: finding.ok for finding in doctor()}
    assert choose_pager() in PAGERS
    assert (choose_pager() == "userfaultfd") is works["userfaultfd"]


@pytest.mark.parametrize(
    ("probe", "name", "flag"),
    [
        ("can_ptrace", "ptrace", "--cap-add=SYS_PTRACE"),
        ("can_read_memory", "process_vm_readv", "--cap-add=SYS_PTRACE"),
        ("can_getfd", "pidfd_getfd", "--cap-add=SYS_PTRACE"),
        ("can_userfaultfd", "userfaultfd", "--security-opt seccomp=unconfined"),
    ],
)
def test_an_operation_that_a_container_forbids_is_reported_with_the_flag_that_allows_it(
    monkeypatch: pytest.MonkeyPatch, probe: str, name: str, flag: str
) -> None:
    monkeypatch.setattr(MODULE, probe, lambda: False)
    found = next(finding for finding in doctor() if finding.name == name)
    assert not found.ok
    assert flag in found.text


def test_what_a_run_requires_is_what_doctor_calls_needed() -> None:
    needed = [finding for finding in doctor() if finding.needed]
    assert requirements() == needed


@pytest.mark.parametrize("follows", [False, True])
def test_a_tracer_hinders_a_run_only_if_it_follows_children(
    monkeypatch: pytest.MonkeyPatch, follows: bool
) -> None:
    monkeypatch.setattr(MODULE, "own_tracer", lambda: 4711)
    monkeypatch.setattr(MODULE, "can_ptrace", lambda: not follows)
    ptrace = next(finding for finding in requirements() if finding.name == "ptrace")
    assert ptrace.ok is not follows


@pytest.mark.parametrize("executes", [1, 0])
@pytest.mark.parametrize("supported", [False, True])
def test_cpuid_faulting_is_probed_without_a_change(
    monkeypatch: pytest.MonkeyPatch, executes: int, supported: bool
) -> None:
    set_to = []

    def syscall(number: int, code: int, argument: int) -> int:
        assert number == abi.SYS_ARCH_PRCTL
        if code == abi.ARCH_GET_CPUID:
            return executes
        set_to.append(argument)
        if not supported:
            raise OSError(ENODEV, "no CPUID faulting")
        return 0

    monkeypatch.setattr(MODULE.libc, "syscall", syscall)
    assert MODULE.can_fault_cpuid.__wrapped__() is supported
    assert set_to == [executes]
