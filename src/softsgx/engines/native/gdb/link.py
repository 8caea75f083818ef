"""Serves gdb's connection while a program runs: splits bytes into packets and sends answers."""

from __future__ import annotations

from softsgx.engines.native.gdb.packets import INTERRUPT, Connection
from softsgx.engines.native.gdb.server import GdbServer
from softsgx.engines.native.gdb.session import Session
from softsgx.engines.native.gdb.target import Debugged
from softsgx.ondemand import logger

__all__ = ["Link"]

_LOG = logger(__name__)


class Link:
    """See the module.

    Args:
        server: where gdb connects.
        target: the program.
    """

    def __init__(self, server: GdbServer, target: Debugged) -> None:
        self._server, self._target = server, target
        self._connection = Connection()
        self._session: Session | None = None

    @property
    def connected(self) -> bool:
        """Whether a gdb is connected."""
        return self._session is not None

    @property
    def waits(self) -> bool:
        """Whether gdb waits for the program to stop."""
        return self._session is not None and self._session.waits

    @property
    def knows_exec(self) -> bool:
        """Whether gdb accepts stops by execve."""
        return self._session is not None and self._session.knows_exec

    def poll(self) -> bool:
        """Serve the requests of gdb since the last call; return whether there were any."""
        if self._server.accept():
            self._connection, self._session = Connection(), Session(self._target)
            self._target.attach()
            return True
        data = self._server.receive()
        if data is None:
            self._hang_up()
            return True
        for packet in self._connection.receive(data):
            if packet is INTERRUPT:
                self._target.break_in()
                continue
            session = self._session
            assert session is not None and packet is not None, "a packet without a connection"
            answer = session.answer(packet)
            if answer is not None:
                self._connection.send(answer)
            self._send()
            self._connection.acknowledges = session.acknowledges
        self._send()
        return bool(data)

    def send_stop(self) -> None:
        """Send a stop reply: the program has stopped."""
        if self._session is not None:
            self._reply(self._session, self._session.stop_reply())

    def send_end(self, status: int) -> None:
        """Send the end of the process, with this status of wait(2)."""
        if self._session is not None and self._session.waits:
            self._reply(self._session, self._session.end_reply(status))

    def send_none_runs(self) -> None:
        """Send a reply: the threads that gdb has resumed have ended, and the others are stopped."""
        if self._session is not None:
            self._reply(self._session, b"N")

    def _reply(self, session: Session, reply: bytes) -> None:
        session.waits = False
        self._connection.send(reply)
        self._send()

    def _send(self) -> None:
        self._server.send(self._connection.take_output())
        if self._session is not None and not self._server.connected:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
            _LOG.info("gdb has disconnected")
