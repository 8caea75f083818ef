"""The state of a run as metrics that Prometheus scrapes: ``http://127.0.0.1:PORT/metrics``.

Units are Prometheus' base units, bytes and seconds; names of counters end with ``_total``.  Each
scrape reads the state again; nothing is computed between scrapes.

Source:
    Prometheus, "Metric and label naming", "Writing exporters".
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from softsgx.errors import SoftSgxError
from softsgx.report.summary import FAULT_KINDS

__all__ = ["MetricsServer", "RunMetrics"]

_LOOPBACK = "127.0.0.1"
_PORTS = 1 << 16
_PATIENCE_S = 5.0
_ENCLAVE_LABELS = ("pid", "enclave", "name", "group")
_LEAVES = ("eenter", "eexit", "aex", "eresume")
_COUNTS = {
    "faults": "Page faults in enclaves",
    "evictions": "Enclave pages evicted by EWB, without SECS and VA pages",
    "reloads": "Enclave pages loaded by ELDU, without SECS and VA pages",
    "fault_seconds": "Time spent in page faults in enclaves, waiting included",
}


class MetricsServer:
    """Answers scrapes from :meth:`start` to :meth:`close`.

    Args:
        place: ``PORT`` (on 127.0.0.1; 0 for one that is free) or ``ADDRESS:PORT``.
        state: as :func:`softsgx.live.state` returns it; called in threads of the server.

    Attributes:
        url: address of the metrics.
        any_port: whether the kernel has chosen the port.

    Raises:
        SoftSgxError: the place is not an address, or listening there fails.
    """

    def __init__(self, place: str, state: Callable[[], dict[str, Any]]) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(RunMetrics(state))
        try:
            self._server = _Server(_address(place), _Handler.factory(registry))
        except OSError as error:
            raise SoftSgxError(
                f"--metrics {place}: {error.strerror or error}; choose another port"
            ) from error
        host, port = self._server.server_address[:2]
        host = str(host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
        self.any_port = place.rpartition(":")[2].strip("0") == ""
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to answer, in a thread."""
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._server.socket.shutdown(socket.SHUT_RDWR)  # the wait for a connection ends
            self._thread.join()
        self._server.socket.close()

    def _serve(self) -> None:
        while not self._closed:
            self._server.handle_request()


class RunMetrics(Collector):
    """The metrics of one run.

    Args:
        state: returns the state.
    """

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self._state = state
        # Labels of a series must not change: an enclave keeps the process that was seen first.
        self._labels: dict[int, tuple[str, ...]] = {}

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        state = self._state()
        yield from _run(state)
        if state["epc"] is not None:
            yield from _epc(state)
        if "recording" in state:
            yield from _recording(state["recording"])
        yield from _groups(state["groups"])
        yield from _totals(state)
        yield from self._enclaves(state["enclaves"])

    def _enclaves(self, enclaves: list[dict[str, Any]]) -> Iterator[Metric]:
        self._labels = {enclave["number"]: self._labels_of(enclave) for enclave in enclaves}
        labelled = [(self._labels[enclave["number"]], enclave) for enclave in enclaves]
        sizes = {
            "size_bytes": "Linear range of an enclave",
            "resident_bytes": "Pages of an enclave in the EPC, without SECS and VA pages",
        }
        for name, text in sizes.items():
            gauge = GaugeMetricFamily(f"softsgx_enclave_{name}", text, labels=_ENCLAVE_LABELS)
            for labels, enclave in labelled:
                gauge.add_metric(labels, enclave[name])
            yield gauge
        for name, text in _COUNTS.items():
            more = ("kind",) if name == "faults" else ()
            counter = CounterMetricFamily(
                f"softsgx_enclave_{name}", text, labels=(*_ENCLAVE_LABELS, *more)
            )
            for labels, enclave in labelled:
                if not more:
                    counter.add_metric(labels, enclave[name])
                    continue
                for kind in FAULT_KINDS:
                    counter.add_metric((*labels, kind), enclave["faults_by_kind"].get(kind, 0))
            yield counter
        counter = CounterMetricFamily(
            "softsgx_enclave_crossings",
            "Entries and exits of an enclave",
            labels=(*_ENCLAVE_LABELS, "leaf"),
        )
        for labels, enclave in labelled:
            for leaf in _LEAVES:
                counter.add_metric((*labels, leaf), enclave[leaf])
        yield counter

    def _labels_of(self, enclave: dict[str, Any]) -> tuple[str, ...]:
        known = self._labels.get(enclave["number"])
        if known is not None and known[0]:
            return known
        pid = str(enclave["pids"][0]) if enclave["pids"] else ""
        return pid, str(enclave["number"]), enclave["name"], enclave["group"]


def _run(state: Mapping[str, Any]) -> Iterator[Metric]:
    labels = ("verb", "program", "profile", "pager", "version")
    info = GaugeMetricFamily("softsgx_run_info", "The run; always 1", labels=labels)
    values = {**state, "program": state["command"][0]}
    info.add_metric([values[name] for name in labels], 1)
    yield info
    yield GaugeMetricFamily(
        "softsgx_start_time_seconds",
        "Start of the program, seconds since 1970",
        datetime.fromisoformat(state["began"]).timestamp(),
    )


def _recording(recording: Mapping[str, Any]) -> Iterator[Metric]:
    for name, key, text in (
        ("accesses", "accesses", "Accesses recorded of an ordinary program"),
        ("intervals", "intervals", "Intervals that had accesses"),
        ("late_intervals", "late_intervals", "Intervals that took more than twice their length"),
    ):
        yield CounterMetricFamily(f"softsgx_recorded_{name}", text, recording[key])
    for name, key, text in (
        ("used_bytes", "used_bytes", "Pages that an ordinary program has accessed so far"),
        ("interval_most_bytes", "most_bytes", "Pages accessed in the interval with the most"),
    ):
        yield GaugeMetricFamily(f"softsgx_recorded_{name}", text, recording[key])


def _epc(state: Mapping[str, Any]) -> Iterator[Metric]:
    epc = state["epc"]
    for name, text in (
        ("size_bytes", "Size of the EPC"),
        ("used_bytes", "EPC that is not free"),
        ("free_bytes", "EPC that can be allocated"),
    ):
        yield GaugeMetricFamily(f"softsgx_epc_{name}", text, epc[name])
    pages = GaugeMetricFamily("softsgx_epc_pages", "EPC pages in use by kind", labels=("kind",))
    for kind, count in epc["pages"].items():
        pages.add_metric([kind], count)
    yield pages


def _groups(groups: list[dict[str, Any]]) -> Iterator[Metric]:
    for name, key, text in (
        ("usage_bytes", "usage_bytes", "EPC charged to a group and those below it"),
        ("peak_bytes", "peak_bytes", "The most that was charged to a group at once"),
        ("limit_bytes", "max_bytes", "Limit of a group; none without a limit"),
    ):
        gauge = GaugeMetricFamily(f"softsgx_group_{name}", text, labels=("group",))
        for group in groups:
            if group[key] is not None:
                gauge.add_metric([group["path"]], group[key])
        yield gauge
    refused = CounterMetricFamily(
        "softsgx_group_refused_charges",
        "Charges that the limit of a group refused",
        labels=("group",),
    )
    for group in groups:
        refused.add_metric([group["path"]], group["refused"])
    yield refused


def _totals(state: Mapping[str, Any]) -> Iterator[Metric]:
    totals = state["totals"]
    yield GaugeMetricFamily("softsgx_enclaves", "Enclaves that exist", len(state["enclaves"]))
    for name, text in _COUNTS.items():
        text += ", of all enclaves, those released included"
        yield CounterMetricFamily(f"softsgx_{name}", text, totals[name])
    crossings = CounterMetricFamily(
        "softsgx_crossings",
        "Entries and exits of all enclaves, those released included",
        labels=("leaf",),
    )
    for leaf in _LEAVES:
        crossings.add_metric([leaf], totals[leaf])
    yield crossings
    reclaim = state["reclaim"]
    yield CounterMetricFamily("softsgx_reclaim_batches", "Batches of reclaim", reclaim["batches"])
    yield CounterMetricFamily(
        "softsgx_reclaim_seconds", "Time spent in batches of reclaim", reclaim["seconds"]
    )


class _Handler(MetricsHandler):
    timeout = _PATIENCE_S  # of a client that sends nothing


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.address_family = (
            socket.AF_INET6 if ipaddress.ip_address(address[0]).version == 6 else socket.AF_INET
        )
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without the base class's look-up of a host name, which can take seconds."""
        TCPServer.server_bind(self)


def _address(place: str) -> tuple[str, int]:
    host, _colon, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or _LOOPBACK
    try:
        ipaddress.ip_address(host)
    except ValueError:
        port = ""
    if not (port.isascii() and port.isdecimal() and int(port) < _PORTS):
        raise SoftSgxError(
            f"--metrics {place}: not an address; write PORT, or an IP address and a port, "
            "as 0.0.0.0:9400 or [::1]:9400"
        )
    return host, int(port)
