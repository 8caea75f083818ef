"""Finds the runs of this user and reads their states, for ``softsgx top``."""

from __future__ import annotations

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
    """The run has ended; its socket no longer exists."""


class NoAnswer(Exception):
    """A run exists and its answer cannot be used now; the text says why.

    It may be stopped, busy, or of another version.
    """


def running_pids() -> list[int]:
    """Return the process ids of the supervisors of runs that may exist, in ascending order."""
    found: set[int] = set()
    for directory in status_directories():
        with suppress(OSError):
            if is_private(directory):
                found.update(
                    int(path.stem)
                    for path in Path(directory).glob("*.sock")
                    if path.stem.isdecimal()
                )
    return sorted(found)


def socket_of(pid: int) -> Path | None:
    """Return the socket of a run; ``None``: it has none."""
    for directory in status_directories():
        path = Path(directory, f"{pid}.sock")
        with suppress(OSError):
            if is_private(directory) and path.is_socket():
                return path
    return None


def ask(pid: int) -> dict[str, Any]:
    """Return the state of a run.

    Raises:
        RunEnded: there is no such run; the socket of a killed run is removed.
        NoAnswer: it does not answer within two seconds, or its answer cannot be used.
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
            import json

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
            raise NoAnswer(f"{pid}: its answer is incomplete") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise NoAnswer(f"{pid}: its answer is not in format {FORMAT}")
    return document


def _read_all(peer: socket.socket) -> bytes:
    parts = []
    while part := peer.recv(_AT_ONCE):
        parts.append(part)
    return b"".join(parts)
