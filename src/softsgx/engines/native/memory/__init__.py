"""Enclave memory: memory files, page tables, and the pagers that make absent pages fault."""
