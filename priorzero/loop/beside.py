"""What may run beside the loop: training phases beside the next collection (`off_policy_degree`),
and evaluations beside both (`async_eval`).

    off_policy_degree = 1: collection of iteration i + 1 runs beside the training that i brought

    collect      0 1 2 3 ...
    world model    0 1 2 ...

Threads: training writes the network in place, so collection plans with a copy that takes over the
weights of each finished phase between two searches (`PriorZeroPolicy.act_apart`). Both share the
buffer and the vocabulary, which are locked, and the LLM's engine, where requests and new weights
keep each other out (`LLMPhase`). An evaluation plays a snapshot of the policy, and while the LLM
has a part in it, the engine's weights stay as they are.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from priorzero.compute import thread_pool
from priorzero.loop import reporting, stages
from priorzero.loop.background import Background
from priorzero.loop.parts import Evaluator, Parts
from priorzero.loop.saving import mark_best, save
from priorzero.settings.evaluation import LLM_MODES

logger = logging.getLogger(__name__)


@asynccontextmanager
async def background(parts: Parts) -> AsyncIterator[Background]:
    """Around a run's iterations: makes ready what the schedule asks for, gives the chains, and ends
    them where the run fails.
    """
    config, chains = parts.config, parts.background
    chains.degree, chains.updates = config.off_policy_degree, parts.progress.updates

    if config.off_policy_degree or config.async_eval:
        # Of asyncio's default size; its own threads would begin with a search's number of threads.
        pool = thread_pool(min(32, (os.cpu_count() or 1) + 4), "beside")
        asyncio.get_running_loop().set_default_executor(pool)
    if config.off_policy_degree:
        parts.policy.act_apart(parts.progress.updates)

    try:
        yield chains
    except BaseException:
        await chains.abandon()
        raise


def hand_over(parts: Parts, updates: int, llm_due: bool) -> None:
    """Give the training that is due to the chains.

    Args:
        updates: of the world model; 0 for none. llm_due: a training phase of the LLM.
    """
    if updates:
        parts.background.updates += updates
        parts.background.world_model.add(partial(_train_world_model, parts, updates))
    if llm_due and parts.llm is not None:
        parts.background.llm.add(partial(_train_llm, parts))


async def _train_world_model(parts: Parts, updates: int) -> None:
    metrics = await stages.train_world_model(parts, updates)
    await asyncio.to_thread(parts.policy.offer_weights, parts.progress.updates)
    reporting.log_losses(parts, metrics, {})


async def _train_llm(parts: Parts) -> None:
    reporting.log_losses(parts, {}, await stages.train_llm(parts))


async def begin_evaluation(parts: Parts) -> None:
    """Evaluate what is learnt so far, beside what follows. Nothing else is under way.

    The checkpoint that may become the best one is written now: afterwards the weights are others.
    """
    judged = None
    # The untrained network's first evaluation is no checkpoint worth keeping.
    if parts.progress.iteration and await save(parts):
        judged = parts.checkpoints.hold()
    snapshot = await asyncio.to_thread(parts.policy.snapshot)

    place = parts.progress.iteration, parts.progress.env_steps
    logger.info("[Eval %d] plays beside what follows", place[0])
    evaluator = parts.evaluator.playing(snapshot)
    parts.background.evaluation.add(partial(_evaluate, parts, evaluator, *place, judged))


async def _evaluate(
    parts: Parts, evaluator: Evaluator, iteration: int, env_steps: int, judged: str | None
) -> None:
    """Play every mode, those with the LLM first: its weights in the engine stay as they are until
    they are over.
    """
    modes = parts.settings.eval.modes
    try:
        played = {}
        with_llm = [mode for mode in modes if mode in LLM_MODES]
        if with_llm:
            async with parts.llm.phase.weights_kept():
                played = await stages.play(parts, evaluator, with_llm, iteration, env_steps)
        others = [mode for mode in modes if mode not in LLM_MODES]
        played |= await stages.play(parts, evaluator, others, iteration, env_steps)

        mean = stages.note_evaluation(parts, played, iteration, env_steps)
        if iteration and mean > parts.progress.best_return and mark_best(parts, judged):
            parts.progress.best_return = mean
    finally:
        parts.checkpoints.release()
