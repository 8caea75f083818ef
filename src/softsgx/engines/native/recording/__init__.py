"""Recording which pages of enclaves a program uses: the part of the engine behind ``record``.

Nothing here is used in a run that does not record.
"""
