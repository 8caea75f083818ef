"""A very small assembler: bytes, labels and relative references, for the code of our vDSO."""

from __future__ import annotations

import struct

__all__ = ["Assembler"]


class Assembler:
    """Collects machine code; labels may be used before they are defined.

    Attributes:
        labels: offset of each label from the start of the code.
    """

    def __init__(self) -> None:
        self._code = bytearray()
        self._holes: list[tuple[int, int, str]] = []
        self.labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """Name the next byte."""
        assert name not in self.labels, f"label {name} defined twice"
        self.labels[name] = len(self._code)

    def align(self, to: int) -> None:
        """Pad with int3 up to a multiple of ``to``."""
        self._code += b"\xcc" * (-len(self._code) % to)

    def emit(self, text: str) -> None:
        """Append bytes written in hexadecimal, blanks ignored."""
        self._code += bytes.fromhex(text)

    def word(self, text: str, value: int) -> None:
        """Append bytes and a 32-bit little-endian ``value``."""
        self.emit(text)
        self._code += struct.pack("<I", value & 0xFFFF_FFFF)

    def quad(self, value: int) -> None:
        """Append a 64-bit little-endian ``value``."""
        self._code += struct.pack("<Q", value)

    def near(self, text: str, label: str) -> None:
        """Append bytes and a 32-bit displacement to ``label`` (jcc near, call, lea rip+…)."""
        self.emit(text)
        self._holes.append((len(self._code), 4, label))
        self._code += bytes(4)

    def short(self, text: str, label: str) -> None:
        """Append bytes and an 8-bit displacement to ``label``."""
        self.emit(text)
        self._holes.append((len(self._code), 1, label))
        self._code += bytes(1)

    def finish(self) -> bytes:
        """Return the code with every reference resolved."""
        for at, size, label in self._holes:
            distance = self.labels[label] - (at + size)
            self._code[at : at + size] = distance.to_bytes(size, "little", signed=True)
        return bytes(self._code)
