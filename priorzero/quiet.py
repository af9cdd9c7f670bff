"""LightZero and DI-engine print while they build and set the root logger to DEBUG; this keeps both off the terminal."""
from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_base() -> Iterator[None]:
    """Send what the base prints to our log at DEBUG and give the root logger its level back afterwards."""
    root = logging.getLogger()
    level = root.level
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        if text.getvalue().strip():
            logger.debug("output of the base libraries:\n%s", text.getvalue().rstrip())
