"""The stages of a run: functions over its parts, called by schedules and by the loop.

Each writes its own metrics, moves `parts.progress` on and returns plain values. Nothing here blocks
the event loop for long: networks and interpreters work in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import numpy as np

from priorzero.loop.clocks import Ratio
from priorzero.loop.parts import Parts
from priorzero.loop.saving import save
from priorzero.play.results import CollectResult
from priorzero.run.report import evaluation_line
from priorzero.settings.evaluation import judging_mode

logger = logging.getLogger(__name__)


async def collect(parts: Parts, ask_llm: bool = True) -> CollectResult:
    """Play `num_segments` segments into the buffer.

    Args:
        ask_llm: False searches without the LLM's prior.
    """
    progress, policy = parts.progress, parts.settings.policy
    logger.info("[Iter %d] Collecting data...", progress.iteration)
    with parts.watch("collect"):
        result = await parts.collector.collect(
            policy.num_segments,
            progress.env_steps,
            policy.fixed_temperature_value,
            ask_llm,
        )

    parts.buffer.push_game_segments(result.segments)
    parts.buffer.remove_oldest_data_to_fit()

    progress.env_steps += result.steps
    progress.segments += len(result.segments)
    progress.transitions += result.transitions
    logger.info(
        "✓ Collected %d segments (total: %d segments, %d transitions)",
        len(result.segments),
        progress.segments,
        progress.transitions,
    )
    parts.metrics.scalars("collect", result.collect, progress.env_steps)
    parts.metrics.scalars("prior", result.prior, progress.env_steps)
    return result


def updates_due(parts: Parts, transitions: int) -> int:
    """The world model's updates that so many new transitions call for; 0 before the first
    `train_start_after_envsteps` steps are played.
    """
    policy = parts.settings.policy
    if parts.progress.env_steps < policy.train_start_after_envsteps:
        return 0
    return Ratio(policy.replay_ratio)(transitions)


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
    with parts.watch("train_llm"):
        metrics = await parts.llm.phase.run(parts.buffer.sample_llm)
    parts.progress.llm_version = parts.llm.trainer.version
    if metrics:
        parts.metrics.scalars("llm", metrics, parts.progress.env_steps)
    return metrics


async def evaluate(parts: Parts) -> dict[str, Any]:
    """Play evaluation episodes in every mode of the settings; keep the best checkpoint.

    Returns:
        the evaluation as the summary tells it: iteration, env_steps, and per mode its returns and
        lengths.
    """
    progress, settings = parts.progress, parts.settings
    record: dict[str, Any] = {"iteration": progress.iteration, "env_steps": progress.env_steps}
    with parts.watch("evaluate"):
        for mode in settings.eval.modes:
            result = await parts.evaluator.evaluate(
                mode,
                settings.env.n_evaluator_episode,
                progress.env_steps,
                f"iter{progress.iteration:06d}",
            )
            values = result.metrics()
            parts.metrics.scalars("eval", values, progress.env_steps)
            record[mode] = dict(returns=result.returns, lengths=result.lengths)
            logger.info(evaluation_line(progress.iteration, mode, values))
    parts.history.evaluations.append(record)
    parts.metrics.flush()

    # The untrained network's first evaluation is no checkpoint worth keeping.
    mean = float(np.mean(record[judging_mode(settings.eval.modes)]["returns"]))
    if progress.iteration and not parts.eval_only and mean > progress.best_return:
        before, progress.best_return = progress.best_return, mean
        if not await save(parts, best=True):
            progress.best_return = before
    return record
