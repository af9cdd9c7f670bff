"""`python -m priorzero.play RUN`: the command is `priorzero/terminal.py`."""

from __future__ import annotations

import sys

from priorzero.terminal import main, parse_arguments

__all__ = ["main", "parse_arguments"]

if __name__ == "__main__":
    sys.exit(main())
