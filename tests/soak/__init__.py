"""Random histories for as long as one likes, each from a seed: ``python -m tests.soak --help``.

A kind of history is a module with ``run(seconds, seed)``, which returns how much was done and
raises AssertionError when something went wrong.
"""
