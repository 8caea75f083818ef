"""``softsgx run --metrics``: the samples for Prometheus, and the queries of Grafana's dashboard.

Goal: every sample equals the state, under names that the conventions allow.  Method: scrapes
of a platform that pages, read by Prometheus' own parser.
"""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from tests.support.report import Story

from softsgx import live
from softsgx.errors import SoftSgxError
from softsgx.live.metrics import MetricsServer

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "examples/grafana/softsgx.json").read_text())
RECORDING = {"accesses": 70, "intervals": 3, "late_intervals": 1, "used_bytes": 1 << 20} | {
    "most_bytes": 1 << 16
}
ABOUT = live.About(17, "run", ["./app"], "2026-01-01T00:00:00+00:00")


class Scraped:
    """A platform that has paged, and its endpoint."""

    def __init__(self) -> None:
        self.story = Story(groups={"jobs": {"max": "104KiB"}})
        self.made = self.story.enclave(group="jobs")
        self.story.touch(self.made)
        self.more: dict[str, Any] = {}
        self.server = MetricsServer("0", self.state)
        self.server.start()

    def state(self) -> dict[str, Any]:
        return {**live.state(self.story.collector, ABOUT), **self.more}

    def families(self) -> dict[str, Metric]:
        with urllib.request.urlopen(self.server.url) as answer:
            text = answer.read().decode()
        return {family.name: family for family in text_string_to_metric_families(text)}

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families().values()
            for sample in family.samples
        }


@pytest.fixture
def scraped() -> Iterator[Scraped]:
    made = Scraped()
    yield made
    made.server.close()


def test_samples_are_what_the_state_says(scraped: Scraped) -> None:
    samples, state = scraped.samples(), scraped.state()
    (enclave,) = state["enclaves"]

    def value(name: str, /, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    own = {"pid": "", "enclave": "1", "name": "", "group": "/jobs"}
    assert value("softsgx_epc_used_bytes") == state["epc"]["used_bytes"]
    assert value("softsgx_epc_pages", kind="va") == state["epc"]["pages"]["va"]
    assert value("softsgx_group_limit_bytes", group="/jobs") == 104 << 10
    assert ("softsgx_group_limit_bytes", frozenset({("group", "/")})) not in samples
    assert value("softsgx_enclave_resident_bytes", **own) == enclave["resident_bytes"]
    assert value("softsgx_enclave_evictions_total", **own) == enclave["evictions"] > 0
    assert value("softsgx_evictions_total") == enclave["evictions"]
    assert value("softsgx_crossings_total", leaf="eenter") == enclave["eenter"] > 0
    by_kind = [
        number
        for (name, _labels), number in samples.items()
        if name == "softsgx_enclave_faults_total"
    ]
    assert sum(by_kind) == value("softsgx_faults_total") == enclave["faults"]
    assert value("softsgx_start_time_seconds") == 1767225600


def test_names_follow_the_conventions_of_prometheus(scraped: Scraped) -> None:
    for family in scraped.families().values():
        assert re.fullmatch(r"softsgx_[a-z_]+", family.name)
        assert family.documentation
        assert family.type in ("counter", "gauge")
        assert not family.name.endswith("_total"), "a family's name has no suffix"
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert not re.search("_(ms|us|ns|kib|mib|cycles)(_|$)", sample.name)


def test_totals_stay_when_an_enclave_goes_and_its_own_series_end(scraped: Scraped) -> None:
    before = scraped.samples()
    scraped.made.process.exit()
    after = scraped.samples()
    key = ("softsgx_evictions_total", frozenset[tuple[str, str]]())
    assert after[key] >= before[key] > 0
    assert not [name for name, _labels in after if name.startswith("softsgx_enclave_")]
    assert after["softsgx_enclaves", frozenset[tuple[str, str]]()] == 0


def test_the_labels_of_an_enclave_stay_when_its_first_process_ends(scraped: Scraped) -> None:
    driver = scraped.story.platform.driver
    assert driver is not None
    (entry,) = driver.enclaves[0].mms
    entry.mm.pid = 4_000_001
    before = [key for key in scraped.samples() if key[0].startswith("softsgx_enclave_")]
    entry.mm.pid = 4_000_002
    after = [key for key in scraped.samples() if key[0].startswith("softsgx_enclave_")]
    assert before == after
    assert all(("pid", "4000001") in labels for _name, labels in before)


def test_a_client_that_sends_nothing_delays_no_scrape(scraped: Scraped) -> None:
    with socket.create_connection(("127.0.0.1", int(scraped.server.url.split(":")[2][:-8]))):
        assert scraped.samples()


def test_only_this_machine_reaches_the_port_unless_an_address_is_given(scraped: Scraped) -> None:
    assert scraped.server.url.startswith("http://127.0.0.1:")
    assert scraped.server.any_port


def test_a_port_that_is_taken_is_one_line(scraped: Scraped) -> None:
    port = scraped.server.url.split(":")[2][:-8]
    with pytest.raises(SoftSgxError, match=rf"--metrics {port}: .*; choose another port"):
        MetricsServer(port, scraped.state)


@pytest.mark.parametrize(
    "place", ["", "x", "65536", "-1", "host.invalid:80", "1:2:3", "127.0.0.1:"]
)
def test_what_is_no_place_is_one_line(scraped: Scraped, place: str) -> None:
    with pytest.raises(SoftSgxError, match="not an address"):
        MetricsServer(place, scraped.state)


def test_nothing_listens_when_the_run_has_ended(scraped: Scraped) -> None:
    scraped.server.close()
    with pytest.raises(OSError, match="refused"):
        scraped.families()


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_only_for_metrics_and_labels_that_exist(scraped: Scraped) -> None:
    families = scraped.families()
    existing = {sample.name for family in families.values() for sample in family.samples}
    labels = {
        sample.name: {*sample.labels, "instance"}
        for family in families.values()
        for sample in family.samples
    }
    queries = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"][1:]]
    asked = {name for text in expressions() + queries for name in re.findall(r"softsgx_\w+", text)}
    assert asked <= existing
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for name in re.findall(r"softsgx_\w+", target["expr"]):
                assert shown <= labels[name], target["expr"]


def test_counters_are_shown_as_rates_and_panels_do_not_overlap() -> None:
    for expression in expressions():
        for name in re.findall(r"softsgx_\w+_total", expression):
            assert f"rate({name}{{" in expression
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _y in cells} == set(range(24))


def test_an_ordinary_program_without_an_epc_has_no_metrics_of_one(scraped: Scraped) -> None:
    scraped.more = {"epc": None, "groups": [], "recording": RECORDING}
    samples = scraped.samples()
    names = {name for name, _labels in samples}
    assert not [name for name in names if name.startswith("softsgx_epc_")]
    nothing: frozenset[tuple[str, str]] = frozenset()
    assert samples["softsgx_recorded_accesses_total", nothing] == 70
    assert samples["softsgx_recorded_late_intervals_total", nothing] == 1
    assert samples["softsgx_recorded_interval_most_bytes", nothing] == 1 << 16


def test_the_documentation_names_every_metric(scraped: Scraped) -> None:
    text = (ROOT / "docs/how-to/metrics.md").read_text()
    named = set(re.findall(r"`(softsgx_\w+)`", text))
    scraped.more["recording"] = RECORDING
    assert named == {
        sample.name for family in scraped.families().values() for sample in family.samples
    }
