"""Walks kept on disk by what they come of, for the next report or warm-up and for machines that
cannot walk: a folder of them in `$PRIORZERO_CACHE` travels.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from priorzero.evidence.walk import Walk, WalkStep
from priorzero.games.records import GameSpec
from priorzero.games.valid_actions import cache_root
from priorzero.types import HistoryItem, TextState

logger = logging.getLogger(__name__)


def kept_walk(
    folder: str, facts: Sequence[object], game: GameSpec, make: Callable[[], Walk]
) -> tuple[Walk, bool]:
    """A walk of a game from the disk, else a new one, which is then kept.

    A walk that ended at a fault is not kept: a time limit that struck on a busy machine would
    shorten it for ever.

    Args:
        folder: of this kind of walk, in the cache folder.
        facts: all that the walk depends on besides the game, plain values; a version among them.
        make: walks.

    Returns:
        the walk, and whether it was known.

    Raises:
        PriorZeroError: `make` does.
    """
    path = _place(folder, facts, game)
    known = _read(path, game)
    if known is not None:
        return known, True
    made = make()
    if not made.fault:
        _write(path, made)
    return made, False


def _place(folder: str, facts: Sequence[object], game: GameSpec) -> Path:
    """By contents, not by path: the same on every machine that has the same story."""
    version, *others = facts
    key = [version, game.story_key, game.goal, game.walkthrough, *others]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return cache_root() / folder / f"{digest}.json.gz"


def _write(path: Path, walked: Walk) -> None:
    """Beside its place, then renamed. A disk that takes nothing costs the next start time only."""
    data = json.dumps({"fault": walked.fault, "steps": [asdict(s) for s in walked.steps]})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(gzip.compress(data.encode(), mtime=0))
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): walked again next time", path, error)


def _read(path: Path, game: GameSpec) -> Walk | None:
    """None where it is not there, or damaged: then it is walked again."""
    if not path.is_file():
        return None
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
        return Walk(game, tuple(map(_step, found["steps"])), found["fault"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%r): %s is walked again", path, error, game.env_id)
        return None


def _step(row: dict) -> WalkStep:
    state = row["state"]
    return WalkStep(
        TextState(
            state["observation"],
            tuple(state["valid_actions"]),
            tuple(HistoryItem(**item) for item in state["history"]),
            state["goal"],
            state["score"],
        ),
        row["command"],
        tuple(row["outcomes"]),
        row["idle"],
    )
