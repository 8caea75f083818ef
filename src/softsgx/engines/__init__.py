"""What runs enclave code: one package per engine, each imported only by who uses it."""

__all__: list[str] = []
