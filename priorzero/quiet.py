"""LightZero and DI-engine print, warn on the root logger and set it to DEBUG; this keeps all three
off the terminal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_base() -> Iterator[None]:
    """Send what the base prints to our log at DEBUG and give the root logger its level back
    afterwards.

    Our own records pass: only what is logged on the root logger itself is held back, and handlers
    keep their streams.
    """
    root = logging.getLogger()
    level = root.level
    text = io.StringIO()

    def hold(record: logging.LogRecord) -> bool:
        text.write(record.getMessage() + "\n")
        return False

    # Without a handler, logging.warning would install one that writes to our buffer for ever.
    handler = logging.NullHandler()
    if not root.handlers:
        root.addHandler(handler)
    root.addFilter(hold)
    try:
        with (
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(hold)
        root.removeHandler(handler)
        root.setLevel(level)
        if text.getvalue().strip():
            logger.debug("output of the base libraries:\n%s", text.getvalue().rstrip())
