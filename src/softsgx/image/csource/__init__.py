"""Enclaves from C: a compiler, a small runtime of our own, and a layout that is measured.

The enclave contains no part of a C library or an SDK.  The compiler is that of the machine or
ziglang's.  Its output becomes a :class:`~softsgx.image.Plan` like that of any other enclave.
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
