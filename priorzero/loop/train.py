"""The training loop: evaluate, iterate, save. Read this first.

What an iteration does (collect, train the world model, train the LLM) is a schedule: the method
`iterate(parts)` of the configuration where it has one, else the function of that name in the file
of `priorzero/loop/schedules/` that `wm_training_mode` names. What each stage does stands in
`stages.py`, what is saved in `saving.py`, what is told in `reporting.py`. Training and evaluation
may also run beside the loop (`beside.py`): then `parts.background` is asked to settle before
anything is saved or evaluated.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext

from priorzero import plugins
from priorzero.loop import beside, stages
from priorzero.loop.clocks import Every
from priorzero.loop.parts import Parts
from priorzero.loop.saving import save
from priorzero.run.boards.live import terminal_progress
from priorzero.run.data_parallel import CommonStop
from priorzero.run.signals import StopRequest

logger = logging.getLogger(__name__)


async def train(parts: Parts, stop: StopRequest | CommonStop) -> None:
    """Run the iterations that are left; on a signal finish the present step, save and return."""
    config, progress = parts.config, parts.progress

    schedule = config
    if not hasattr(config, "iterate"):
        schedule = plugins.load("priorzero.loop.schedules", config.wm_training_mode)
    finished = getattr(schedule, "finished", lambda parts: False)
    should_evaluate = Every(config.eval_freq)
    should_save = Every(config.save_freq)

    evaluate = beside.begin_evaluation if config.async_eval else stages.evaluate

    shown = nullcontext(lambda: None)
    if parts.ranks.first:
        live = parts.settings.metrics.live
        shown = terminal_progress(
            parts.metrics, parts.folder.name, progress.iteration, config.iterations, live
        )
    with shown as advance:
        async with beside.background(parts) as under_way:
            while progress.iteration < config.iterations and not stop.requested:
                if finished(parts):
                    logger.info(
                        "%s is finished after %d iterations",
                        config.wm_training_mode,
                        progress.iteration,
                    )
                    break
                if should_evaluate(progress.iteration) and not _evaluated(parts):
                    await under_way.settle()
                    await evaluate(parts)
                    if stop.requested:
                        break

                await schedule.iterate(parts)
                under_way.raise_failure()
                progress.iteration += 1
                advance()

                # The last iteration's checkpoint is written below, after the last evaluation.
                if should_save(progress.iteration) and progress.iteration < config.iterations:
                    await under_way.settle()
                    await save(parts)

            await under_way.settle()

    if stop.requested:
        logger.info(
            "Stopped by a signal after iteration %d; continue with --resume", progress.iteration
        )
    elif config.eval_freq:
        await stages.evaluate(parts)
    await save(parts)


def _evaluated(parts: Parts) -> bool:
    """Whether a resumed run was saved after this iteration's evaluation."""
    done = parts.history.evaluations
    return bool(done) and done[-1]["iteration"] == parts.progress.iteration
