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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)


class Stopwatch:
    """Seconds per named stage, and how often each ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started
            self.calls[stage] += 1


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
        self.tensorboard = SummaryWriter(str(folder))
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def scalars(self, namespace: str, values: Mapping[str, float], step: int) -> None:
        """Write `namespace/name` for every finite value; what is not finite is named in the log
        instead.
        """
        if namespace not in self.NAMESPACES:
            raise ValueError(f"metrics namespace {namespace!r} is not one of {self.NAMESPACES}")
        finite = {}
        for name, value in values.items():
            if np.isfinite(value):
                finite[name] = float(value)
                self.tensorboard.add_scalar(f"{namespace}/{name}", float(value), step)
            else:
                logger.warning(
                    "metric %s/%s is %s at step %d and was not written",
                    namespace,
                    name,
                    value,
                    step,
                )
        self._lines.write(json.dumps({"namespace": namespace, "step": step, **finite}) + "\n")

    def text(self, tag: str, text: str, step: int) -> None:
        self.tensorboard.add_text(tag, text, step)

    def flush(self) -> None:
        self.tensorboard.flush()
        self._lines.flush()

    def close(self) -> None:
        self.tensorboard.close()
        self._lines.close()


def memory_gb() -> float:
    """Most memory this run has held so far, in GiB: this process at its peak plus its children
    (interpreters, engine) now.

    Pages that children share count once (PSS).
    """
    import resource

    import psutil

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # a worker may end while we look
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    return total / 2**30
