"""parallel: the world model trains every `wm_train_freq` iterations and the LLM every
`llm_train_freq`, in the same iterations, from what was just collected and what the buffer holds.

    iteration    0     1     2     3     4     5
    collect      x     x     x     x     x     x
    world model  x     x     x     x     x     x      wm_train_freq = 1
    LLM                      x                 x      llm_train_freq = 3

With `off_policy_degree` above 0 training runs beside the collection that follows: an iteration
collects and hands over what is due, and the next one begins while no chain of training is more than
so many phases behind (`priorzero/loop/beside.py`).

    time           ->
    collect        0  1  2  3  4  5
    world model       0  1  2  3  4  5               off_policy_degree = 1
    LLM                     2 2 2    5 5 5
"""

from __future__ import annotations

import time

from priorzero.loop import beside, reporting, stages
from priorzero.loop.clocks import Every
from priorzero.loop.parts import Parts


async def iterate(parts: Parts) -> None:
    """Collect, train what is due, log."""
    config, iteration = parts.config, parts.progress.iteration
    train_world_model = Every(config.wm_train_freq)
    train_llm = Every(config.llm_train_freq, phase=config.llm_train_freq - 1)
    started = time.perf_counter()

    await parts.background.room()
    collected = await stages.collect(parts)

    updates = 0
    if train_world_model(iteration):
        # As many transitions came in each iteration since the last phase as in this one, roughly.
        updates = stages.updates_due(parts, collected.transitions * config.wm_train_freq)

    wm: dict[str, float] = {}
    llm: dict[str, float] = {}
    if config.off_policy_degree:
        beside.hand_over(parts, updates, train_llm(iteration))
    else:
        wm = await stages.train_world_model(parts, updates)
        llm = await stages.train_llm(parts) if train_llm(iteration) else {}

    reporting.log_iteration(parts, collected, wm, llm, time.perf_counter() - started)
