"""Handling of ENCLU, exceptions and page faults of the program's threads."""
