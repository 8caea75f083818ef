"""Doctor tells what this machine allows, in words, and chooses a pager that works."""

from __future__ import annotations

from softsgx.engines.native import PAGERS, choose_pager, doctor


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
