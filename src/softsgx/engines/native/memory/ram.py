"""Ordinary memory of the program as the machine's RAM, behind stand-in physical addresses.

Source:
    ``memory/page_table.py`` for what a stand-in address is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import Pfec
from softsgx.driver import BadAddress
from softsgx.engines.native.memory.page_table import split_ordinary
from softsgx.hw import PageFault, Ram

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage

__all__ = ["NativeRam"]


class NativeRam(Ram):
    """RAM of a machine whose processors are threads of real processes.

    Attributes:
        images: the processes' address spaces by index; the supervisor adds and removes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[int, ProcessImage] = {}

    def read(self, physical: int, size: int) -> bytes:
        """Return bytes of the program's memory.

        Raises:
            PageFault: the program cannot read them.
        """
        index, linaddr = split_ordinary(physical)
        try:
            return self.images[index].memory.read(linaddr, size)
        except BadAddress:
            raise PageFault(linaddr, Pfec.U) from None

    def write(self, physical: int, data: bytes) -> None:
        """Store to the program's memory.

        Raises:
            PageFault: the program cannot write there.
        """
        index, linaddr = split_ordinary(physical)
        try:
            self.images[index].memory.write(linaddr, data)
        except BadAddress:
            raise PageFault(linaddr, Pfec.U | Pfec.W) from None
