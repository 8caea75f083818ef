"""Code of programs that crosses, for which stubs can stand: loads of EAX in front of ENCLU.

Source:
    ``vdso/permit_code.py`` for the stubs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.engines.native.vdso.permit_code import exit_stub
from softsgx.engines.native.x86.rewrite import in_step
from softsgx.ondemand import dataclass, pattern

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage

__all__ = ["ExitSite", "find_exit"]

_PAGE_BYTES = 4096
_ENCLU = b"\x0f\x01\xd7"
#: mov eax, 4 or mov rax, 4, and what may come between it and EEXIT: registers but RAX and RSP are
#: scrubbed by XOR with themselves, flags by add rdx, rdx and cld.
_EXIT = pattern(
    rb"(?:\xb8\x04\0\0\0|\x48\xc7\xc0\x04\0\0\0)"
    rb"((?:\x48?\x31[\xc9\xd2\xdb\xed\xf6\xff]"
    rb"|[\x45\x4d]\x31[\xc0\xc9\xd2\xdb\xe4\xed\xf6\xff]"
    rb"|\x48\x01\xd2|\xfc)*)\x0f\x01\xd7\Z"
)
_LONGEST = 64
_TOO_NEAR = 16  # to the start of a page: the start of instructions is not known there


@dataclass(slots=True, frozen=True)
class ExitSite:
    """``mov eax, 4 … enclu`` of an enclave.

    Attributes:
        start: address of the load of EAX.
        between: the instructions between the load and ENCLU.
        at: address of the ENCLU.
        table: address of the table of permits.
    """

    start: int
    between: bytes
    at: int
    table: int

    def stub(self, place: int) -> tuple[bytes, dict[str, int]]:
        """As :meth:`Site.stub`."""
        return exit_stub(place, self.at, self.table, self.between)


def find_exit(image: ProcessImage, enclu: int) -> ExitSite | None:
    """Return the site of an EEXIT; all of it is in one page of read-only code."""
    page, behind = enclu & -_PAGE_BYTES, enclu % _PAGE_BYTES + len(_ENCLU)
    memory = image.page_table.read_only_code(page, 1)
    if memory is None or behind > _PAGE_BYTES:
        return None
    code = memory.own_code(page, behind)
    found = _EXIT.search(code, max(_TOO_NEAR, behind - _LONGEST))
    if found is None or not in_step(code, found.start()):
        return None
    return ExitSite(page + found.start(), found[1], enclu, image.permits_at)
