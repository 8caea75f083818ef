"""Threads of the program under ptrace: stops, registers, births and deaths."""
