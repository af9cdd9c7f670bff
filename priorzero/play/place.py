"""A visited state that an episode can begin at: `restarts.py` remembers it, a slot begins there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from priorzero.data.segment import StepRecord
from priorzero.types import HistoryItem


@dataclass(frozen=True, eq=False)
class Place:
    """A visited state, and all that an episode needs that goes on from it.

    Attributes:
        game: `TextGameEnv.state_dict` there: seed, commands, and what they led to.
        before: the steps right before it, oldest first: what a root there looks back on.
        history: what the LLM may see of the way, oldest first.
    """

    game: Mapping[str, Any]
    before: tuple[StepRecord, ...]
    history: tuple[HistoryItem, ...]

    @property
    def score(self) -> float:
        """Of the game."""
        return self.game["score"]

    @property
    def steps(self) -> int:
        """Commands on the way."""
        return len(self.game["commands"])
