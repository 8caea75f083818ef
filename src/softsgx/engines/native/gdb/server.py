"""Where gdb connects: a TCP port of this machine, or a Unix socket.

When gdb connects, sends or disconnects, the kernel sends SIGIO to the tracer's thread and to no
other thread of the process.  The thread blocks SIGIO while a program runs, and SIGIO ends its waits
(:mod:`softsgx.engines.native.tracing.waits`); nothing polls.

Source:
    fcntl(2), O_ASYNC, F_SETOWN_EX; socket(7); unix(7).
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from softsgx.errors import SoftSgxError

__all__ = ["GdbServer"]

_LOOPBACK = "127.0.0.1"
_PORTS = 1 << 16
_AT_ONCE = 1 << 16
_LONGEST_SEND_S = 10.0
_ONLY_OWNER = 0o177
_F_SETOWN_EX, _F_OWNER_TID = 15, 0
_OWNER = struct.Struct("ii")  # struct f_owner_ex


class GdbServer:
    """Listens for one gdb at a time.

    Args:
        place: ``PORT`` (on 127.0.0.1; 0 for one that is free), ``HOST:PORT``, or the path of a Unix
            socket, which has a slash.  The protocol has no passwords: where HOST is not loopback,
            any machine that can connect can run code as the user of the program.  Only the owner
            can connect to a Unix socket.
        enclave_files: ELF files with the code of enclaves, if the program does not open them.

    Attributes:
        address: the place, as gdb's ``target remote`` accepts it.
        is_public: whether other machines may reach it.

    Raises:
        SoftSgxError: the place is not valid, or listening there fails.
    """

    def __init__(self, place: str, enclave_files: Sequence[str] = ()) -> None:
        self.enclave_files = tuple(enclave_files)
        self._path = place if "/" in place else ""
        try:
            if self._path:
                self._listener, self.address = _listen_at(place), place
                self.is_public = False
            else:
                self._listener, self.is_public = _listen_on(place)
                host, port = self._listener.getsockname()[:2]
                self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        except OSError as error:
            raise SoftSgxError(
                f"--gdb {place}: {error.strerror or error}; choose another port or socket"
            ) from error
        self._peer: socket.socket | None = None
        self._listener.setblocking(False)

    @contextmanager
    def sigio_enabled(self) -> Iterator[None]:
        """Send SIGIO to the calling thread, which blocks it, when gdb connects or sends."""
        _enable_sigio(self._listener)
        try:
            yield
        finally:
            _disable_sigio(self._listener)
            if self._peer is not None:
                _disable_sigio(self._peer)

    @property
    def connected(self) -> bool:
        """Whether a gdb is connected."""
        return self._peer is not None

    def accept(self) -> bool:
        """Return whether a gdb has connected now; further ones wait until it disconnects."""
        if self._peer is not None:
            return False
        try:
            peer, _address = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return False
        if peer.family != socket.AF_UNIX:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setblocking(False)
        _enable_sigio(peer)
        self._peer = peer
        return True

    def receive(self) -> bytes | None:
        """Return the bytes gdb has sent, empty for none yet; ``None``: it has disconnected."""
        if self._peer is None:
            return b""
        try:
            data = self._peer.recv(_AT_ONCE)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.disconnect()
            return None
        return data

    def send(self, data: bytes) -> None:
        """Send bytes; a gdb that does not take them is disconnected."""
        if self._peer is not None and data:
            self._peer.settimeout(_LONGEST_SEND_S)
            try:
                self._peer.sendall(data)
                self._peer.setblocking(False)
            except OSError:
                self.disconnect()

    def disconnect(self) -> None:
        """Close the connection."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def close(self) -> None:
        """Stop listening."""
        self.disconnect()
        self._listener.close()
        if self._path:
            with suppress(FileNotFoundError):
                os.unlink(self._path)


def _enable_sigio(endpoint: socket.socket) -> None:
    fcntl.fcntl(endpoint, _F_SETOWN_EX, _OWNER.pack(_F_OWNER_TID, threading.get_native_id()))
    flags = fcntl.fcntl(endpoint, fcntl.F_GETFL)
    fcntl.fcntl(endpoint, fcntl.F_SETFL, flags | os.O_ASYNC)


def _disable_sigio(endpoint: socket.socket) -> None:
    flags = fcntl.fcntl(endpoint, fcntl.F_GETFL)
    fcntl.fcntl(endpoint, fcntl.F_SETFL, flags & ~os.O_ASYNC)


def _listen_at(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(_ONLY_OWNER)
    try:
        listener.bind(path)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def _listen_on(place: str) -> tuple[socket.socket, bool]:
    """Return a listening TCP socket, and whether its host is not loopback."""
    host, _colon, port = place.rpartition(":")
    host = host.strip("[]") or _LOOPBACK
    if not port.isdecimal() or int(port) >= _PORTS:
        raise SoftSgxError(
            f"--gdb {place}: not an address; write PORT, HOST:PORT, or a path with a slash"
        )
    family, _kind, _proto, _name, address = socket.getaddrinfo(
        host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener, not ipaddress.ip_address(address[0]).is_loopback
