"""SGX programs of other projects behave under softsgx as on hardware.

Goal: unmodified SGX programs run.  Method: each client
below the directory that ``SOFTSGX_CLIENTS`` names is run on every machine that its description
asks for; exit status and output are compared with those written down there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.clients import ABSENT, Client, Machine, clients, run_client
from tests.support.native import needs_tracing

RUNS = [
    pytest.param(
        client,
        machine,
        id=f"{client.name}-{machine}",
        marks=[pytest.mark.xfail(reason=client.fails)] if client.fails else [],
    )
    for client in clients()
    for machine in client.machines
]

pytestmark = [
    pytest.mark.slow,
    needs_tracing,
]


@pytest.mark.skipif(not RUNS, reason=ABSENT)
@pytest.mark.timeout(0)  # a client's description has its own
@pytest.mark.parametrize(("client", "machine"), RUNS)
def test_a_client_does_what_it_does_on_hardware(
    client: Client, machine: Machine, tmp_path: Path
) -> None:
    done = run_client(client, machine, tmp_path)
    told = f"\n--- stdout\n{done.output[-2000:]}\n--- stderr\n{done.errors[-2000:]}"
    assert done.exit_status == client.exit_status, f"exit status {done.exit_status}{told}"
    assert done.enclaves >= client.enclaves, f"{done.enclaves} enclaves launched{told}"
    for text in client.contains:
        assert text in done.output, f"{text!r} is not in the output{told}"
    if client.output is not None:
        assert client.comparable(done.output) == client.comparable(client.output), told


def test_a_description_is_run_on_every_machine_that_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "expected").write_text("read 4\n")
    (tmp_path / "echo.toml").write_text(
        """
        command = ["sh", "-c", "read word; echo $WORD $word; exit 3"]
        stdin = "7\\n"
        environment = { WORD = "read" }
        exit_status = 3
        output = "expected"
        ignore = ['\\d+']
        enclaves = 0

        [[machines]]
        epc = ["1MiB", "64MiB"]
        strict = [false, true]

        [[machines]]
        profile = ["sgx1-client"]
        """
    )
    monkeypatch.setenv("SOFTSGX_CLIENTS", str(tmp_path))
    (client,) = clients()
    assert [str(machine) for machine in client.machines] == [
        "1MiB-sgx2-server",
        "1MiB-sgx2-server-strict",
        "64MiB-sgx2-server",
        "64MiB-sgx2-server-strict",
        "93.5MiB-sgx1-client",
    ]
    done = run_client(client, client.machines[0], tmp_path)
    assert (done.exit_status, done.output, done.enclaves) == (3, "read 7\n", 0)
    assert client.output is not None
    assert client.comparable(done.output) == client.comparable(client.output)
