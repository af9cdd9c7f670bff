"""Commands whose reader has gone, as in `| head`: no traceback, and the exit status they would have
had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SWEEP = {"games": ["tw-simple"], "seeds": [1, 2], "variants": {"only": "--no-llm"}}


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["priorzero.sweep", "sweep.json", "--plan"], 0),  # two lines
        (["priorzero.sweep", "missing.json", "--plan"], 2),
        (["priorzero.games.cache", "--cache", "states.sqlite", "info"], 0),
    ],
)
def test_a_reader_that_has_gone_is_no_fault(tmp_path, command, status):
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},  # as in a shell
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
