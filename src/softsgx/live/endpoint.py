"""The status socket of a run: ``PID.sock`` in a directory that only its user can enter.

A client connects and reads one JSON object until the end of the stream; it sends no request.  A
separate thread answers, so a client that does not read delays other clients for
:data:`_PATIENCE_S` at most, and never the program.  The socket is made after the program's process,
and is closed at execve(2), so the program does not inherit it.

The server listens before the name appears, and until the name is removed: a name where connections
are refused belongs to a run that was killed.

Source:
    unix(7) (SO_PEERCRED, permissions); XDG Base Directory Specification (``XDG_RUNTIME_DIR``).
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

__all__ = ["StatusServer", "peer_may_talk", "status_directories"]

_PATIENCE_S = 1.0
_ROOT = 0
_WAITING_CLIENTS = 8
_UCRED = struct.Struct("iII")


class StatusServer:
    """Answers each client with the state, until it is closed.

    Args:
        state: returns an object that :mod:`json` can encode; called in the server's thread.
        patience_s: seconds after which a client that does not read is disconnected.

    Attributes:
        path: of the socket.

    Raises:
        OSError: no directory can be used.
    """

    def __init__(
        self, state: Callable[[], dict[str, Any]], *, patience_s: float = _PATIENCE_S
    ) -> None:
        self._state, self._patience_s = state, patience_s
        self._listener, self.path = _listen(f"{os.getpid()}.sock")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the socket and end the thread; a second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        with suppress(OSError):
            os.unlink(self.path)
        self._listener.shutdown(socket.SHUT_RDWR)  # accept() returns
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                peer, _address = self._listener.accept()
            except OSError:
                # Closed; or no descriptor is free, which may change.
                self._closed.wait(self._patience_s)
                continue
            with peer, suppress(OSError):  # the client may disconnect, or not read
                peer.settimeout(self._patience_s)
                if peer_may_talk(peer):
                    import json

                    peer.sendall(json.dumps(self._state(), separators=(",", ":")).encode() + b"\n")


def status_directories() -> Iterator[str]:
    """Yield the directories that may have sockets of this user's runs, the preferred one first.

    ``XDG_RUNTIME_DIR`` is used only if it belongs to this user: sudo(8) can keep the variable of
    another user.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        with suppress(OSError):
            if os.stat(runtime).st_uid == os.geteuid():
                yield os.path.join(runtime, "softsgx")
    yield f"/tmp/softsgx-{os.geteuid()}"


def is_private(directory: str) -> bool:
    """Return whether a directory (not a link to one) belongs to this user and only they may use it.

    Raises:
        OSError: it does not exist, or cannot be reached.
    """
    found = os.lstat(directory)
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    )


def peer_may_talk(peer: socket.socket) -> bool:
    """Return whether the process at the other end is of this user, or of root."""
    size = _UCRED.size
    _pid, uid, _gid = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in (os.geteuid(), _ROOT)


def _listen(name: str) -> tuple[socket.socket, str]:
    """Listen in the first directory that can be used."""
    failure: OSError | None = None
    for directory in status_directories():
        try:
            with suppress(FileExistsError):
                os.mkdir(directory, mode=0o700)
            if not is_private(directory):
                raise PermissionError(f"{directory}: is not a directory of this user alone")
            path = os.path.join(directory, name)
            return _listen_at(path), path
        except OSError as error:
            failure = error
    assert failure is not None, "there is a directory to try"
    raise failure


def _listen_at(path: str) -> socket.socket:
    """Return a socket that accepts at ``path``, in place of one that a killed run has left."""
    unfinished = f"{os.path.splitext(path)[0]}.new"
    listener = socket.socket(socket.AF_UNIX)
    try:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
        listener.bind(unfinished)
        listener.listen(_WAITING_CLIENTS)
        os.rename(unfinished, path)
    except OSError:
        listener.close()
        raise
    return listener
