"""Random histories for as long as one likes, each from a seed: ``python -m tests.soak --help``.

A kind of history is a module of this package that is named in ``KINDS``.  It has ``run(seconds,
seed)``, which returns how much was done as a dictionary from names to numbers, and raises
AssertionError when something went wrong; and it may have ``minimise(seed)``, which returns how
little still fails, as a sentence.
"""

KINDS = ("calls", "lifetimes", "longrun", "models", "operations", "parsers")
