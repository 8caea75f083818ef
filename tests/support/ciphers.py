"""Ciphers in Python, in the place of that of a paging key."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["NewerCipher", "OlderCipher"]


class OlderCipher:
    """The cipher of a library that returns objects, and cannot write to memory that exists."""

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)

    def encrypt(self, *arguments: Any) -> bytes:
        return self._aead.encrypt(*arguments)

    def decrypt(self, *arguments: Any) -> bytes:
        return self._aead.decrypt(*arguments)


class NewerCipher(OlderCipher):
    """The same, which keeps what it gets; C code does not use its methods that write to memory."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self.kept: list[Any] = []

    def encrypt(self, *arguments: Any) -> bytes:
        self.kept.extend(arguments)
        return super().encrypt(*arguments)

    def decrypt(self, *arguments: Any) -> bytes:
        self.kept.extend(arguments)
        return super().decrypt(*arguments)

    def __getattr__(self, name: str) -> Any:
        def refuse(*_arguments: Any) -> int:
            raise AssertionError("memory is for ciphers that keep nothing")

        if name not in ("encrypt_into", "decrypt_into"):
            raise AttributeError(name)
        return refuse
