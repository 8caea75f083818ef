"""Machines and enclaves for tests, made by the real leaves.

``make_machine`` gives a machine on a seeded inline runtime; ``build_enclave`` builds, signs and
initialises an enclave on it with a throw-away key that is made once a session.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from softsgx.arch import (
    CHUNK_BYTES,
    CHUNKS_PER_PAGE,
    PAGE_BYTES,
    RSA_BYTES,
    Attributes,
    AttributesFlags,
    EinitToken,
    PageType,
    SecInfo,
    Secs,
    SigStruct,
    Status,
    Tcs,
)
from softsgx.hw import (
    EpcPage,
    LogicalProcessor,
    Machine,
    MachineConfig,
    PageInfoArgs,
    PageStore,
    PageTables,
)
from softsgx.hw.optimised import OPTIMISED
from softsgx.hw.secs import ResidentSecs
from softsgx.image import throwaway_key
from softsgx.runtime import InlineRuntime, Runtime
from softsgx.trace import Tracer

__all__ = [
    "AEP",
    "DEFAULT_BASE",
    "Built",
    "PageSpec",
    "RepeatingRuntime",
    "build_enclave",
    "enter",
    "free_pages",
    "launch_hash",
    "make_machine",
    "map_enclave",
    "reg",
    "secs_of",
    "session_key",
    "sign_sigstruct",
    "signed",
    "tcs",
]

DEFAULT_BASE = 0x7000_0000_0000
AEP = 0x40_0000
_RW = 3


def session_key() -> rsa.RSAPrivateKey:
    """The throw-away key of this process, which the system of the stories uses as well."""
    return throwaway_key()


@lru_cache(maxsize=256)
def _signature(key: rsa.RSAPrivateKey, message: bytes) -> bytes:
    """PKCS #1 v1.5 has no randomness, and many tests build the same enclave again."""
    return key.sign(message, padding.PKCS1v15(), hashes.SHA256())


def sign_sigstruct(sig: SigStruct, key: rsa.RSAPrivateKey | None = None) -> SigStruct:
    """``sig`` with modulus, signature, Q1 and Q2 of ``key``."""
    key = session_key() if key is None else key
    n = key.public_key().public_numbers().n
    s = int.from_bytes(_signature(key, sig.signed_bytes()), "big")
    q1, rest = divmod(s * s, n)
    return sig.replace(
        modulus=n.to_bytes(RSA_BYTES, "little"),
        signature=s.to_bytes(RSA_BYTES, "little"),
        q1=q1.to_bytes(RSA_BYTES, "little"),
        q2=(s * rest // n).to_bytes(RSA_BYTES, "little"),
    )


def signed(
    mrenclave: bytes,
    secs: Secs | ResidentSecs,
    *,
    key: rsa.RSAPrivateKey | None = None,
    **fields: object,
) -> SigStruct:
    """A SIGSTRUCT that fits ``secs``, every ATTRIBUTES and MISCSELECT bit compared."""
    if isinstance(secs, ResidentSecs):
        attributes = Attributes(flags=secs.flags, xfrm=secs.xfrm)
    else:
        attributes = secs.attributes
    every = (1 << 64) - 1
    values: dict[str, object] = {
        "attributes": attributes,
        "attribute_mask": Attributes(flags=every, xfrm=every),
        "miscselect": secs.miscselect,
        "misc_mask": 0xFFFF_FFFF,
        "enclave_hash": mrenclave,
    }
    return sign_sigstruct(SigStruct(**(values | fields)), key)


def launch_hash(key: rsa.RSAPrivateKey | None = None) -> list[int]:
    """IA32_SGXLEPUBKEYHASH0-3 that let ``key``'s enclaves launch without a token."""
    key = session_key() if key is None else key
    n = key.public_key().public_numbers().n
    digest = sha256(n.to_bytes(RSA_BYTES, "little")).digest()
    return [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 32, 8)]


class RepeatingRuntime(InlineRuntime):
    """An inline runtime whose keys follow from the seed, to compare what two machines write."""

    def entropy(self, size: int) -> bytes:
        return self.random.randbytes(size)


def make_machine(
    *,
    epc_pages: int = 64,
    runtime: Runtime | None = None,
    seed: int = 0,
    store: PageStore | None = None,
    tracer: Tracer | None = None,
    optimised: bool = True,
    **config: object,
) -> Machine:
    """A machine with one EPC section; other keywords are fields of its configuration."""
    return Machine(
        MachineConfig.with_epc(epc_pages * PAGE_BYTES, **config),
        RepeatingRuntime(seed) if runtime is None else runtime,
        store=store,
        tracer=tracer,
        optimised=OPTIMISED if optimised else None,
    )


def free_pages(machine: Machine) -> Iterator[int]:
    """Addresses of EPC pages that are not valid, lowest first, looked at when asked for."""
    for section in machine.config.sections:
        for index in range(section.pages):
            addr = section.page(index)
            page = machine.pages.get(addr)
            if page is None or not page.valid:
                yield addr


@dataclass(frozen=True)
class PageSpec:
    """A page to add: type, R/W/X, 4096 bytes, offset from the base (``None``: the next page)."""

    pt: PageType = PageType.REG
    rights: int = _RW
    data: bytes = bytes(PAGE_BYTES)
    offset: int | None = None
    measured: bool = True


def reg(data: bytes = b"", *, rights: int = _RW, offset: int | None = None) -> PageSpec:
    """A REG page that begins with ``data``."""
    return PageSpec(PageType.REG, rights, data.ljust(PAGE_BYTES, b"\0"), offset)


def tcs(
    *, ossa: int, nssa: int = 1, oentry: int = 0, offset: int | None = None, **fields: object
) -> PageSpec:
    """A TCS page with its SSA frames at offset ``ossa``."""
    page = Tcs(ossa=ossa, nssa=nssa, oentry=oentry, fs_limit=0xFFF, gs_limit=0xFFF, **fields).pack()
    return PageSpec(PageType.TCS, 0, page, offset)


@dataclass
class Built:
    """An enclave that ``build_enclave`` made.

    Attributes:
        machine: where.
        base: linear base address.
        secs: address of the SECS' EPC page.
        pages: EPC address of each page by its linear address.
        sigstruct: what EINIT was given; ``None`` when it was not called.
    """

    machine: Machine
    base: int
    secs: int
    pages: dict[int, int] = field(default_factory=dict)
    sigstruct: SigStruct | None = None

    @property
    def enclave(self) -> ResidentSecs:
        """Its live state."""
        return self.machine.pages[self.secs].owner

    def epc(self, offset: int) -> int:
        """EPC address of the page at ``offset`` from the base."""
        return self.pages[self.base + offset]

    def page(self, offset: int) -> EpcPage:
        """EPCM entry of the page at ``offset`` from the base."""
        return self.machine.pages[self.epc(offset)]

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of a resident page, behind the processor's back."""
        at = offset % PAGE_BYTES
        return self.machine.store.read(self.page(offset - at), at, size)


def secs_of(
    size: int,
    base: int = DEFAULT_BASE,
    *,
    flags: int = AttributesFlags.MODE64BIT,
    xfrm: int = 3,
    ssa_frame_size: int = 1,
    **fields: object,
) -> Secs:
    """A SECS that ECREATE takes on any machine."""
    return Secs(
        size=size,
        base=base,
        ssa_frame_size=ssa_frame_size,
        attributes=Attributes(flags=int(flags), xfrm=xfrm),
        **fields,
    )


def build_enclave(
    machine: Machine,
    pages: Sequence[PageSpec] = (PageSpec(),),
    *,
    base: int = DEFAULT_BASE,
    size: int | None = None,
    secs: Secs | None = None,
    init: bool = True,
    key: rsa.RSAPrivateKey | None = None,
    **fields: object,
) -> Built:
    """Build an enclave of ``pages`` from offset 0 with the machine's own leaves.

    Args:
        machine: where; its launch key becomes the signer's when the enclave is initialised.
        pages: what to EADD, in order, and EEXTEND whole where ``measured``.
        base: linear base address, a multiple of the size.
        size: enclave bytes; the smallest that holds the pages when ``None``.
        secs: what ECREATE gets, instead of a 64-bit one of that size.
        init: whether to EINIT.
        key: the signer's, the session's when ``None``.
        **fields: of the SIGSTRUCT: ``isv_svn=3``.
    """
    placed, next_offset = [], 0
    for page in pages:
        offset = next_offset if page.offset is None else page.offset
        placed.append((offset, page))
        next_offset = offset + PAGE_BYTES
    if size is None:
        end = max((offset + PAGE_BYTES for offset, _page in placed), default=0)
        size = max(2 * PAGE_BYTES, 1 << (end - 1).bit_length() if end else 0)
    source = secs_of(size, base) if secs is None else secs

    leaves, free = machine.leaves, free_pages(machine)
    secs_addr = next(free)
    leaves.ecreate(PageInfoArgs(srcpge=source.pack(), secinfo=SecInfo.of(PageType.SECS)), secs_addr)
    built = Built(machine, source.base, secs_addr)
    for offset, page in placed:
        _add(built, next(free), offset, page)
    if init:
        mrenclave = machine.measurements[built.enclave.eid].copy().digest()
        built.sigstruct = signed(mrenclave, source, key=key, **fields)
        machine.launch_key_hash[:] = launch_hash(key)
        status = leaves.einit(built.sigstruct, secs_addr, EinitToken())
        assert status is Status.SUCCESS, f"EINIT gave {status!r}"
    return built


def _add(built: Built, addr: int, offset: int, page: PageSpec) -> None:
    leaves, linaddr = built.machine.leaves, built.base + offset
    secinfo = SecInfo.of(page.pt, page.rights)
    leaves.eadd(PageInfoArgs(linaddr, page.data, secinfo, built.secs), addr)
    if page.measured:
        for chunk in range(CHUNKS_PER_PAGE):
            leaves.eextend(built.secs, addr + chunk * CHUNK_BYTES)
    built.pages[linaddr] = addr


def map_enclave(built: Built, tables: PageTables | None = None, *, rights: int = 7) -> PageTables:
    """Page tables that map every page of ``built`` where it belongs."""
    tables = PageTables() if tables is None else tables
    for linaddr, addr in built.pages.items():
        tables.map(linaddr, addr, rights)
    return tables


def enter(built: Built, tcs_offset: int, number: int = 0) -> LogicalProcessor:
    """Let a processor enter ``built`` through a TCS, its pages mapped where they belong."""
    cpu = built.machine.cpus[number]
    cpu.space, cpu.cpl = map_enclave(built), 3
    cpu.regs.xcr0 |= built.enclave.xfrm
    cpu.enclu.eenter(built.base + tcs_offset, AEP)
    return cpu
