"""The numbers of a run: to `metrics.jsonl`, TensorBoard and other boards. Components return plain
dictionaries; prefixes are added here.

docs/METRICS.md explains every name. Counters of a run (hangs, fallbacks, cache hits) arrive as
totals since the start.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from priorzero.run.boards import Board, Guard
from priorzero.run.boards.tensorboard import TensorBoard

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
    scripts. What a board or the disk does not take is told once, counted, and costs nothing else.

    Args:
        folder: `<exp>/log`; TensorBoard files and `metrics.jsonl` go there.
        boards: further places that show them; they are closed with the writer.
    """

    NAMESPACES = ("collect", "wm", "llm", "eval", "prior", "perf")

    def __init__(self, folder: Path, boards: Iterable[Board] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # One disk, and one complaint about it.
        self._disk = Guard("metrics", OSError)
        self._failures = 0  # of boards that are gone
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._boards: dict[Board, Guard] = {TensorBoard(folder, self._disk): self._disk}
        for board in boards:
            self.add(board)

    def add(self, board: Board) -> None:
        """Show what follows on this board too."""
        self._boards[board] = Guard(f"metrics on {board.name}", Exception)

    def remove(self, board: Board) -> None:
        """Show nothing further on it, and close it; its failures stay counted."""
        guard = self._boards.pop(board)
        guard(board.close)
        self._failures += guard.failures

    @property
    def failures(self) -> int:
        """Writes that the disk or a board did not take."""
        return self._failures + sum(guard.failures for guard in set(self._boards.values()))

    def settings(self, config: Mapping[str, Any]) -> None:
        """Show the run's settings, as in config.json."""
        self._tell("settings", config)

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
            else:
                logger.warning(
                    "metric %s/%s is %s at step %d and was not written",
                    namespace,
                    name,
                    value,
                    step,
                )
        line = json.dumps({"namespace": namespace, "step": step, **finite})
        self._disk(self._lines.write, line + "\n")
        self._tell("scalars", {f"{namespace}/{k}": v for k, v in finite.items()}, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text (Markdown)."""
        self._tell("text", tag, text, step)

    def flush(self) -> None:
        """Let readers see what was written."""
        self._tell("flush")
        self._disk(self._lines.flush)

    def close(self) -> None:
        """Write the rest and end."""
        self._tell("close")
        self._disk(self._lines.close)

    def _tell(self, method: str, *arguments: Any) -> None:
        """Call a method of every board."""
        for board, guard in self._boards.items():
            guard(getattr(board, method), *arguments)


class NoMetrics:
    """A `MetricsWriter` that writes nothing: of all but the first process of a data-parallel run,
    which tells for all.
    """

    failures = 0

    def add(self, board: Board) -> None:
        """Nothing is shown."""

    def remove(self, board: Board) -> None:
        """Nothing was."""

    def settings(self, config: Mapping[str, Any]) -> None:
        """Nothing is shown."""

    def scalars(self, namespace: str, values: Mapping[str, float], step: int) -> None:
        """Nothing is written."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Nothing is shown."""

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""


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
