"""The status socket of a run: only its user can read it, and no client delays the run.

Goal: access rights, effects of a bad client, files that remain.  Method: servers of this process in
directories of the test; clients that hang, disconnect, or find the socket of a killed run.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.live import runtime_directory

from softsgx import live
from softsgx.live import StatusServer, endpoint, runs

STATE = {"format": live.FORMAT, "pid": 1}


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are; the fallback does not exist, and neither does its parent."""
    with runtime_directory() as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
        monkeypatch.setattr(
            endpoint, "status_directories", lambda: [path / "softsgx", path / "no" / "fallback"]
        )
        monkeypatch.setattr(runs, "status_directories", endpoint.status_directories)
        yield path / "softsgx"


@pytest.fixture
def server(directory: Path) -> Iterator[StatusServer]:
    made = StatusServer(lambda: STATE)
    yield made
    made.close()


def test_a_client_gets_the_state_of_the_run(server: StatusServer) -> None:
    assert live.running_pids() == [os.getpid()]
    assert live.ask(os.getpid()) == live.ask(os.getpid()) == STATE


def test_only_the_user_can_enter_the_directory(server: StatusServer, directory: Path) -> None:
    assert server.path == str(directory / f"{os.getpid()}.sock")
    assert directory.stat().st_mode & 0o777 == 0o700


def test_programs_do_not_inherit_the_socket(server: StatusServer) -> None:
    assert not server._listener.get_inheritable()


def test_nothing_is_left_when_the_run_ends(server: StatusServer, directory: Path) -> None:
    server.close()
    assert list(directory.iterdir()) == []
    with pytest.raises(live.RunEnded):
        live.ask(os.getpid())
    assert not any(thread.name == "status" for thread in threading.enumerate())


@pytest.mark.parametrize("bad", ["others may look", "link", "file"])
def test_a_directory_that_is_not_the_users_alone_is_not_used(
    directory: Path, tmp_path: Path, bad: str
) -> None:
    if bad == "others may look":
        directory.mkdir()
        directory.chmod(0o750)
    elif bad == "link":
        directory.symlink_to(tmp_path)
    else:
        directory.touch()
    with pytest.raises(FileNotFoundError, match="fallback"):
        StatusServer(lambda: STATE)
    assert live.running_pids() == []
    assert live.socket_of(os.getpid()) is None


def test_the_second_directory_serves_where_the_first_cannot_be_used(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = directory.parent / "second"
    found = [directory.parent / "missing" / "first", second]
    monkeypatch.setattr(endpoint, "status_directories", lambda: found)
    monkeypatch.setattr(runs, "status_directories", lambda: found)
    server = StatusServer(lambda: STATE)
    assert Path(server.path).parent == second
    assert live.ask(os.getpid()) == STATE
    server.close()


def test_a_runtime_directory_of_another_user_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert next(iter(live.status_directories())) == str(tmp_path / "softsgx")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert list(live.status_directories()) == [f"/tmp/softsgx-{os.geteuid()}"]


@pytest.mark.parametrize("value", ["", "relative/path", "/no/such/directory"])
def test_a_variable_that_names_no_directory_is_ignored(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    assert list(live.status_directories()) == [f"/tmp/softsgx-{os.geteuid()}"]


@pytest.mark.parametrize(("uid", "may"), [(4000, True), (0, True), (4001, False)])
def test_only_the_user_and_root_may_talk(
    monkeypatch: pytest.MonkeyPatch, uid: int, may: bool
) -> None:
    class Peer(socket.socket):
        def getsockopt(self, *_arguments: int) -> bytes:  # type: ignore[override]
            return endpoint._UCRED.pack(1, uid, 1)

    monkeypatch.setattr(os, "geteuid", lambda: 4000)
    with Peer(socket.AF_UNIX) as peer:
        assert endpoint.peer_may_talk(peer) is may


def test_what_another_user_asks_is_not_answered(
    server: StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "peer_may_talk", lambda _peer: False)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.path))
        assert client.recv(1) == b""


def test_clients_that_do_not_read_delay_no_other(server: StatusServer) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for client in silent:
        client.connect(str(server.path))
    assert live.ask(os.getpid()) == STATE
    for client in silent:
        client.close()


def test_a_client_that_does_not_read_is_given_up(directory: Path) -> None:
    large = {**STATE, "text": "x" * (1 << 22)}
    server = StatusServer(lambda: large, patience_s=0.01)
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as later:
        silent.connect(str(server.path))
        later.connect(str(server.path))
        assert later.recv(1) == b"{", "its turn comes"
        with pytest.raises(json.JSONDecodeError):  # what the first one got breaks off
            json.loads(runs._read_all(silent))
    server.close()


def test_a_client_that_goes_at_once_does_no_harm(server: StatusServer) -> None:
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.path))
    assert live.ask(os.getpid()) == STATE


def left_behind(directory: Path, pid: int) -> Path:
    """The socket of a run that was killed."""
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{pid}.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    return path


def test_the_socket_of_a_killed_run_is_removed(directory: Path) -> None:
    path = left_behind(directory, 4_000_000)
    assert live.running_pids() == [4_000_000]
    with pytest.raises(live.RunEnded):
        live.ask(4_000_000)
    assert not path.exists()


def test_a_run_takes_the_place_of_a_killed_one_with_its_number(directory: Path) -> None:
    left_behind(directory, os.getpid())
    server = StatusServer(lambda: STATE)
    assert live.ask(os.getpid()) == STATE
    server.close()


def test_a_name_appears_when_connections_are_accepted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Watched(socket.socket):
        def listen(self, *arguments: int) -> None:
            seen.extend(path.suffix for path in directory.iterdir())
            super().listen(*arguments)

    monkeypatch.setattr(socket, "socket", Watched)
    StatusServer(lambda: STATE).close()
    assert seen == [".new"]


def test_an_answer_of_another_format_is_named(directory: Path) -> None:
    server = StatusServer(lambda: {"format": "softsgx-status/9"})
    with pytest.raises(live.NoAnswer, match="softsgx-status/1"):
        live.ask(os.getpid())
    server.close()


def test_a_run_that_is_stopped_gives_no_answer(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(runs, "_PATIENCE_S", 0.01)
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(directory / "7.sock"))
        stopped.listen()
        with pytest.raises(live.NoAnswer):
            live.ask(7)
    assert (directory / "7.sock").exists(), "it may go on"
