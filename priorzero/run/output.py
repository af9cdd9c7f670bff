"""Folders that a command writes: they appear whole, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from priorzero.types import PriorZeroError


def require_free(out: Path) -> None:
    """Raise PriorZeroError where something already stands at `out`."""
    if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
        raise PriorZeroError(f"{out} exists already and is not empty; name a new folder")


@contextmanager
def new_folder(out: Path, *faults: type[Exception]) -> Iterator[Path]:
    """Where, beside `out`, a folder is to be made and filled; when it is whole it becomes `out`.

    Args:
        out: New, or an empty folder.
        faults: What a writer raises, beside OSError, where the disk does not take its file.

    Raises:
        PriorZeroError: It could not be written; nothing is left of it.
    """
    making = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        whole = making / "whole"
        yield whole
        whole.rename(out)
    except (OSError, *faults) as error:
        raise PriorZeroError(
            f"{out} could not be written ({error}); nothing is left of it. Free space, or name a "
            "folder elsewhere"
        ) from error
    finally:
        if making is not None:
            shutil.rmtree(making, ignore_errors=True)
