"""The decisions of games, from their walkthroughs and, where a kind has a solver, from episodes
that stray; kept on disk by game and settings.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from priorzero.evidence.kept import kept_walk
from priorzero.evidence.walk import Walk, WalkStep, walk, wander
from priorzero.games import kinds
from priorzero.games.families import kinship
from priorzero.games.kinds import GameKind
from priorzero.games.records import GameSpec
from priorzero.settings.warmup import WarmupSettings
from priorzero.types import PriorZeroError

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
    facts = (
        _VERSION,
        settings.steps,
        settings.history_length,
        settings.wanders,
        settings.stray,
        settings.seed,
    )
    walked, known = kept_walk("warmup", facts, game, lambda: _walk(game, settings))
    return walked, "from the cache" if known else "walked"


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


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
