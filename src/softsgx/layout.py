"""Declared binary structures: a table of offsets that is checked when its class is made.

A structure lists its fields with :func:`at`; reserved bytes are fields too.  A gap, an overlap or
a wrong size raises :class:`LayoutError` at import.  All integers are little-endian, as in the SDM.

This module knows nothing of SGX.
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar, Generic, Self, TypeVar

__all__ = [
    "U8",
    "U16",
    "U32",
    "U64",
    "FieldType",
    "LayoutError",
    "Nested",
    "Raw",
    "Structure",
    "at",
]

T = TypeVar("T")
S = TypeVar("S", bound="Structure")


class LayoutError(TypeError):
    """A declared structure has a gap, an overlap or the wrong size."""


class FieldType(Generic[T]):
    """The encoding of one field.

    Attributes:
        size: bytes it takes.
        code: its ``struct`` format without byte order.
    """

    size: int
    code: str

    def blank(self) -> T:
        """Return the value of all-zero bytes, a new object each time."""
        raise NotImplementedError

    def to_wire(self, value: T) -> Any:
        """Return ``value`` as ``struct.pack`` takes it."""
        return value

    def from_wire(self, wire: Any) -> T:
        """Return the value of a field that ``struct.unpack`` has returned as ``wire``."""
        value: T = wire
        return value


class _Unsigned(FieldType[int]):
    def __init__(self, size: int, code: str) -> None:
        self.size, self.code = size, code

    def blank(self) -> int:
        return 0


U8 = _Unsigned(1, "B")
U16 = _Unsigned(2, "H")
U32 = _Unsigned(4, "I")
U64 = _Unsigned(8, "Q")


class Raw(FieldType[bytes]):
    """``size`` bytes, uninterpreted: digests, keys, big numbers, reserved space."""

    def __init__(self, size: int) -> None:
        self.size, self.code = size, f"{size}s"

    def blank(self) -> bytes:
        """Return ``size`` zero bytes."""
        return bytes(self.size)

    def to_wire(self, value: bytes) -> bytes:
        """Return ``value``; ``struct`` would silently pad or cut a wrong length."""
        if len(value) != self.size:
            raise ValueError(f"field takes {self.size} bytes, got {len(value)}")
        return bytes(value)


class Nested(FieldType[S]):
    """Another structure in place."""

    def __init__(self, structure: type[S]) -> None:
        self.structure = structure
        self.size, self.code = structure.SIZE, f"{structure.SIZE}s"

    def blank(self) -> S:
        """Return a structure of zero bytes."""
        return self.structure.unpack(bytes(self.size))

    def to_wire(self, value: S) -> bytes:
        """Return the packed structure."""
        return value.pack()

    def from_wire(self, wire: bytes) -> S:
        """Return the unpacked structure."""
        return self.structure.unpack(wire)


class _Field(Generic[T]):
    """One row of the table; the descriptor of an instance's attribute."""

    def __init__(self, offset: int, kind: FieldType[T], default: T | None) -> None:
        self.offset, self.kind, self.default = offset, kind, default
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name


def at(offset: int, kind: FieldType[T], *, default: T | None = None) -> Any:
    """Declare a field ``offset`` bytes into the structure.

    A field left out when an instance is made has ``default``, or all-zero bytes.
    """
    return _Field(offset, kind, default)


class Structure:
    """Base of declared structures: ``class Pcmd(Structure, size=128, align=128)``.

    Instances are mutable records compared by value.

    Attributes:
        SIZE: bytes it takes.
        ALIGN: the alignment the manual asks of its address, in bytes.
    """

    SIZE: ClassVar[int] = 0
    ALIGN: ClassVar[int] = 1
    OFFSETS: ClassVar[dict[str, int]] = {}
    _fields: ClassVar[tuple[_Field[Any], ...]] = ()
    _names: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}
    _nested: ClassVar[tuple[_Field[Any], ...]] = ()
    _packed: ClassVar[tuple[tuple[int, FieldType[Any]], ...]] = ()
    _codec: ClassVar[struct.Struct]

    def __init_subclass__(cls, *, size: int, align: int = 1) -> None:
        """Check the table; raise :class:`LayoutError` for a gap, an overlap or a wrong size."""
        super().__init_subclass__()
        fields = [value for value in vars(cls).values() if isinstance(value, _Field)]
        end = 0
        for field in fields:
            if field.offset != end:
                kind = "gap before" if field.offset > end else "overlap at"
                raise LayoutError(f"{cls.__name__}: {kind} {field.name}: {end} -> {field.offset}")
            end = field.offset + field.kind.size
        if end != size:
            raise LayoutError(f"{cls.__name__}: fields end at {end}, declared size is {size}")
        for field in fields:
            delattr(cls, field.name)
        cls.SIZE, cls.ALIGN = size, align
        cls.OFFSETS = {field.name: field.offset for field in fields}
        cls._fields = tuple(fields)
        cls._names = tuple(field.name for field in fields)
        # Only some kinds convert their values; struct packs and unpacks the others as they are.
        cls._nested = tuple(field for field in fields if isinstance(field.kind, Nested))
        cls._packed = tuple(
            (index, field.kind)
            for index, field in enumerate(fields)
            if type(field.kind).to_wire is not FieldType.to_wire
        )
        cls._defaults = {
            field.name: field.kind.blank() if field.default is None else field.default
            for field in fields
        }
        cls._codec = struct.Struct("<" + "".join(field.kind.code for field in fields))

    def __init__(self, **values: Any) -> None:
        own = self.__dict__
        own.update(self._defaults)
        own.update(values)
        if len(own) != len(self._names):
            unknown = next(name for name in values if name not in self._defaults)
            raise TypeError(f"{type(self).__name__} has no field {unknown!r}")
        for field in self._nested:
            if field.name not in values and field.default is None:
                own[field.name] = field.kind.blank()  # mutable: each instance needs its own

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """Return the structure at ``offset`` of ``data``.

        Raises:
            struct.error: ``data`` ends before the structure does.
        """
        wires = cls._codec.unpack_from(data, offset)
        self = cls.__new__(cls)
        values = self.__dict__
        values.update(zip(cls._names, wires, strict=True))
        for field in cls._nested:
            values[field.name] = field.kind.from_wire(values[field.name])
        return self

    def pack(self) -> bytes:
        """Return its ``SIZE`` bytes."""
        own = self.__dict__
        values = [own[name] for name in self._names]
        for index, kind in self._packed:
            values[index] = kind.to_wire(values[index])
        return self._codec.pack(*values)

    def replace(self, **values: Any) -> Self:
        """Return a copy with some fields changed."""
        own = {field.name: getattr(self, field.name) for field in self._fields}
        return type(self)(**{**own, **values})

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.pack() == other.pack()

    __hash__ = None  # type: ignore[assignment]  # mutable records have no hash

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in self._fields
            if getattr(self, field.name) != field.kind.blank()
        ]
        return f"{type(self).__name__}({', '.join(shown)})"
