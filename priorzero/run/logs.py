"""One logger for the run: lines a user can follow on the terminal, the same with times and modules
in a file.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

_OURS = (
    "priorzero",
    "priorzero_orz_entry",
    "priorzero_collector",
    "priorzero_evaluator",
    "priorzero_policy",
    "game_buffer_priorzero",
    "priorzero_config",
)
_NOISY = (
    "httpx",
    "urllib3",
    "matplotlib",
    "filelock",
    "fsspec",
    "asyncio",
    "transformers",
    "jax",
    "h5py",
    "numba",
    "spacy",
)


def setup_logging(folder: Path | None, level: int = logging.INFO, before: str = "") -> None:
    """Send our log to the terminal; keep other libraries at WARNING.

    Args:
        folder: where `run.log` is written too, or None.
        level: of our own loggers.
        before: what every line on the terminal begins with.
    """
    if not sys.stderr.isatty():  # bars of model loading fill a log file with control characters
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)

    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter(f"{before}%(message)s"))
    root.addHandler(terminal)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / "run.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
