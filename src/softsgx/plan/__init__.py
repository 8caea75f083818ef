"""How much EPC an application needs, and what less costs: accesses replayed at many sizes.

Needs numpy, numba and pyarrow (``softsgx[plan]``), which are imported at first use.
"""
