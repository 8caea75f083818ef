"""A Dask cluster finds what one process finds, also when it loses a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from softsgx.explore.campaign import Budget, Campaign, Summary, run_campaign
from softsgx.workers import DaskCluster, InProcess

CAMPAIGN = Campaign(("fault-reclaim", "two-faults"), ("B2",), "random", Budget(runs=400))


def _last(steps: Iterator[Summary]) -> Summary:
    for summary in steps:
        found = summary
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own, at the end of a worker
def test_a_cluster_that_loses_a_worker_finds_what_one_process_finds() -> None:
    distributed = pytest.importorskip(
        "distributed", reason="Dask is not installed: pip install 'softsgx[cluster]'"
    )
    alone = _last(run_campaign(CAMPAIGN, InProcess()))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        workers = DaskCluster(cluster)
        steps = run_campaign(CAMPAIGN, workers)
        next(steps)
        victim = next(iter(cluster.workers.values()))
        victim.process.process.kill()
        together = _last(steps)
        workers.close()
    assert together.units == alone.units
    assert together.coverage == alone.coverage
    assert together.found() == alone.found()
