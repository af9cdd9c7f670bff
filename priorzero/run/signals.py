"""SIGINT and SIGTERM ask the loop to stop after the present step; a second one ends the process at
once.

timeout(1) and some supervisors signal a process and then its process group, so one request arrives
twice: a signal within `REPEAT_S` of the first is the same request.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time

logger = logging.getLogger(__name__)
REPEAT_S = 1.0


class StopRequest:
    """Set by a signal; the loop looks at `requested` between its stages.

    Use as a context manager inside the running event loop; the previous handlers come back at the
    end.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0

    def __enter__(self) -> StopRequest:
        self._loop = asyncio.get_running_loop()
        for number in self.SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(self, *_) -> None:
        for number in self.SIGNALS:
            self._loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self.requested and now - self._first < REPEAT_S:
            return
        if self.requested:
            logger.warning(
                "second %s: stopping at once; the last checkpoint stands",
                signal.Signals(number).name,
            )
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested, self._first = True, now
        logger.info(
            "%s: finishing the present step, then saving and closing", signal.Signals(number).name
        )
