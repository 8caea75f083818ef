"""SGX without the hardware, from the page cache up.

softsgx is a software machine with a finite, encrypted Enclave Page Cache (EPC), and the
operating-system half that swaps it.  It is an emulation: it protects nothing from the owner of the
machine it runs on.
"""

__version__ = "0.1.0"
