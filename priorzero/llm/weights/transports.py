"""How weights travel to an engine in another process: as files, in shared memory where there is
some. An engine in this process copies tensors instead (`Weights.copy_into`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder_in_transit(version: int) -> Iterator[Path]:
    """A path for the weights of this version, gone afterwards: readers keep what they loaded.

    The path is new each time, because readers may cache by it; its parent exists, it does not.
    """
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    parent = Path(tempfile.mkdtemp(prefix="priorzero-weights-", dir=base))
    try:
        yield parent / f"v{version}"
    finally:
        shutil.rmtree(parent, ignore_errors=True)
