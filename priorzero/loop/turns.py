"""Turns: the world model and the LLM train one after the other instead of in the same iterations.

The schedules sequential and alternating are made of this. A turn lasts a number of the world
model's updates, or of the LLM's training phases, and takes as many iterations as that needs.

Whose turn it is follows from `Progress.turns`, how much of it is done from `Progress.turn_updates`,
and nothing is kept elsewhere: a resumed run goes on within the turn it was in.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from priorzero.loop import reporting, stages
from priorzero.loop.parts import Parts
from priorzero.loop.progress import Progress
from priorzero.play.players import Player

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turns:
    """Who trains how long, and what is played meanwhile.

    Attributes:
        wm_updates: updates of the world model in each of its turns.
        llm_phases: training phases in each turn of the LLM, one an iteration.
        first: world_model or llm.
        llm_collect: what an iteration of the LLM's turn plays. everything: the search with the
            LLM's prior, as in the world model's turn; world_model: the search without it; nothing.
    """

    wm_updates: int
    llm_phases: int
    first: str = "world_model"
    llm_collect: str = "everything"

    def is_llms(self, progress: Progress) -> bool:
        """Whether the present turn is the LLM's."""
        return (progress.turns % 2 == 1) != (self.first == "llm")

    def length(self, progress: Progress) -> int:
        """Updates or phases of the present turn."""
        return self.llm_phases if self.is_llms(progress) else self.wm_updates


async def iterate(parts: Parts, turns: Turns) -> None:
    """One iteration of the present turn: collect, train whose turn it is, log."""
    progress = parts.progress
    llms_turn, length = turns.is_llms(progress), turns.length(progress)
    started = time.perf_counter()
    _tell(progress, llms_turn, length)

    collect = turns.llm_collect if llms_turn else "everything"
    if collect == "nothing" and _buffer_was_lost(parts):
        logger.info("The replay buffer is empty or nearly so: this iteration refills it by playing")
        collect = "everything"
    collected = None
    if collect != "nothing":
        player: Player = "search" if collect == "everything" else "search_alone"
        collected = await stages.collect(parts, player)

    wm: dict[str, float] = {}
    llm: dict[str, float] = {}
    if llms_turn:
        llm = await stages.train_llm(parts)
        if not llm:
            logger.warning("The LLM found no decision to learn from in this phase of its turn")
        # Such a phase counts: where there is nothing to learn the turn must end too.
        progress.turn_updates += 1
    else:
        left = max(0, length - progress.turn_updates)
        updates = min(left, stages.updates_due(parts, collected.transitions))
        wm = await stages.train_world_model(parts, updates)
        progress.turn_updates += updates

    where = {
        "turn": float(progress.turns),
        "turn_llm": float(llms_turn),
        "turn_updates": float(progress.turn_updates),
    }
    reporting.log_iteration(parts, collected, wm, llm, time.perf_counter() - started, where)

    if progress.turn_updates >= length:
        progress.turns, progress.turn_updates = progress.turns + 1, 0
    _warn_of_missing_turn(parts, turns)


def _tell(progress: Progress, llms_turn: bool, length: int) -> None:
    """A line at the beginning of a turn."""
    if progress.turn_updates == 0:
        whose, unit = ("LLM", "phases") if llms_turn else ("world model", "updates")
        logger.info(
            "[Iter %d] Turn %d: the %s, %d %s",
            progress.iteration,
            progress.turns,
            whose,
            length,
            unit,
        )


def _buffer_was_lost(parts: Parts) -> bool:
    """Whether the buffer holds less than the LLM draws from although as much was played before: a
    run may be resumed without it.
    """
    policy, llm = parts.settings.policy, parts.settings.llm
    drawn_from = max((g.recent_transitions for g in (llm.sft, llm.rft) if g.enable), default=0)
    # A full buffer has room for less than a segment.
    full = policy.replay_buffer_size - policy.game_segment_length
    held = parts.buffer.get_num_of_transitions()
    return held < min(drawn_from, full, parts.progress.transitions)


def _warn_of_missing_turn(parts: Parts, turns: Turns) -> None:
    """After the last iteration: one of the two may never have trained."""
    progress, iterations = parts.progress, parts.config.iterations
    over = progress.iteration + 1 >= iterations
    if over and (progress.turns, progress.turn_updates) <= (1, 0):
        missing = "world model" if turns.first == "llm" else "LLM"
        logger.warning(
            "The %d iterations are over before the %s had a turn: raise iterations, or shorten the "
            "first turn",
            iterations,
            missing,
        )
