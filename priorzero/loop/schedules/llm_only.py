"""llm_only: the LLM plays alone, without search and world model, and learns from its own episodes
(the preset llm_only): the baseline that planning has to beat.

It goes in rounds: `llm_only_episodes` episodes begin, and once the last of them has ended the LLM
trains, so that all of a round are played by the same weights. An iteration plays `num_segments`
segments, as in the other schedules, or what is left of the round; an environment that is through
with its episodes waits for the others.

    llm_only_episodes = 3, 2 environments, episodes of 4, 2 and 5 steps, 2 steps an iteration

    iteration    0     1     2     3     4
    environment  aa    aa                dd
                 bb    cc    cc    c     ee
    LLM                            1
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from priorzero.loop import reporting, stages
from priorzero.loop.parts import Parts

logger = logging.getLogger(__name__)


async def iterate(parts: Parts) -> None:
    """Play on in the present round; train at its end, log."""
    progress = parts.progress
    started = time.perf_counter()

    left = max(0, parts.config.llm_only_episodes - progress.round_episodes)
    collected = await stages.collect(parts, player="llm", new_episodes=left)
    progress.round_episodes += collected.begun
    where = {
        "round_episodes": float(progress.round_episodes),
        "round_running": float(collected.running),
    }

    llm: dict[str, float] = {}
    if not collected.running:
        llm = await stages.train_llm(parts)
        progress.round_episodes = 0
        _tell(llm)

    reporting.log_iteration(parts, collected, {}, llm, time.perf_counter() - started, where)


def _tell(llm: Mapping[str, float]) -> None:
    """A line at the end of a round."""
    if "rft_loss" not in llm:
        logger.info(
            "The round teaches nothing: of its %d groups, %d have one return only",
            llm.get("rft_groups", 0),
            llm.get("rft_groups_flat", 0),
        )
    else:
        logger.info(
            "Round over: %.0f episodes of these weights, return %.2f ± %.2f",
            llm["rft_group_episodes"],
            llm["rft_group_return"],
            llm["rft_group_spread"],
        )
