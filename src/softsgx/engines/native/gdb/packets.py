"""The framing of gdb's remote protocol: packets, acknowledgements, escapes.

It does not interpret payloads.

Source:
    "Debugging with GDB", appendix "gdb Remote Serial Protocol": "Overview", "Packet
    Acknowledgment", "Interrupts".
"""

from __future__ import annotations

__all__ = ["INTERRUPT", "Connection", "escape", "unescape"]

INTERRUPT = None
"""Result of :meth:`Connection.receive` for an interrupt, the byte 03 outside of packets."""

_ESCAPE, _FLIP = 0x7D, 0x20
_BEGIN, _END, _ACK, _NAK, _BREAK = b"$", b"#", b"+", b"-", 0x03
_CHECKSUM_DIGITS = 2


def escape(data: bytes) -> bytes:
    """Return binary data as packets carry it."""
    data = data.replace(b"}", b"}]").replace(b"#", b"}\x03")
    return data.replace(b"$", b"}\x04").replace(b"*", b"}\n")


def unescape(data: bytes) -> bytes:
    """Return the binary data that a packet carries; inverse of :func:`escape`."""
    first, *parts = data.split(b"}")
    return first + b"".join(bytes([part[0] ^ _FLIP]) + part[1:] for part in parts if part)


def frame(payload: bytes) -> bytes:
    """Return a packet."""
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


class Connection:
    """Turns bytes from gdb into payloads, and replies into bytes.

    Until gdb turns acknowledgements off, each packet is acknowledged, and the last reply is kept
    and sent again at each negative acknowledgement.

    Attributes:
        acknowledges: whether packets are acknowledged.
    """

    def __init__(self) -> None:
        self.acknowledges = True
        self._received = bytearray()
        self._sent = b""
        self._output = bytearray()

    def receive(self, data: bytes) -> list[bytes | None]:
        """Return the payloads, still escaped, that ``data`` completes, and interrupts."""
        self._received += data
        found: list[bytes | None] = []
        while self._received:
            first = self._received[:1]
            if first != _BEGIN:
                del self._received[0]
                if first[0] == _BREAK:
                    found.append(INTERRUPT)
                elif first == _NAK and self.acknowledges:
                    self._output += self._sent
                continue  # an acknowledgement, or a byte outside a packet, which the protocol skips
            end = self._received.find(_END)
            if end < 0 or len(self._received) < end + 1 + _CHECKSUM_DIGITS:
                break
            payload = bytes(self._received[1:end])
            checksum = bytes(self._received[end + 1 : end + 1 + _CHECKSUM_DIGITS])
            del self._received[: end + 1 + _CHECKSUM_DIGITS]
            intact = checksum.lower() == b"%02x" % (sum(payload) & 0xFF)
            if self.acknowledges:
                self._output += _ACK if intact else _NAK
            if intact:
                found.append(payload)
        return found

    def send(self, payload: bytes) -> None:
        """Send a packet; binary parts of ``payload`` are already escaped."""
        self._sent = frame(payload)
        self._output += self._sent

    def take_output(self) -> bytes:
        """Return the bytes to send now."""
        output = bytes(self._output)
        self._output.clear()
        return output
