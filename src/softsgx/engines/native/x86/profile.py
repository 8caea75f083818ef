"""CPUID of the machine that a profile describes, as far as this machine can execute it.

Family, caches, brand and address sizes are the profile's alone.  This machine bounds the rest:

- Features that it lacks are not claimed: enclave code runs on the real processor.  Nor are those
  whose state XFRM cannot have: loaders ask ECREATE for the state of every feature they find.
- XSAVE components are those of the real XCR0, even where the profile's features need none of
  them: XGETBV and XSAVE outside enclaves are the processor's own, and areas must be large enough.
- The time-stamp counter has its real frequency.
- The package has as many processors as the system has, one thread a core.

Deviation: the APIC identifiers of leaves 1, 0BH and 1FH are 0 on every processor.

Deviation: offsets of XSAVE components are Intel's; on a processor of another vendor, whose offsets
differ, code outside enclaves finds the components of an area it has saved at other places.

Source:
    SDM vol. 2A, "CPUID".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from math import gcd

from softsgx.arch import CPUID_SGX_LEAF, INTEL_VENDOR, INTEL_XSAVE, Cache, CpuidWord, Xfrm
from softsgx.engines.native.x86.cpuid import CpuidLeaf, HostCpuid, xsave_components
from softsgx.hw import MachineConfig, cpuid

__all__ = ["ProfileCpuid", "intel_layout"]

_FEATURES, _EXTENDED_FEATURES, _XSAVE, _AMX_TILE = 1, 7, 0xD, 1 << 24
_HTT = 1 << 28
_AVX512_STATES = Xfrm.OPMASK | Xfrm.ZMM_HI256 | Xfrm.HI16_ZMM
#: Features that stand for a state, as (word, bit): all others that need it need them as well.
_STATE_OF: Mapping[tuple[CpuidWord, int], int] = {
    ((_FEATURES, 0, 2), 28): int(Xfrm.AVX),
    ((_EXTENDED_FEATURES, 0, 1), 14): int(Xfrm.BNDREGS | Xfrm.BNDCSR),
    ((_EXTENDED_FEATURES, 0, 1), 16): int(_AVX512_STATES),
    ((_EXTENDED_FEATURES, 0, 2), 3): int(Xfrm.PKRU),
    ((_EXTENDED_FEATURES, 0, 3), 24): int(Xfrm.TILECFG | Xfrm.TILEDATA),
}
_HIGHEST_EXTENDED = 0x8000_0008
_EXTENDED = 0x8000_0000
_NO_LEAF: CpuidLeaf = (0, 0, 0, 0)
_CLFLUSH_QUADS = 8
_ASSOCIATIVITY = {4: 4, 8: 6, 16: 8}  # ways to the code of CPUID.80000006H:ECX
_BUS_MHZ = 100
_LOW_32 = 0xFFFF_FFFF


class ProfileCpuid:
    """See the module.

    Args:
        host: this machine.
        config: the software machine.
        tsc_khz: frequency of the time-stamp counter.
        processors: logical processors of the system.
    """

    def __init__(
        self, host: HostCpuid, config: MachineConfig, tsc_khz: int, processors: int
    ) -> None:
        self._host, self._config, self._model = host, config, config.model
        self._features_told = _features_told(config)
        self._tsc_khz = tsc_khz
        self._id_bits = max(processors - 1, 0).bit_length()
        self._processors = processors
        self._brand = f"{self._model.brand} @ {tsc_khz / 1e6:.2f}GHz".encode().ljust(48, b"\0")
        self._leaves: Mapping[int, Callable[[int], CpuidLeaf]] = {
            0: self._vendor,
            _FEATURES: self._version,
            2: lambda _sub: (0x00F0_FF01, 0, 0, 0),  # see leaf 4; 64-byte prefetching
            4: self._cache,
            6: lambda _sub: (4, 0, 0, 0),  # the APIC's timer never stops
            _EXTENDED_FEATURES: self._features,
            0xB: self._topology,
            _XSAVE: self._xsave,
            CPUID_SGX_LEAF: lambda sub: cpuid(config, CPUID_SGX_LEAF, sub),
            0x15: self._counter,
            0x16: self._frequencies,
            0x1D: self._tiles,
            0x1E: self._tile_multiplier,
            0x1F: self._topology,
            _EXTENDED: lambda _sub: (_HIGHEST_EXTENDED, 0, 0, 0),
            0x8000_0002: lambda _sub: self._name(0),
            0x8000_0003: lambda _sub: self._name(16),
            0x8000_0004: lambda _sub: self._name(32),
            0x8000_0006: self._second_cache,
            0x8000_0008: self._addresses,
        }

    def __call__(self, leaf: int, sub: int) -> CpuidLeaf:
        """Return what CPUID gives; for a leaf there is none of, the highest basic one."""
        highest = _HIGHEST_EXTENDED if leaf & _EXTENDED else self._model.highest_basic
        if leaf > highest:
            leaf = self._model.highest_basic
        if leaf & _EXTENDED:
            sub = 0  # those of Intel have no sub-leaves
        found = self._leaves.get(leaf)
        return self._words(leaf, sub) if found is None else found(sub)

    def _words(self, leaf: int, sub: int) -> CpuidLeaf:
        """Return the feature words of a leaf that this machine has, too."""
        wanted, real = self._features_told, self._host(leaf, sub)
        a, b, c, d = (wanted.get((leaf, sub, word), 0) & real[word] for word in range(4))
        return a, b, c, d

    # --- who it is ------------------------------------------------------------------------------

    def _vendor(self, _sub: int) -> CpuidLeaf:
        first, second, third = struct.unpack("<3I", INTEL_VENDOR)
        return self._model.highest_basic, first, third, second

    def _version(self, _sub: int) -> CpuidLeaf:
        _eax, _ebx, ecx, edx = self._words(_FEATURES, 0)
        several = self._processors > 1
        identifiers = min(1 << self._id_bits, 0xFF) if several else 0
        edx = edx | _HTT if several else edx & ~_HTT
        return self._model.signature, _CLFLUSH_QUADS << 8 | identifiers << 16, ecx, edx

    def _features(self, sub: int) -> CpuidLeaf:
        eax, ebx, ecx, edx = self._words(_EXTENDED_FEATURES, sub)
        if sub:
            return eax, ebx, ecx, edx
        # FSGSBASE is this machine's: no software makes its instructions work.
        ours = cpuid(self._config, _EXTENDED_FEATURES, 0)
        highest = self._model.features.get((_EXTENDED_FEATURES, 0, 0), 0)
        sgx = ours.ebx & ~1
        return highest, ebx | sgx, ecx | ours.ecx, edx | ours.edx

    def _name(self, at: int) -> CpuidLeaf:
        a, b, c, d = struct.unpack_from("<4I", self._brand, at)
        return a, b, c, d

    def _addresses(self, _sub: int) -> CpuidLeaf:
        model = self._model
        linear = min(model.linear_bits, self._host(_HIGHEST_EXTENDED, 0)[0] >> 8 & 0xFF)
        _eax, ebx, _ecx, _edx = self._words(_HIGHEST_EXTENDED, 0)
        return model.physical_bits | (linear or model.linear_bits) << 8, ebx, 0, 0

    # --- caches and processors ------------------------------------------------------------------

    def _cache(self, sub: int) -> CpuidLeaf:
        if sub >= len(self._model.caches):
            return _NO_LEAF
        cache = self._model.caches[sub]
        identifiers = (1 << self._id_bits) - 1
        sharing = identifiers if cache.shared else 0
        eax = cache.kind | cache.level << 5 | 1 << 8  # self-initializing
        eax |= min(sharing, 0xFFF) << 14 | min(identifiers, 63) << 26
        return eax, (cache.ways - 1) << 22 | 63, cache.sets - 1, cache.properties

    def _second_cache(self, _sub: int) -> CpuidLeaf:
        cache = next(cache for cache in self._model.caches if _is_second(cache))
        return 0, 0, cache.size >> 10 << 16 | _ASSOCIATIVITY[cache.ways] << 12 | 64, 0

    def _topology(self, sub: int) -> CpuidLeaf:
        if sub == 0:
            return 0, 1, 1 << 8, 0  # one thread a core
        if sub == 1:
            return self._id_bits, min(self._processors, 0xFFFF), 2 << 8 | 1, 0
        return 0, 0, sub & 0xFF, 0

    # --- time -----------------------------------------------------------------------------------

    def _counter(self, _sub: int) -> CpuidLeaf:
        crystal_khz = self._model.crystal_hz // 1000
        common = gcd(self._tsc_khz, crystal_khz)
        return crystal_khz // common, self._tsc_khz // common, self._model.crystal_hz, 0

    def _frequencies(self, _sub: int) -> CpuidLeaf:
        base_mhz = round(self._tsc_khz / 1000)
        return base_mhz, max(base_mhz, self._model.max_mhz), _BUS_MHZ, 0

    # --- state ----------------------------------------------------------------------------------

    def _xsave(self, sub: int) -> CpuidLeaf:
        real = self._host(_XSAVE, sub)
        if sub == 0:
            # Not less than what the instructions really write.
            size = max(self._config.xsave_bytes(self._config.xcr0), real[2])
            return real[0], size, size, real[3]
        if sub == 1:
            return self._words(_XSAVE, 1)[0], *real[1:]
        if sub in self._config.xsave:
            size, offset = self._config.xsave[sub]
            return size, offset, real[2], 0
        return real

    def _tiles(self, sub: int) -> CpuidLeaf:
        if not self._features(0)[3] & _AMX_TILE:
            return _NO_LEAF
        if sub == 1:  # 8 tiles of 16 rows, 64 bytes each
            return 8192 | 1024 << 16, 64 | 8 << 16, 16, 0
        return (1, 0, 0, 0) if sub == 0 else _NO_LEAF

    def _tile_multiplier(self, sub: int) -> CpuidLeaf:
        has_tiles = self._features(0)[3] & _AMX_TILE and sub == 0
        return (0, 16 | 64 << 8, 0, 0) if has_tiles else _NO_LEAF


def _features_told(config: MachineConfig) -> dict[CpuidWord, int]:
    """Return the feature words of the model, without what has a state that no enclave can have."""
    told, states = dict(config.model.features), config.xfrm & config.xcr0
    for (word, bit), needed in _STATE_OF.items():
        if needed & ~states:
            told[word] = told.get(word, 0) & ~(1 << bit)
    return told


def intel_layout(host: HostCpuid) -> dict[int, tuple[int, int]]:
    """Return (bytes, offset) of the XSAVE components of this machine, where Intel has them."""
    _xcr0, real = xsave_components(host)
    return {number: INTEL_XSAVE.get(number, place) for number, place in real.items()}


def _is_second(cache: Cache) -> bool:
    return cache.level == 2
