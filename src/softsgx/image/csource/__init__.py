"""Enclaves from C: a compiler, a small runtime of our own, and a layout that is measured.

Nothing of a C library or an SDK goes in.  The compiler is the machine's, or ziglang's; what it made
becomes a :class:`~softsgx.image.Plan` like any other enclave.
"""

from softsgx.image.csource.compiler import INCLUDE, Compiler, find_compiler
from softsgx.image.csource.layout import BuildOptions, build_enclave, lay_out

__all__ = [
    "INCLUDE",
    "BuildOptions",
    "Compiler",
    "build_enclave",
    "find_compiler",
    "lay_out",
]
