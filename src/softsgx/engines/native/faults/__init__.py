"""What becomes of ENCLU, exceptions and page faults."""
