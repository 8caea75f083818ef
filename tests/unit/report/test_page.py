"""The page needs no other files, and samples cover a run of any length."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest
from tests.support.report import Story, enclave_summary, made_up, told

from softsgx.report import RunSummary, Sample, Sampler, Ticker, html_page

LARGEST_BYTES = 400 * 1000
VOID = {"meta"}


def sampled(rounds: int = 20) -> tuple[Story, list[Sample]]:
    story = Story()
    sampler = Sampler(story.collector, work_ns=lambda: 0)
    made = story.enclave()
    for _ in range(rounds):
        story.touch(made)
        sampler.take()
    return story, sampler.samples


def fitting() -> RunSummary:
    """A run that touched pages and paged nothing."""
    story = Story(epc_pages=128)
    story.touch(story.enclave(8))
    return story.summary()


class Elements(HTMLParser):
    """What is in a page, and whether its elements are nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.feed(page)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed and another element is open"


def test_the_page_loads_nothing() -> None:
    story, samples = sampled()
    page = html_page(story.summary(), samples)
    assert not re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=", page)
    assert "http" not in page
    assert "url(" not in page and "@import" not in page


def test_elements_are_nested_and_tables_have_heads_and_captions() -> None:
    story, samples = sampled()
    seen = Elements(html_page(story.summary(), samples)).seen
    assert seen["table"] == seen["thead"] == 4
    assert seen["figure"] == seen["figcaption"] == 4 + seen["table"]


def test_a_large_run_makes_a_small_page() -> None:
    """A thousand samples, and more enclaves than a table shows."""
    enclaves = [enclave_summary(number, busy=number) for number in range(1, 301)]
    resident = {number: 1000 + number for number in range(1, 65)}
    samples = [
        Sample(at / 7, 4000 + at % 97, 13 * at, 11 * at, 9 * at, at / 99, resident)
        for at in range(1024)
    ]
    page = html_page(made_up(*enclaves), samples)
    Elements(page)
    assert len(page.encode()) < LARGEST_BYTES


def test_a_chart_keeps_the_highest_value_of_a_long_run() -> None:
    samples = [Sample(at / 10, 5000 if at == 501 else 10, 0, 0, 0, 0.0, {}) for at in range(1000)]
    page = html_page(made_up(enclave_summary(1, busy=1)), samples)
    found = re.search(r"<script type='application/json'>(.*?)</script>", page)
    assert found is not None
    (used,) = (one for one in json.loads(found[1])["series"] if one["name"] == "all in use")
    assert max(used["y"]) == pytest.approx(5000 * 4096 / 2**20, rel=1e-3)


def test_the_verdict_comes_before_everything_but_the_title() -> None:
    page = html_page(told().summary(), [])
    assert 0 < page.index("class='verdict small'") < page.index("class='tiles'")


def test_a_run_that_did_not_page_has_no_alarm() -> None:
    page = html_page(fitting(), [])
    body = page.partition("<body>")[2]
    assert "class='verdict fits'" in body
    assert "no page left the EPC" in body
    assert "no page was loaded again" in body
    assert "class='warn'" not in body


def test_first_touches_are_distinguished_from_reloads() -> None:
    run = made_up(enclave_summary(1, busy=100))
    body = html_page(run, []).partition("<body>")[2]
    assert "<b>4,600</b><span>page faults: 100 first touches, 4,100 reloads, 400 others" in body
    assert "<b>4,100</b><span>pages came back" in body


def test_the_limit_that_made_pages_leave_is_the_line_of_the_chart() -> None:
    samples = [Sample(at / 10, 200, 0, 0, 0, 0.0, {1: 190}) for at in range(3)]
    run = made_up(enclave_summary(1, busy=3))
    assert "<span class='mark' style='top:0.0%'>limit of /jobs/a 1 MiB</span>" in html_page(
        run, samples
    )
    unlimited = replace(run, groups=run.groups[:1])
    assert "The EPC of 93.5 MiB is far above." in html_page(unlimited, samples)


def test_limits_and_refusals_are_shown() -> None:
    body = html_page(made_up(enclave_summary(1, busy=3)), [])
    row = re.search(r"<tr><th scope='row' class='text'>/jobs/a</th>(.*?)</tr>", body)
    assert row is not None
    assert re.findall(r"<td>(.*?)</td>", row[1]) == ["1 MiB", "1 MiB", "9"]


def test_the_page_tells_date_version_options_and_measurements() -> None:
    body = html_page(made_up(enclave_summary(7, busy=1)), [])
    for fact in ("2026-01-02T03:04:05+00:00", "1.2.3", "--epc 93.5MiB", "07" * 32):
        assert f"<code>{fact}</code>" in body


def test_defects_that_are_switched_on_are_a_warning() -> None:
    run = told().summary()
    run = replace(run, platform=replace(run.platform, defects=("B1",)))
    assert "<p class='warn'>Defects switched on: B1</p>" in html_page(run, [])


def test_without_samples_there_are_no_charts_over_time() -> None:
    page = html_page(told().summary(), [])
    assert "Resident in the EPC" not in page
    assert "Where the time went" in page


def test_a_command_cannot_write_into_the_page() -> None:
    run = replace(Story().summary(), command=("<script>alert(1)</script>",))
    assert "alert(1)</script>" not in html_page(run, [])
    assert "&lt;script&gt;alert(1)" in html_page(run, [])


def test_every_price_used_is_listed_with_its_source() -> None:
    run = told().summary()
    text = html_page(run, [])
    for item in run.estimate.items:
        assert escape(item.price.what) in text
        assert escape(item.price.source) in text


def test_samples_are_bounded_and_keep_the_first_and_the_last() -> None:
    story = Story()
    sampler = Sampler(story.collector, work_ns=lambda: 0, limit=16)
    for _ in range(1000):
        sampler.take()
    times = [sample.time_s for sample in sampler.samples]
    assert 8 <= len(times) <= 17
    assert times == sorted(times)
    assert times[0] < 0.01 * times[-1]


def test_the_interval_doubles_when_samples_are_dropped() -> None:
    story = Story()
    sampler = Sampler(story.collector, work_ns=lambda: 0, limit=4)
    first = sampler.interval_s
    for _ in range(5):
        sampler.take()
    assert sampler.interval_s == 2 * first


def test_a_sample_that_takes_long_is_taken_rarely() -> None:
    story = Story()
    now = iter(range(0, 10**12, 10**8))
    sampler = Sampler(story.collector, work_ns=lambda: next(now))
    assert sampler.tick() >= 50 * 0.1


def test_sums_in_samples_only_grow() -> None:
    _, samples = sampled()
    for name in ("time_s", "faults", "evictions", "reloads", "fault_s"):
        values = [getattr(sample, name) for sample in samples]
        assert values == sorted(values)
    assert samples[-1].faults > samples[0].faults


def test_a_ticker_calls_until_it_is_stopped_and_not_after() -> None:
    enough, calls = threading.Event(), []

    def tick() -> float:
        calls.append(1)
        if len(calls) == 3:
            enough.set()
        return 0.0

    ticker = Ticker(tick, 0.0)
    assert enough.wait(30)
    ticker.stop()
    seen = len(calls)
    assert seen == len(calls) >= 3
