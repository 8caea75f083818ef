"""A local cluster belongs to one command: keys of the terminal do not signal its workers."""

from __future__ import annotations

import signal
from functools import partial

import pytest

from softsgx.workers import local_cluster


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own, at the end of a worker
def test_workers_do_not_get_the_signal_of_control_c() -> None:
    pytest.importorskip(
        "distributed", reason="Dask is not installed: pip install 'softsgx[cluster]'"
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with local_cluster(1) as cluster:
        masks = list(cluster.run(partial(signal.pthread_sigmask, signal.SIG_BLOCK), iter([()])))
    assert signal.SIGINT in masks[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
