"""The EPC core: allocate, charge, age, reclaim, fault back, back up.

Reclaim is core, and who owns a page is not the core's business.
"""
