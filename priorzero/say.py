"""What a command answers, on standard output; what it tells meanwhile goes to the log."""

from __future__ import annotations

import os
import sys


def say(text: str) -> None:
    """Write to standard output, as it is.

    A reader that has seen enough (`| head`) is no fault: the rest goes nowhere, and the command
    ends as it would have.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still held back would be written, and fail, once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
