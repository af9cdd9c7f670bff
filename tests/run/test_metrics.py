"""Metrics on a disk that takes no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# No file may grow beyond 4 KB; 2,000 scalars are far more, in both files.
CODE = """
import logging, pathlib, resource, sys
from priorzero.run.metrics import MetricsWriter
logging.basicConfig(format="%(message)s")
writer = MetricsWriter(pathlib.Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for step in range(200):
    writer.scalars("perf", {f"value_{i}": float(i) for i in range(10)}, step)
    writer.flush()
print("went on")
"""


def test_a_full_disk_neither_ends_nor_stops_the_run(tmp_path):
    """Defect: the thread of the event file died, and the run waited for it for ever."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "went on\n", done.stderr
    assert done.stderr.count("metrics could not be written") == 1
    assert 0 < (tmp_path / "metrics.jsonl").stat().st_size <= 4096
