"""The folder of an experiment: a new run under a used name never writes over the old one."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def set_aside(folder: Path) -> Path | None:
    """Rename an experiment that has a checkpoint to `<name>.old-<n>`, and say so; None where there
    is none.

    Without this a second run under the same name would mix its metrics with the first one's, and
    its first save would drop the first one's checkpoints.
    """
    if not (folder / "ckpt" / "latest").exists():
        return None

    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.warning(
        "%s holds an earlier run; it was renamed to %s and this run starts anew (to go on with it "
        "instead: --resume)",
        folder,
        aside,
    )
    return aside
