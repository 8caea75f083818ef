"""gdb's ``monitor`` commands: list enclaves and the residency of their pages, evict a page."""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES
from softsgx.driver import Enclave
from softsgx.engines.native.tracing.process_image import ProcessImage

__all__ = ["answer"]

_HELP = """\
monitor enclaves           the enclaves of the program
monitor residency [BASE]   which pages are in the EPC, for all enclaves or the one at BASE
monitor evict ADDRESS      evict the page at ADDRESS from the EPC
"""


def answer(image: ProcessImage, command: str) -> str:
    """Return the lines that gdb prints for a command.

    Args:
        image: the address space; its threads are stopped and outside of enclaves.
        command: the text after ``monitor``.
    """
    words = command.split()
    try:
        match words:
            case ["enclaves"]:
                return "".join(_line(enclave) for enclave in enclaves(image)) or "no enclave\n"
            case ["residency"]:
                return "".join(map(_residency, enclaves(image))) or "no enclave\n"
            case ["residency", base]:
                wanted = int(base, 0)
                found = [each for each in enclaves(image) if each.base == wanted]
                return "".join(map(_residency, found)) or f"no enclave at {wanted:#x}\n"
            case ["evict", address]:
                return _evict(image, int(address, 0))
            case _:
                return _HELP
    except ValueError:
        return f"{words[-1]}: not an address; write it as 0x7f0000001000\n"


def enclaves(image: ProcessImage) -> list[Enclave]:
    """Return the enclaves that an address space maps, in the order of their numbers."""
    found = {vma.enclave.number: vma.enclave for vma in image.mm.vmas() if vma.enclave is not None}
    return [enclave for _number, enclave in sorted(found.items()) if enclave.created]


def _line(enclave: Enclave) -> str:
    kind = "debug" if enclave.debug else "production"
    state = "initialized" if enclave.initialized else "not initialized"
    resident = sum(page.epc is not None for page in enclave.pages.values())
    return (
        f"enclave {enclave.number}: {enclave.base:#x} to {enclave.base + enclave.size:#x}, {kind}, "
        f"{state}, {resident} of {len(enclave.pages)} pages in the EPC\n"
    )


def _residency(enclave: Enclave) -> str:
    lines = [_line(enclave)]
    runs: list[tuple[int, int, bool]] = []
    for index, page in sorted(enclave.pages.items()):
        resident = page.epc is not None
        if runs and runs[-1][1] == index and runs[-1][2] == resident:
            runs[-1] = runs[-1][0], index + 1, resident
        else:
            runs.append((index, index + 1, resident))
    for first, behind, resident in runs:
        start, end = (enclave.base + index * PAGE_BYTES for index in (first, behind))
        lines.append(f"  {start:#x} to {end:#x}  {'in the EPC' if resident else 'evicted'}\n")
    return "".join(lines)


def _evict(image: ProcessImage, address: int) -> str:
    vma = image.mm.find(address)
    enclave = None if vma is None else vma.enclave
    page = None if enclave is None else enclave.pages.get(enclave.index_of(address))
    if enclave is None or page is None:
        return f"no enclave has a page at {address:#x}\n"
    where = f"page {page.linaddr:#x} of enclave {enclave.number}"
    if page.epc is None:
        return f"{where} is not in the EPC\n"
    if not enclave.driver.core.evict(page.epc):
        return f"{where} cannot be evicted now\n"
    return f"{where} is evicted\n"
