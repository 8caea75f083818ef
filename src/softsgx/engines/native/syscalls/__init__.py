"""System calls that concern enclaves, by family."""
