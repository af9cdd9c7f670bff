"""How far a run has come, and what its summary tells of the way. Both are saved with every
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """The running numbers of a run; whoever needs one is told it, nobody keeps a copy.

    Attributes:
        iteration: finished iterations.
        env_steps: played in collection, those of unfinished segments and of hangs included.
        updates: of the world model.
        llm_version: of the LLM's weights, 0 for the untrained ones.
        best_return: of the evaluations so far, under the mode that judges, as
            `EvalResult.judgement` tells it.
        segments: pushed into the buffer since the run's start.
        transitions: in those segments.
        turns: finished ones, in schedules that have turns (`turns.py`).
        turn_updates: done of the present turn: the world model's updates, or the LLM's phases.
        round_episodes: begun in the present round of llm_only.
        episodes_lost: running episodes that did not come back at a resume.
        save_failures: checkpoints that could not be written.
    """

    iteration: int = 0
    env_steps: int = 0
    updates: int = 0
    llm_version: int = 0
    best_return: float = -math.inf
    segments: int = 0
    transitions: int = 0
    turns: int = 0
    turn_updates: int = 0
    round_episodes: int = 0
    episodes_lost: int = 0
    save_failures: int = 0


@dataclass
class History:
    """What `summary.json` tells of the way.

    Attributes:
        evaluations: every one, as `stages.note_evaluation` writes it.
        losses: by name, one mean per training phase.
    """

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add_losses(self, metrics: Mapping[str, float]) -> None:
        """Keep the losses among these metrics of one phase."""
        for name in ("wm_loss", "sft_loss", "rft_loss"):
            if name in metrics:
                self.losses.setdefault(name, []).append(metrics[name])
