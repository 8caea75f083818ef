"""``python -m softsgx``."""

import sys

from softsgx.cli import main

if __name__ == "__main__":
    sys.exit(main())
