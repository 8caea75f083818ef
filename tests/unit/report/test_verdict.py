"""The verdict names what was too small, if anything was, and the option that enlarges it."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.report import Story, enclave_summary, made_up, told

from softsgx.arch import PAGE_BYTES
from softsgx.cli import parser_of
from softsgx.cli._program import config_of, group_of
from softsgx.host import PROFILES, least_bytes
from softsgx.report import Fit, GroupSummary, RunSummary, verdict
from softsgx.sizes import parse_size


def without_limit(run: RunSummary) -> RunSummary:
    return replace(run, groups=(GroupSummary("/", None, 1 << 20, 0),))


def test_a_run_without_an_enclave_gets_no_advice() -> None:
    judged = verdict(made_up())
    assert (judged.fit, judged.next_option) == (Fit.NO_ENCLAVE, None)
    assert judged.text == "No enclave was created."


def test_an_epc_that_no_page_left_was_big_enough() -> None:
    story = Story(epc_pages=256)
    made = story.enclave()
    story.touch(made)
    made.process.exit()
    run = story.summary()
    judged = verdict(run)
    assert judged.fit is Fit.FITS
    assert judged.text.startswith("The EPC was big enough: no page left it; ")
    assert f"{judged.touched} pages were touched, {judged.added} were added" in judged.text
    assert judged.next_option is not None
    size = parse_size(judged.next_option.removeprefix("--epc "))
    assert size < run.platform.peak_epc_bytes


def test_an_epc_that_made_pages_come_back_was_too_small() -> None:
    run = told().summary()
    judged = verdict(run)
    assert judged.fit is Fit.SMALL
    assert judged.evictions == sum(enclave.evictions for enclave in run.enclaves) > 0
    assert judged.next_option is not None
    assert parse_size(judged.next_option.removeprefix("--epc ")) == 2 * run.platform.epc_bytes
    assert 0 < judged.silicon < 1
    assert "(estimated)" in judged.text


def test_a_limit_that_refused_charges_is_named_instead_of_the_epc() -> None:
    judged = verdict(made_up(enclave_summary(1, busy=100)))
    assert judged.limited_by == ("/jobs/a",)
    assert judged.text.startswith("The limit of /jobs/a was too small: 4,400 pages left it")
    assert judged.next_option == "--limit jobs/a=2MiB"
    assert verdict(without_limit(made_up(enclave_summary(1, busy=100)))).limited_by == ()


@pytest.mark.parametrize(("reloads", "program_s"), [(0, 0.1), (1, 1000.0)])
def test_pages_that_left_without_much_cost_are_no_reason_for_a_larger_epc(
    reloads: int, program_s: float
) -> None:
    enclave = replace(enclave_summary(1, busy=1), reloads=reloads)
    run = replace(without_limit(made_up(enclave)), program_s=program_s)
    judged = verdict(run)
    assert judged.fit is Fit.NEARLY
    assert judged.text.startswith("The EPC was nearly big enough: 44 pages left it")


def test_the_share_of_faults_is_of_the_run() -> None:
    enclave = replace(enclave_summary(1, busy=10), fault_s=0.75)
    run = replace(without_limit(made_up(enclave)), wall_s=1.5)
    assert verdict(run).here == 0.5
    assert verdict(replace(run, wall_s=0.5)).here == 1.0


@given(
    profile=st.sampled_from(sorted(PROFILES)),
    epc_pages=st.integers(21, 1 << 24),
    share=st.floats(0, 1),
    limit_pages=st.none() | st.integers(1, 1 << 20),
    path=st.sampled_from(["/jobs/a", "/-x", "/two words", "/it's", "/a=b", "/$HOME"]),
    evictions=st.sampled_from([0, 100]),
    reloads=st.sampled_from([0, 100]),
)
def test_run_accepts_the_option_that_a_verdict_advises(
    profile: str,
    epc_pages: int,
    share: float,
    limit_pages: int | None,
    path: str,
    evictions: int,
    reloads: int,
) -> None:
    run = made_up(replace(enclave_summary(1, busy=100), evictions=evictions, reloads=reloads))
    peak = int(share * epc_pages) * PAGE_BYTES
    epc = epc_pages * PAGE_BYTES
    platform = replace(run.platform, profile=profile, epc_bytes=epc, peak_epc_bytes=peak)
    limit = None if limit_pages is None else limit_pages * PAGE_BYTES
    groups = (GroupSummary("/", None, peak, 0), GroupSummary(path, limit, peak, 9))
    judged = verdict(replace(run, platform=platform, groups=groups))
    if judged.next_option is None:
        assert judged.fit is not Fit.SMALL
        assert peak <= least_bytes(profile)
        assert "try" not in judged.text
        return
    assert judged.next_option in judged.text
    words = [*shlex.split(judged.next_option), "--profile", profile, "--", "./app"]
    args = parser_of("run").parse_args(words)
    config = config_of(args)
    assert not config.roundings()
    if judged.fit is not Fit.SMALL:
        assert sum(config.section_bytes()) < peak
    elif judged.limited_by:
        assert group_of(args, config) == path.strip("/")
    else:
        assert sum(config.section_bytes()) == 2 * epc
