"""Doctor tells what this machine allows, in words, and chooses a pager that works."""

from __future__ import annotations

from importlib import import_module

import pytest

from softsgx.engines.native import PAGERS, choose_pager, doctor

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
