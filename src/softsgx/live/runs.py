"""The runs of this user that can be asked for their state, as ``softsgx top`` does."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from softsgx.live.endpoint import is_private, peer_may_talk, status_directories
from softsgx.live.state import FORMAT

__all__ = ["NoAnswer", "RunEnded", "ask", "running_pids", "socket_of"]

_PATIENCE_S = 2.0
_AT_ONCE = 1 << 16


class RunEnded(Exception):
    """The run has ended; its socket is gone."""


class NoAnswer(Exception):
    """A run exists and its answer cannot be used now: it is stopped, busy, or of another version.

    The text says why.
    """


def running_pids() -> list[int]:
    """Return the runs that may exist, by the processes of their supervisors, in that order."""
    found: set[int] = set()
    for directory in status_directories():
        with suppress(OSError):
            if is_private(directory):
                found.update(
                    int(path.stem) for path in directory.glob("*.sock") if path.stem.isdecimal()
                )
    return sorted(found)


def socket_of(pid: int) -> Path | None:
    """Return the socket of a run, ``None`` if there is none."""
    for directory in status_directories():
        path = directory / f"{pid}.sock"
        with suppress(OSError):
            if is_private(directory) and path.is_socket():
                return path
    return None


def ask(pid: int) -> dict[str, Any]:
    """Return the state of a run.

    Raises:
        RunEnded: there is no such run; a socket that a killed one has left is removed.
        NoAnswer: it does not answer in two seconds, or not what is expected.
    """
    path = socket_of(pid)
    if path is None:
        raise RunEnded(f"{pid}: no run of softsgx")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(_PATIENCE_S)
        try:
            peer.connect(str(path))
            if not peer_may_talk(peer):
                raise NoAnswer(f"{path}: belongs to another user")
            document = json.loads(_read_all(peer))
        except FileNotFoundError:
            raise RunEnded(f"{pid}: has ended") from None
        except ConnectionRefusedError:
            # A run removes its socket before it stops accepting: this one was killed.
            with suppress(OSError):
                path.unlink()
            raise RunEnded(f"{pid}: was killed") from None
        except OSError as error:
            raise NoAnswer(f"{pid}: {error.strerror or error}") from error
        except ValueError:
            raise NoAnswer(f"{pid}: its answer breaks off") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise NoAnswer(f"{pid}: speaks another format than {FORMAT}")
    return document


def _read_all(peer: socket.socket) -> bytes:
    parts = []
    while part := peer.recv(_AT_ONCE):
        parts.append(part)
    return b"".join(parts)
