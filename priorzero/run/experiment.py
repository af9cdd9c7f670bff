"""The folder of an experiment: a new run under a used name never writes over the old one; what a
run saved of its settings.
"""

from __future__ import annotations

import json
import logging
from functools import reduce
from pathlib import Path
from typing import Any

from priorzero.types import PriorZeroError

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


def saved_settings(folder: Path, *needed: str) -> dict[str, Any]:
    """The settings that a run wrote to its config.json, as plain values.

    Args:
        folder: of the experiment.
        needed: dotted names without which the file is of no use.

    Raises:
        PriorZeroError: it is no run's folder, or the file is damaged.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        for name in needed:
            reduce(lambda group, key: group[key], name.split("."), settings)
    except FileNotFoundError as error:
        raise PriorZeroError(
            f"{folder} is no run's folder: it holds no config.json. Runs lie in data_priorzero/"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PriorZeroError(
            f"{path} is damaged ({type(error).__name__}: {error}); without it the run's settings "
            "are not known"
        ) from error
    return settings
