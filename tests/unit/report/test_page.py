"""The page needs nothing from elsewhere, and samples cover a run whatever its length."""

from __future__ import annotations

import re
import sys
import threading
from dataclasses import replace
from html import escape

import pytest
from tests.support.report import Story, told

from softsgx.errors import SoftSgxError
from softsgx.report import Sample, Sampler, Ticker, html_page, require_plotly

pytest.importorskip("plotly")
PLOTLY = re.compile(r"<script>.*?</script>", re.S)


def sampled() -> tuple[Story, list[Sample]]:
    story = Story()
    sampler = Sampler(story.collector, work_ns=lambda: 0)
    made = story.enclave()
    for _ in range(20):
        story.touch(made)
        sampler.take()
    return story, sampler.samples


def test_the_page_loads_nothing() -> None:
    story, samples = sampled()
    page = html_page(story.summary(), samples)
    assert not re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=", page)
    assert "plotly.js v" in page
    assert page.count("Plotly.newPlot(") >= 4


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
    text = PLOTLY.sub("", html_page(run, []))
    for item in run.estimate.items:
        assert escape(item.price.what) in text
        assert escape(item.price.source) in text


def test_a_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(SoftSgxError, match=r"pip install 'softsgx\[report\]'"):
        require_plotly()


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
