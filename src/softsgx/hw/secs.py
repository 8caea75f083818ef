"""A SECS in the EPC: an enclave as the processor knows it.

The object exists while its SECS page is in the EPC.  EWB makes 4096 bytes of it, hidden fields
included, and ELDU makes an equal object of those; only the tracking state starts anew.  A
measurement in progress is a SHA-256 state, which has no bytes here: the machine keeps it under the
enclave's EID.

Source:
    SDM vol. 3D, "SGX Enclave Control Structure (SECS)", and the fields that the leaves'
    Operation sections use beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping

from softsgx.arch import PADDING_BYTES, Attributes, AttributesFlags, Secs
from softsgx.compiled import record
from softsgx.layout import U64, Raw, Structure, at
from softsgx.ondemand import dataclass

__all__ = ["Crossings", "HiddenSecs", "ResidentSecs"]

# Plain integers: arithmetic on enums is ten times slower, and every entry reads these.
_INIT, _MODE64BIT = int(AttributesFlags.INIT), int(AttributesFlags.MODE64BIT)


class HiddenSecs(Structure, size=400):
    """The fields of a SECS that the manual does not name.

    Deviation: the place of hidden fields is implementation-specific; they begin at
    ``_HIDDEN_AT`` here, in bytes that are reserved for ECREATE.
    """

    eid: int = at(0, U64)
    virt_children: int = at(8, U64)
    isv_ext_prod_id: bytes = at(16, Raw(16))
    isv_family_id: bytes = at(32, Raw(16))
    padding: bytes = at(48, Raw(PADDING_BYTES))


_HIDDEN_AT = 264
assert Secs.OFFSETS["reserved4"] <= _HIDDEN_AT, "hidden fields lie on named ones"


@dataclass(slots=True)
@record
class Crossings:
    """How often processors have entered and left an enclave, for reports.

    One object for each EID, which outlives evictions of the SECS.

    Attributes:
        eenter, eresume, eexit: leaves that succeeded.
        aex: asynchronous exits.
    """

    eenter: int = 0
    eresume: int = 0
    eexit: int = 0
    aex: int = 0


@record
class ResidentSecs:
    """One SECS that is in the EPC.

    Attributes:
        eid: never reused while the machine is powered; the MAC of an evicted page binds it.
        size, base: the enclave's linear range, bytes.
        flags, xfrm: ATTRIBUTES.
        context: ENCLAVECONTEXT, the address of the SECS when it was loaded.
        children: CHLDCNT, valid EPC-resident pages whose ENCLAVESECS this is; EWB needs 0.
        virt_children: VIRTCHILDCNT, children that a guest believes to be resident.
        epoch, cur_count, prev_count: tracking; see ``tracking.py``.
        crossings: counts of its entries and exits.
        measurement_lock: one of EADD, EEXTEND, EINIT updates or closes the measurement.
        tracking_lock: one of ETRACK, ETRACKC, EWB holds the tracking facility.
        machine_check: its code has met a machine check, and it cannot be entered again.
        etrack_running: ETRACK or ETRACKC is executing; EBLOCK then returns ENTRYEPOCH_LOCKED.
    """

    __slots__ = (
        "base",
        "cet_attributes",
        "cet_leg_bitmap_offset",
        "children",
        "config_id",
        "config_svn",
        "context",
        "crossings",
        "cur_count",
        "eid",
        "epoch",
        "etrack_running",
        "flags",
        "isv_ext_prod_id",
        "isv_family_id",
        "isv_prod_id",
        "isv_svn",
        "machine_check",
        "measurement_lock",
        "miscselect",
        "mrenclave",
        "mrsigner",
        "padding",
        "prev_count",
        "size",
        "ssa_frame_size",
        "tracking_lock",
        "virt_children",
        "xfrm",
    )

    def __init__(
        self, secs: Secs, eid: int, context: int, crossings: Crossings | None = None
    ) -> None:
        self.eid, self.context = eid, context
        self.crossings = Crossings() if crossings is None else crossings
        self.size, self.base = secs.size, secs.base
        self.ssa_frame_size, self.miscselect = secs.ssa_frame_size, secs.miscselect
        self.cet_leg_bitmap_offset = secs.cet_leg_bitmap_offset
        self.cet_attributes = secs.cet_attributes
        self.flags, self.xfrm = secs.attributes.flags, secs.attributes.xfrm
        self.mrenclave, self.mrsigner = secs.mrenclave, secs.mrsigner
        self.config_id, self.config_svn = secs.config_id, secs.config_svn
        self.isv_prod_id, self.isv_svn = secs.isv_prod_id, secs.isv_svn
        self.isv_ext_prod_id = self.isv_family_id = bytes(16)
        self.padding = bytes(PADDING_BYTES)
        self.children = self.virt_children = 0
        self.epoch = self.cur_count = self.prev_count = 0
        self.measurement_lock = self.tracking_lock = self.etrack_running = False
        self.machine_check = False

    @property
    def initialized(self) -> bool:
        """ATTRIBUTES.INIT: EINIT has succeeded."""
        return bool(self.flags & _INIT)

    @property
    def mode64(self) -> bool:
        """ATTRIBUTES.MODE64BIT."""
        return bool(self.flags & _MODE64BIT)

    @property
    def threads_inside(self) -> int:
        """Logical processors that execute in it now."""
        return self.cur_count + self.prev_count

    def covers(self, linaddr: int) -> bool:
        """Return whether ``linaddr`` is in the enclave's linear range (ELRANGE)."""
        return self.base <= linaddr < self.base + self.size

    def to_image(self) -> bytes:
        """Return the 4096 bytes that EWB seals."""
        image = bytearray(
            Secs(
                size=self.size,
                base=self.base,
                ssa_frame_size=self.ssa_frame_size,
                miscselect=self.miscselect,
                cet_leg_bitmap_offset=self.cet_leg_bitmap_offset,
                cet_attributes=self.cet_attributes,
                attributes=Attributes(flags=self.flags, xfrm=self.xfrm),
                mrenclave=self.mrenclave,
                mrsigner=self.mrsigner,
                config_id=self.config_id,
                isv_prod_id=self.isv_prod_id,
                isv_svn=self.isv_svn,
                config_svn=self.config_svn,
            ).pack()
        )
        image[_HIDDEN_AT : _HIDDEN_AT + HiddenSecs.SIZE] = HiddenSecs(
            eid=self.eid,
            virt_children=self.virt_children,
            isv_ext_prod_id=self.isv_ext_prod_id,
            isv_family_id=self.isv_family_id,
            padding=self.padding,
        ).pack()
        return bytes(image)

    @classmethod
    def from_image(
        cls, data: bytes, context: int, crossings: Mapping[int, Crossings] | None = None
    ) -> ResidentSecs:
        """Return the SECS of an authenticated page image, loaded at ``context``."""
        hidden = HiddenSecs.unpack(data, _HIDDEN_AT)
        self = cls(Secs.unpack(data), hidden.eid, context, (crossings or {}).get(hidden.eid))
        self.virt_children = hidden.virt_children
        self.isv_ext_prod_id, self.isv_family_id = hidden.isv_ext_prod_id, hidden.isv_family_id
        self.padding = hidden.padding
        return self
