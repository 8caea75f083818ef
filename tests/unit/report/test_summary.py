"""Summaries agree with the stream of events, although they are made without it.

Goal: the counts that driver, core and processor keep are those that a listener would have counted.
Method: the same history with a listener and without; the test counts the events.
"""

from __future__ import annotations

from tests.support.report import EPC_PAGES, Story, told

from softsgx.driver import FaultHandled, ProcessorsKicked
from softsgx.hw import AsynchronousExit, LeafDone
from softsgx.paging import events
from softsgx.report import EnclaveSummary, RunSummary

PAGE = 4096


def heard(story: Story) -> dict[str, int]:
    """The same numbers from the events, of all enclaves together."""

    def leaves(name: str) -> int:
        return sum(
            isinstance(event, LeafDone) and event.leaf == name and event.result == "SGX_SUCCESS"
            for event in story.events
        )

    evicted = [event for event in story.events if isinstance(event, events.Evicted)]
    loaded = [event for event in story.events if isinstance(event, events.Loaded)]
    tracked = [event for event in story.events if isinstance(event, events.TrackingRound)]
    return {
        "evictions": sum(event.kind == "page" for event in evicted),
        "reloads": sum(event.kind not in ("secs", "va") for event in loaded),
        "ewb": sum(event.tries for event in evicted if event.kind != "va"),
        "etrack": sum(event.step == "etrack" for event in tracked),
        "ipi": sum(isinstance(event, ProcessorsKicked) for event in story.events),
        "eenter": leaves("eenter"),
        "eexit": leaves("eexit"),
        "eresume": leaves("eresume"),
        "aex": sum(isinstance(event, AsynchronousExit) for event in story.events),
        "fault_count": sum(isinstance(event, FaultHandled) for event in story.events),
    }


def counted(run: RunSummary, *names: str) -> dict[str, int]:
    return {name: sum(getattr(enclave, name) for enclave in run.enclaves) for name in names}


def test_counts_are_those_that_a_listener_hears() -> None:
    story = told(listen=True)
    expected = heard(story)
    assert expected["evictions"] > 50, "the story does not page"
    assert counted(story.summary(), *expected) == expected


def test_counts_are_the_same_without_a_tracer() -> None:
    names = ("evictions", "reloads", "ewb", "etrack", "ipi", "eenter", "aex", "fault_count")
    assert counted(told().summary(), *names) == counted(told(listen=True).summary(), *names)


def test_the_peak_is_the_most_that_was_resident_at_any_time() -> None:
    story = Story()
    made = story.enclave()
    most = made.enclave.resident_pages
    thread = made.thread()
    for page in range(made.data_pages):
        thread.store(made.data(page), b"x")
        most = max(most, made.enclave.resident_pages)
    (enclave,) = story.collector.enclaves()
    assert enclave.peak_resident_bytes >= most * PAGE
    assert enclave.peak_resident_bytes < EPC_PAGES * PAGE
    assert enclave.resident_bytes == made.enclave.resident_pages * PAGE


def test_a_small_enclave_peaks_with_all_its_pages() -> None:
    story = Story(epc_pages=64)
    story.enclave(4)
    (enclave,) = story.collector.enclaves()
    assert enclave.peak_resident_bytes == 7 * PAGE
    assert enclave.pages_added == 7


def test_crossings_survive_the_eviction_of_the_secs() -> None:
    story = Story()
    made = story.enclave(2)
    story.touch(made)
    while made.enclave.resident_pages:
        story.platform.core.reclaim(force=True)
    assert story.platform.core.counters.secs_out
    story.touch(made)
    (enclave,) = story.collector.enclaves()
    assert (enclave.eenter, enclave.eexit) == (2, 2)


def test_an_enclave_that_is_gone_stays_in_the_summary_as_it_was() -> None:
    story = Story()
    made = story.enclave()
    story.touch(made)
    (before,) = story.collector.enclaves()
    made.process.exit()
    (after,) = story.collector.enclaves()
    assert before.released_s is None
    assert after.released_s is not None
    assert after.released_s > after.created_s
    assert (after.evictions, after.eenter) == (before.evictions, before.eenter)
    assert after.resident_bytes == 0


def test_enclaves_are_distinguished() -> None:
    large, small = told().summary().enclaves
    assert (large.number, small.number) == (1, 2)
    assert (large.eenter, small.eenter) == (3, 1)
    assert large.reloads > small.reloads


def test_a_file_that_never_became_an_enclave_is_not_reported() -> None:
    story = Story()
    process = story.platform.process()
    process.open()
    process.exit()
    assert story.collector.enclaves() == ()


def test_a_killed_enclave_is_marked() -> None:
    story = Story()
    made = story.enclave(4)
    made.file.kill()
    (enclave,) = story.collector.enclaves()
    assert enclave.state == "killed"


def test_sums_go_on_when_an_enclave_goes() -> None:
    story = Story()
    made, other = story.enclave(), story.enclave(4)
    story.touch(made)
    story.touch(other)
    before = story.collector.totals()
    made.process.exit()
    after = story.collector.totals()
    assert (before.faults, before.evictions) == (after.faults, after.evictions)
    assert after.faults > 0
    assert list(story.collector.resident()) == [2]


def test_a_group_tells_its_limit_and_what_it_refused() -> None:
    story = Story(epc_pages=64, groups={"jobs": {"max": 28 * PAGE}})
    story.enclave(30, group="jobs")
    root, jobs = story.summary().groups
    assert (root.path, root.max_bytes) == ("/", None)
    assert (jobs.path, jobs.max_bytes, jobs.peak_bytes) == ("/jobs", 28 * PAGE, 28 * PAGE)
    assert jobs.refused > 0
    assert story.summary().enclaves[0].group == "/jobs"


def test_time_in_faults_is_the_clock_s_between_their_begin_and_end() -> None:
    story = told()
    for enclave in story.summary().enclaves:
        # The clock ticks at each look, and a fault looks at least twice.
        assert enclave.fault_s >= enclave.fault_count * 1e-6


def test_what_is_priced_is_what_was_counted() -> None:
    enclave: EnclaveSummary = told().summary().enclaves[0]
    priced = {item.price.event: item.count for item in enclave.estimate.items}
    assert priced["ewb"] == enclave.evictions
    assert priced["eldu"] == enclave.reloads
    assert priced["fault"] == enclave.fault_count
    assert priced["eenter"] == enclave.eenter


def test_a_program_ended_by_a_signal_has_no_exit_status() -> None:
    run = Story().summary(-15)
    assert (run.exit_status, run.signal) == (None, "SIGTERM")
    assert Story().summary(-35).signal == "SIGRTMIN+1"
    assert (Story().summary(3).exit_status, Story().summary(3).signal) == (3, None)


def test_pages_that_were_touched_are_counted_once_each() -> None:
    """First touches, reloads and a second process that maps the page: one page each."""
    story = Story()
    made = story.enclave()
    thread = made.thread()
    for _round in range(5):
        for page in range(0, made.data_pages, 2):
            thread.store(made.data(page), b"x")
        while made.enclave.resident_pages > 4:
            story.platform.core.reclaim(force=True)
    thread.exit()
    child = made.process.fork()
    other = child.thread(1)
    other.enter(made.tcs())
    other.load(made.data(0))
    other.exit()
    (enclave,) = story.collector.enclaves()
    assert enclave.reloads > 2 * made.data_pages
    inside = {made.data(page) for page in range(0, made.data_pages, 2)}
    framework = {made.tcs() + at * PAGE for at in range(2)}  # the TCS, and the SSA frame in use
    assert enclave.pages_touched == len(inside | framework)
    assert enclave.pages_added == made.data_pages + 3
