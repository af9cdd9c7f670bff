"""TensorBoard and the numbers that go there. Components return plain dictionaries; prefixes are
added here.

docs/METRICS.md explains every name. Counters of a run (hangs, fallbacks, cache hits) arrive as
totals since the start.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)


class Stopwatch:
    """Seconds per named stage, and how often each ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._reported: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started
            self.calls[stage] += 1

    def lap(self) -> dict[str, float]:
        """Seconds per stage since the last call of this method."""
        now = dict(self.seconds)
        since = {stage: spent - self._reported.get(stage, 0.0) for stage, spent in now.items()}
        self._reported = now
        return since


class PeakMemory:
    """The most memory seen so far; children are seen only when somebody looks."""

    def __init__(self) -> None:
        self._peak = 0.0

    def update(self) -> float:
        """Look, and return the peak in GiB."""
        self._peak = max(self._peak, memory_gb())
        return self._peak


class MetricsWriter:
    """Writes scalars and texts under the fixed namespaces, and the same scalars as JSON lines for
    scripts.

    Args:
        folder: `<exp>/log`; TensorBoard files and `metrics.jsonl` go there.
    """

    NAMESPACES = ("collect", "wm", "llm", "eval", "prior", "perf")

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter  # heavy; only where a run really writes

        folder.mkdir(parents=True, exist_ok=True)
        self._tensorboard = SummaryWriter(str(folder))
        # A thread writes the events. One that dies of a full disk leaves its queue full, and then
        # the run waits for it for ever.
        events = self._tensorboard.file_writer.event_writer._ev_writer
        events.write_event = self._enduring(events.write_event)
        events.flush = self._enduring(events.flush)
        self._disk_failed = False
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def scalars(self, namespace: str, values: Mapping[str, float], step: int) -> None:
        """Write `namespace/name` for every finite value; what is not finite is named in the log.

        Args:
            namespace: one of `NAMESPACES`. step: environment steps so far.
        """
        assert namespace in self.NAMESPACES, f"{namespace!r} is not one of {self.NAMESPACES}"

        finite: dict[str, float] = {}
        for name, value in values.items():
            if np.isfinite(value):
                finite[name] = float(value)
                self._tensorboard.add_scalar(f"{namespace}/{name}", float(value), step)
            else:
                logger.warning(
                    "metric %s/%s is %s at step %d and was not written",
                    namespace,
                    name,
                    value,
                    step,
                )
        line = json.dumps({"namespace": namespace, "step": step, **finite})
        self._enduring(self._lines.write)(line + "\n")

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text (Markdown) for TensorBoard."""
        self._tensorboard.add_text(tag, text, step)

    def flush(self) -> None:
        """Let readers see what was written."""
        self._tensorboard.flush()
        self._enduring(self._lines.flush)()

    def _enduring(self, write: Callable) -> Callable:
        """`write`, which goes on where the disk does not take it; the log says so once."""

        def attempt(*arguments):
            try:
                return write(*arguments)
            except OSError as error:
                if not self._disk_failed:
                    self._disk_failed = True
                    logger.error(
                        "metrics could not be written (%s); the run goes on, and they may have "
                        "gaps from here on (said once)",
                        error,
                    )
                return None

        return attempt

    def close(self) -> None:
        """Write the rest and end."""
        self._tensorboard.close()
        self._lines.close()


def memory_gb() -> float:
    """Most memory this run has held so far, in GiB: this process at its peak plus its children
    (interpreters, engine) now.

    Pages that children share count once (PSS).
    """
    import resource

    import psutil

    # ru_maxrss is in bytes on a Mac, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # a worker may end while we look
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    return total / 2**30
