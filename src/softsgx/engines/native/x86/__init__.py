"""Instructions: decoding, assembling, finding and replacing CPUID."""
