"""Draw the output of a command as an SVG, for the pictures of README and docs.

    python tools/picture.py OUT.svg COMMAND [ARG ...]

The command's two output streams are shown as one, 90 columns wide.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 90


def main() -> int:
    """Run the command, write the picture, return the command's exit status."""
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    out, *command = sys.argv[1:]
    environment = {**os.environ, "COLUMNS": str(COLUMNS)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {shlex.join(command)}", style="bold"))
    console.print(Text.from_ansi(done.stdout.rstrip("\n")), soft_wrap=True)
    picture = console.export_svg(title="softsgx", font_aspect_ratio=0.61)
    # No fonts from the network: a picture looks the same offline.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    Path(out).write_text(picture)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
