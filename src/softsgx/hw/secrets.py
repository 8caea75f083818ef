"""The package's secrets, and sealing of evicted pages.

No secret leaves ``hw``.  AES-GCM and AES-CMAC come from the ``cryptography`` library, which is
imported with the first page that leaves or the first key that is derived.

Source:
    SDM vol. 3D, "EWB", "ELDB/ELDU", Operation; tables "Key derivation" in "EGETKEY".
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.hw.operands import Buffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["MAC_BYTES", "PagingKey", "Secrets", "cmac"]

MAC_BYTES = 16
_VERSION_STEP = 8  # EDBGRD tests a slot with its low 3 bits masked
_IV = struct.Struct(">4xQ")

#: What counts versions.  A step is atomic: tasks can be real threads.
_new_versions: Callable[[], Iterator[int]] = (
    partial(count, _VERSION_STEP, _VERSION_STEP)
    if compiled.speedups is None
    else compiled.speedups.VersionCounter
)


def cmac(key: bytes, message: bytes) -> bytes:
    """Return the AES-128-CMAC of ``message``, 16 bytes."""
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.cmac import CMAC

    mac = CMAC(AES(key))
    mac.update(message)
    return mac.finalize()


class PagingKey:
    """CR_BASE_PK with its version counter: seals pages that leave the EPC.

    A new key has a new counter: a version used twice under one key would be a GCM nonce used
    twice.

    Modelled: the byte order of the counter block.
    """

    __slots__ = (
        "_aead",
        "_key",
        "_versions",
    )

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._versions = _new_versions()
        self._aead: AESGCM | None = None

    def _cipher(self) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if self._aead is None:
            self._aead = AESGCM(self._key)
        return self._aead

    def next_version(self) -> int:
        """Return a version that no page has had: never 0, a multiple of 8."""
        return next(self._versions)

    def seal(self, page: Buffer, version: int, header: bytes) -> bytes:
        """Return ciphertext ‖ MAC, 4096 + 16 bytes.

        Args:
            page: 4096 bytes of plaintext.
            version: from :meth:`next_version`.
            header: a packed :class:`~softsgx.arch.MacHeader`.
        """
        aead = self._aead or self._cipher()
        return aead.encrypt(_IV.pack(version), page, header)

    def unseal(self, sealed: Buffer, version: int, header: bytes) -> bytes | None:
        """Return the 4096 bytes of plaintext; ``None`` where an argument differs from EWB's.

        Args:
            sealed: ciphertext ‖ MAC.
            version: the content of the VA slot.
            header: a packed :class:`~softsgx.arch.MacHeader`.
        """
        aead = self._aead or self._cipher()
        try:
            return aead.decrypt(_IV.pack(version), sealed, header)
        except Exception as error:
            from cryptography.exceptions import InvalidTag  # an import takes half as long as ELDU

            if isinstance(error, InvalidTag):
                return None
            raise


class Secrets:
    """Keys of one package.

    Permanent: ``device_key`` and ``seal_fuses``.  For one power cycle: the paging key and
    ``report_key_id``.  Set by the platform: ``owner_epoch``.

    Args:
        rng: source of the permanent keys: the same seed makes the same package, which can unseal
            data that was sealed on it.
        entropy: returns a number of random bytes, for keys of one power cycle.  A paging key that
            came twice would seal different pages under the same versions.
    """

    __slots__ = (
        "_entropy",
        "device_key",
        "owner_epoch",
        "paging",
        "report_key_id",
        "seal_fuses",
        "tee_report_key",
    )

    def __init__(self, rng: random.Random, entropy: Callable[[int], bytes]) -> None:
        self._entropy = entropy
        self.device_key = rng.randbytes(16)
        self.seal_fuses = rng.randbytes(16)
        self.tee_report_key = rng.randbytes(32)
        self.owner_epoch = bytes(16)
        self.power_up()

    def power_up(self) -> None:
        """Draw all keys of one power cycle."""
        self.paging = PagingKey(self._entropy(16))
        self.report_key_id = self._entropy(32)

    def derive(self, serialised: bytes) -> bytes:
        """Return the 16-byte key for a serialised set of derivation fields.

        Modelled: the real derivation function is not public; AES-CMAC under a device key.
        """
        return cmac(self.device_key, serialised)


assert PAGE_BYTES % MAC_BYTES == 0, "pages are whole AES blocks"
