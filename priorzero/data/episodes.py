"""Whole episodes, put together from the segments that are held of them: what a return needs that
runs to the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from priorzero.data.segment import Segment, StepRecord


@dataclass(frozen=True, eq=False)
class Episode:
    """From its first step to its end.

    Attributes:
        steps: all of them, `n` >= 1.
        game: plain name of its game where the run plays several; else empty.
    """

    steps: tuple[StepRecord, ...]
    game: str = ""

    @property
    def rewards(self) -> np.ndarray:
        """`[n]` what each step earned."""
        return np.array([step.reward for step in self.steps])


def whole_episodes(segments: Iterable[Segment]) -> list[Episode]:
    """The episodes that ended and whose every step is in these segments, in the order in which
    they began.

    A truncated episode has ended. One whose interpreter hung has not, nor has one that a resume
    lost: how it would have gone on is not known.

    Args:
        segments: those of an episode in the order in which they were played.
    """
    played: dict[int, list[StepRecord]] = {}
    games: dict[int, str] = {}
    for segment in segments:
        played.setdefault(segment.episode_id, []).extend(segment.steps)
        games[segment.episode_id] = segment.game

    found = []
    for episode_id, steps in sorted(played.items()):
        # Steps count from 0, so an episode of which a part is missing is shorter than its count.
        complete = len(steps) == steps[-1].timestep + 1
        if complete and steps[-1].done_kind in ("terminated", "truncated"):
            found.append(Episode(tuple(steps), games[episode_id]))
    return found
