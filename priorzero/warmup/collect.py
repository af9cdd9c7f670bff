"""The decisions of games, from their walkthroughs and, where a kind has a solver, from episodes
that stray; kept on disk by game and settings.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np

from priorzero.evidence.walk import Walk, WalkStep, walk, wander
from priorzero.games import kinds
from priorzero.games.families import kinship
from priorzero.games.kinds import GameKind
from priorzero.games.records import GameSpec
from priorzero.games.valid_actions import cache_root
from priorzero.settings.warmup import WarmupSettings
from priorzero.types import HistoryItem, PriorZeroError, TextState

logger = logging.getLogger(__name__)

_VERSION = 1  # of what is collected; raised when it changes


def collect(
    games: Sequence[GameSpec], settings: WarmupSettings
) -> tuple[list[Walk], dict[str, str]]:
    """Judged decisions of every game, several games at a time.

    Returns:
        one `Walk` per game with decisions, in the order of the games; and game -> why it has none.
    """
    jobs = settings.jobs or len(os.sched_getaffinity(0))
    done: dict[int, Walk] = {}
    without: dict[str, str] = {}
    started = time.perf_counter()

    with ThreadPoolExecutor(jobs, thread_name_prefix="walk") as pool:
        running = {pool.submit(_of_game, game, settings): i for i, game in enumerate(games)}
        for number, future in enumerate(as_completed(running), 1):
            game = games[running[future]]
            try:
                walked, source = future.result()
            except PriorZeroError as error:
                without[kinship(game).game] = str(error)
                logger.warning("%s is left out: %s", game.env_id, error)
                continue
            if not walked.steps:
                without[kinship(game).game] = "none of its commands is in a list and does something"
                continue

            done[running[future]] = walked
            logger.info(
                "[%d/%d] %s: %d decisions (%s, %.0f s so far)",
                number,
                len(games),
                game.env_id,
                len(walked.steps),
                source,
                time.perf_counter() - started,
            )

    return [done[i] for i in sorted(done)], without


def _of_game(game: GameSpec, settings: WarmupSettings) -> tuple[Walk, str]:
    """A game's decisions, and where they come from."""
    path = _place(game, settings)
    known = _read(path, game)
    if known is not None:
        return known, "from the cache"
    made = _walk(game, settings)
    _write(path, made)
    return made, "walked"


def _walk(game: GameSpec, settings: WarmupSettings) -> Walk:
    # Without snapshots a look at every outcome plays the game again from the start.
    kind = kinds.load(game.kind)
    compare = kind.snapshot is not GameKind.snapshot
    walked = walk(game, settings.steps, settings.history_length, compare=compare)
    steps = list(walked.judged)

    if kind.advise is not GameKind.advise:
        limit = 5 + 2 * len(game.walkthrough)
        for number in range(settings.wanders):
            rng = np.random.default_rng([settings.seed, number, _number(game.story_key)])
            strayed = wander(game, limit, settings.history_length, settings.stray, rng)
            steps += strayed.judged
    return Walk(game, tuple(_once(steps)), walked.fault)


def _once(steps: Sequence[WalkStep]) -> list[WalkStep]:
    """Without repetitions: an episode that strays begins where the walkthrough begins."""
    return list(dict.fromkeys(steps))


# ---- on disk -------------------------------------------------------------------------------------


def _place(game: GameSpec, settings: WarmupSettings) -> Path:
    facts = [
        _VERSION,
        game.story_key,
        game.goal,
        game.walkthrough,
        settings.steps,
        settings.history_length,
        settings.wanders,
        settings.stray,
        settings.seed,
    ]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    return cache_root() / "warmup" / f"{digest}.json.gz"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


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
