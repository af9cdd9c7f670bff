"""Where a run's numbers are shown: a class per place, behind `priorzero.run.metrics.MetricsWriter`.

A board may fail (a full disk, no network) without costing the run: whoever calls one does so
through its `Guard`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Board(Protocol):
    """A place that shows numbers."""

    name: str
    """As the log calls it."""

    def settings(self, config: Mapping[str, Any]) -> None:
        """Show the run's settings: `schedule` and `settings`, as in config.json."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show finite values by full name (`wm/wm_loss`) at so many environment steps."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text (Markdown)."""

    def flush(self) -> None:
        """Let readers see what was written."""

    def close(self) -> None:
        """Write the rest and end."""


class Guard:
    """Calls what may fail: the first fault is told, every one is counted, and the run goes on.

    Args:
        what: is written, as the log calls it.
        faults: which errors are survived.

    Attributes:
        failures: calls that failed so far.
    """

    def __init__(self, what: str, *faults: type[Exception]) -> None:
        self._what = what
        self._faults = faults
        self.failures = 0

    def __call__(self, write: Callable, *arguments: Any) -> Any:
        """`write(*arguments)`; None where it failed."""
        try:
            return write(*arguments)
        except self._faults as error:
            self.failures += 1
            if self.failures == 1:
                logger.error(
                    "%s could not be written (%s: %s); the run goes on, and they may have gaps "
                    "from here on (said once)",
                    self._what,
                    type(error).__name__,
                    error,
                )
            return None
