"""The stages of a run: functions over its parts, called by schedules and by the loop.

Each writes its own metrics, moves `parts.progress` on and returns plain values. Nothing here blocks
the event loop for long: networks and interpreters work in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from priorzero.llm.update.groups import GroupDraw
from priorzero.loop.clocks import Ratio
from priorzero.loop.parts import Evaluator, Parts
from priorzero.loop.saving import save
from priorzero.play.players import Player
from priorzero.play.results import CollectResult, EvalResult
from priorzero.run.report import evaluation_line
from priorzero.search.exploration import noise_weight_at, temperature_at
from priorzero.settings.evaluation import judging_mode

logger = logging.getLogger(__name__)


async def collect(
    parts: Parts, player: Player = "search", new_episodes: int | None = None
) -> CollectResult:
    """Play `num_segments` segments into the buffer.

    Args:
        player: who plays.
        new_episodes: how many episodes may begin; None: as many as end.
    """
    progress, policy = parts.progress, parts.settings.policy
    told = {}
    if policy.annealing.duration:
        told["temperature"] = temperature_at(policy, progress.env_steps)
        told["root_noise"] = noise_weight_at(policy, progress.env_steps)
    logger.info("[Iter %d] Collecting data...", progress.iteration)
    with parts.watch("collect"), parts.background.collecting():
        result = await parts.collector.collect(
            policy.num_segments,
            progress.env_steps,
            temperature_at(policy, progress.env_steps),
            player,
            new_episodes,
        )

    parts.buffer.push_game_segments(result.segments)
    parts.buffer.remove_oldest_data_to_fit()

    counts = result.steps, len(result.segments), result.transitions
    if parts.ranks.several:
        counts = parts.ranks.total(*counts)
        parts.policy.meet(parts.ranks)
    progress.env_steps += counts[0]
    progress.segments += counts[1]
    progress.transitions += counts[2]
    logger.info(
        "✓ Collected %d segments (total: %d segments, %d transitions)",
        counts[1],
        progress.segments,
        progress.transitions,
    )
    parts.metrics.scalars("collect", result.collect | told, progress.env_steps)
    calibrated = calibrate(parts) if player == "search" else {}
    parts.metrics.scalars("prior", result.prior | calibrated, progress.env_steps)
    return result


def calibrate(parts: Parts) -> dict[str, float]:
    """Fit the LLM's temperature to the newest decisions, where the settings say so; after a
    collection in which it was asked, since only there are answers of its present weights.

    Returns:
        metrics; empty where nothing is calibrated.
    """
    root_prior = parts.settings.policy.root_prior
    if parts.llm is None or not root_prior.calibrated:
        return {}
    return parts.policy.calibrate(parts.buffer.newest_scored(root_prior.calibration.most))


def updates_due(parts: Parts, transitions: int) -> int:
    """The world model's updates that so many new transitions call for; 0 before the first
    `train_start_after_envsteps` steps are played. In a data-parallel run as many in each process,
    for the mean of what they played.
    """
    policy = parts.settings.policy
    if parts.progress.env_steps < policy.train_start_after_envsteps:
        return 0
    (transitions,) = parts.ranks.total(transitions)
    return Ratio(policy.replay_ratio / parts.ranks.size)(transitions)


async def train_world_model(parts: Parts, updates: int) -> dict[str, float]:
    """Update the world model from the buffer so many times.

    Returns:
        means over the updates, their number as `updates`, and seconds per update, without drawing
        the batch or searching it anew, as `train_time`; empty without updates.
    """
    if updates == 0:
        return {}
    with parts.watch("train_wm"):
        metrics = await asyncio.to_thread(_update_world_model, parts, updates)
    parts.progress.updates += updates
    parts.metrics.scalars("wm", metrics, parts.progress.env_steps)
    return metrics


def _update_world_model(parts: Parts, updates: int) -> dict[str, float]:
    settings = parts.settings.policy
    outputs: list[Any] = []
    others: list[dict[str, float]] = []
    seconds = 0.0
    for _ in range(updates):
        batch = parts.buffer.sample(settings.batch_size)
        fresh: dict[str, float] = {}
        if batch.revisits:
            with parts.watch("reanalyse"):
                batch, fresh = parts.policy.reanalyse(batch, parts.progress.env_steps)

        started = time.perf_counter()
        output = parts.policy.learn_mode.forward(batch)
        priorities = output.priorities if settings.use_priority else None
        seconds += time.perf_counter() - started
        outputs.append(output)
        others.append(fresh)

        if priorities is not None:
            parts.buffer.update_priority(batch.indices, priorities)

    # Read at the end: a GPU works on one update while the next batch is drawn.
    started = time.perf_counter()
    told = [output.metrics | fresh for output, fresh in zip(outputs, others, strict=True)]
    seconds += time.perf_counter() - started

    means = {name: float(np.mean([one[name] for one in told])) for name in told[0]}
    return means | {"updates": float(updates), "train_time": seconds / updates}


async def train_llm(parts: Parts) -> dict[str, float]:
    """One training phase of the LLM, its weights published to the engine.

    Returns:
        the phase's metrics; empty without an LLM, or where the buffer holds nothing to learn from.
    """
    if parts.llm is None:
        return {}
    rft, draw = parts.settings.llm.rft, parts.buffer.sample_llm
    if rft.relative:
        draw = GroupDraw(parts.buffer.sample_episodes, rft, parts.llm.trainer.version)

    with parts.watch("train_llm"):
        metrics = await parts.llm.phase.run(draw)
    if rft.relative:
        metrics |= draw.metrics
    parts.progress.llm_version = parts.llm.trainer.version
    if metrics:
        parts.metrics.scalars("llm", metrics, parts.progress.env_steps)
    return metrics


async def evaluate(parts: Parts) -> None:
    """Play evaluation episodes in every mode of the settings; keep the best checkpoint. Of several
    processes the first plays, and the others wait.
    """
    progress, modes = parts.progress, parts.settings.eval.modes
    place = progress.iteration, progress.env_steps
    played: Mapping[str, EvalResult] = {}
    if parts.ranks.first:
        played = await play(parts, parts.evaluator, modes, *place)
    played = parts.ranks.from_first(played)
    mean = note_evaluation(parts, played, *place)

    # The untrained network's first evaluation is no checkpoint worth keeping.
    if progress.iteration and not parts.eval_only and mean > progress.best_return:
        before, progress.best_return = progress.best_return, mean
        if not await save(parts, best=True):
            progress.best_return = before


async def play(
    parts: Parts, evaluator: Evaluator, modes: Sequence[str], iteration: int, env_steps: int
) -> dict[str, EvalResult]:
    """Evaluation episodes in these modes, of what was learnt after so many iterations and
    environment steps; returns their results by mode.
    """
    played = {}
    with parts.watch("evaluate"):
        for mode in modes:
            played[mode] = await evaluator.evaluate(
                mode, parts.settings.env.n_evaluator_episode, env_steps, f"iter{iteration:06d}"
            )
            values = played[mode].metrics()
            parts.metrics.scalars("eval", values, env_steps)
            logger.info(evaluation_line(iteration, mode, values))
            for game in played[mode].by_game:
                logger.info(evaluation_line(iteration, f"{game}/{mode}", values))
    return played


def note_evaluation(
    parts: Parts, played: Mapping[str, EvalResult], iteration: int, env_steps: int
) -> float:
    """Add an evaluation to what the summary tells: iteration, env_steps, and per mode its returns
    and lengths, of several games also by game.

    Returns:
        what judges it, see `EvalResult.judgement`.
    """
    record: dict[str, Any] = {"iteration": iteration, "env_steps": env_steps}
    for mode in parts.settings.eval.modes:
        record[mode] = _told(played[mode])
        if played[mode].by_game:
            record[mode]["games"] = {n: _told(one) for n, one in played[mode].by_game.items()}
    parts.history.evaluations.append(record)
    parts.metrics.flush()
    return played[judging_mode(parts.settings.eval.modes)].judgement()


def _told(result: EvalResult) -> dict[str, Any]:
    return dict(returns=result.returns, lengths=result.lengths)
