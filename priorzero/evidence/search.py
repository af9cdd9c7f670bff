"""What a run's search makes of its prior, along the walkthrough of the run's game.

At every judged step the run's agent plans as in an evaluation, looking back on the walkthrough's
own steps. The right command's rank is then told under each of the distributions that lie between
the LLM and the command that is played.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from priorzero.agent.agent import Agent
from priorzero.agent.load import Checkpoint, make_agent, make_prior, read_checkpoint, read_settings
from priorzero.evidence.metrics import Judged, figures, judge, uniform_figures
from priorzero.evidence.walk import Walk, WalkStep, walk
from priorzero.games.catalogue import resolve_game
from priorzero.games.families import kinship
from priorzero.games.judging import judging_only
from priorzero.llm.prior import LLMPrior
from priorzero.search.context import EpisodeContext
from priorzero.search.roots import Root, SearchOutput
from priorzero.types import PriorZeroError

STAGES = ("LLM", "world model", "mixture", "search target", "visits")
"""The LLM's softmax as the mixture reads it; the network's policy at the root; both mixed; the
policy the search arrived at; its visit counts' shares.
"""
_TINY = 1e-12  # of a command without a visit: it has no logarithm, and ranks behind all visited

Row = dict[str, Any]


async def measure_search(run: Path, which: str, steps: int) -> list[Row]:
    """Figures by stage.

    Args:
        run: an experiment's folder.
        which: checkpoint: latest, best or a folder's name.
        steps: walkthrough commands at most; 0: all.

    Returns:
        one row per stage, uniform choice first: run, checkpoint, game, stage, `metrics.figures`;
        `dropped` is how many decisions are left out because the vocabulary had no place for a right
        command.

    Raises:
        PriorZeroError: run, game or LLM cannot be had, or nothing can be judged.
    """
    settings = read_settings(run)
    saved = read_checkpoint(run, which, settings)
    game = saved.meta["game"] if settings.env.env_id == "auto" else settings.env.env_id
    spec = resolve_game(game, settings.env.games_dir)
    walked = walk(spec, steps, settings.llm.prompt.history_length)
    if not walked.judged:
        raise PriorZeroError(f"no walked command of {spec.env_id} can be judged; raise --steps")

    agent = make_agent(saved)
    prior = make_prior(saved) if settings.llm.enable else None
    try:
        planned = await _Guided(agent, prior, saved).along(walked)
    finally:
        if prior is not None:
            await prior.engine.close()

    place = {
        "run": run.name,
        "checkpoint": saved.name,
        "env_steps": saved.meta["env_steps"],
        "game": spec.env_id,
        "family": kinship(spec).family,
        "judging_only": judging_only(spec),
        "dropped": len(walked.judged) - len(planned),
    }
    if not planned:
        raise PriorZeroError(f"the vocabulary of {run} holds no right command of {spec.env_id}")
    uniform = uniform_figures([one.outcomes for one in planned])
    rows = [place | {"stage": "uniform"} | uniform]
    for stage in STAGES:
        judged = [one.judged[stage] for one in planned if stage in one.judged]
        if judged:
            rows.append(place | {"stage": stage} | figures(judged))
    return rows


@dataclass(frozen=True)
class _Planned:
    """One judged step: outcomes `[A]` of what the search chose from, and a judgement by stage."""

    outcomes: tuple[int, ...]
    judged: Mapping[str, Judged]


class _Guided:
    """An agent that is led along a walkthrough."""

    def __init__(self, agent: Agent, prior: LLMPrior | None, saved: Checkpoint) -> None:
        self._agent, self._prior, self._saved = agent, prior, saved

    async def along(self, walked: Walk) -> list[_Planned]:
        context = EpisodeContext(self._agent.settings.context_steps)
        found = []
        for step in walked.steps:
            context.observe(self._agent.encode([step.state.observation])[0])
            if step.judged:
                planned = await self._plan(step, context)
                if planned is not None:
                    found.append(planned)

            # As an agent would have typed it.
            typed = step.command
            if step.judged and typed not in step.state.valid_actions:
                typed = step.state.valid_actions[step.outcomes.index(0)]
            (action,) = self._agent.ids([typed])
            if action is None:  # a full vocabulary: the network cannot be told what was typed
                context = EpisodeContext(self._agent.settings.context_steps)
            else:
                context.act(action)
        return found

    async def _plan(self, step: WalkStep, context: EpisodeContext) -> _Planned | None:
        ids = self._agent.ids(step.state.valid_actions)
        kept = [at for at, one in enumerate(ids) if one is not None]
        outcomes = tuple(step.outcomes[at] for at in kept)
        if 0 not in outcomes:
            return None
        actions = tuple(step.state.valid_actions[at] for at in kept)

        llm = None
        if self._prior is not None:
            (request,) = self._prior.requests([step.state], [actions])
            (scores,) = await self._prior.ask([request])
            llm = np.asarray(scores.totals(self._agent.settings.root_prior.reduction))
        valid_ids = np.asarray([ids[at] for at in kept])
        root = Root(context.observations, context.actions, valid_ids, llm)
        plan = self._agent.plan(root, self._saved.meta["env_steps"])
        return _Planned(outcomes, _judge(plan, outcomes))


def _judge(plan: SearchOutput, outcomes: tuple[int, ...]) -> dict[str, Judged]:
    """The stages that there are; without an LLM its own is missing."""
    shares = plan.visit_counts / plan.visit_counts.sum()
    scores = {
        "LLM": plan.prior.log_llm,
        "world model": plan.prior.log_wm,
        "mixture": plan.prior.log_mixed,
        "search target": np.log(np.maximum(plan.target_policy, _TINY)),
        "visits": np.log(np.maximum(shares, _TINY)),
    }
    return {
        stage: judge(np.asarray(values, dtype=np.float64), outcomes, 1.0)
        for stage, values in scores.items()
        if values is not None
    }
