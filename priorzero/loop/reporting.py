"""What a run tells of itself: an iteration's line and metrics, its settings, its summary."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from priorzero.data.segment import Segment
from priorzero.llm.prior import prior_table
from priorzero.loop.clocks import Every
from priorzero.loop.parts import Parts
from priorzero.play.results import CollectResult
from priorzero.run.report import first_and_last
from priorzero.settings.env import in_words

logger = logging.getLogger(__name__)


def log_iteration(
    parts: Parts,
    collected: CollectResult | None,
    wm: Mapping[str, float],
    llm: Mapping[str, float],
    seconds: float,
    schedule: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """What every iteration tells, whatever its schedule.

    Args:
        collected: None where nothing was.
        wm, llm: metrics as the stages return them; empty where nothing trained.
        seconds: of the iteration.
        schedule: what the schedule tells of itself, for perf/.
    """
    log_losses(parts, wm, llm)
    if collected is not None and Every(parts.config.sample_prompt_freq)(parts.progress.iteration):
        log_sample_prompt(parts, collected.segments)
    (transitions,) = parts.ranks.total(0 if collected is None else collected.transitions)
    log_performance(parts, transitions, seconds, schedule)


def log_losses(parts: Parts, wm: Mapping[str, float], llm: Mapping[str, float]) -> None:
    """One line about the phases that ran in this iteration.

    Args:
        wm, llm: metrics as the stages return them; empty where nothing trained.
    """
    parts.history.add_losses(wm)
    parts.history.add_losses(llm)

    told = [f"wm_loss: {wm['wm_loss']:.4f}"] if wm else []
    for kind in ("sft", "rft"):
        # ORZ's trainer tells the policy's part of the loss alone.
        name = next((n for n in (f"{kind}_loss", f"{kind}_policy_loss") if n in llm), None)
        if name is not None:
            told.append(f"llm_{name}: {llm[name]:.4f}")
    if told:
        logger.info("✓ %s training done - %s", "WM" if wm else "LLM", ", ".join(told))


def log_sample_prompt(parts: Parts, segments: Sequence[Segment]) -> None:
    """One decision as text: the prompt, and the prior against the visit counts."""
    if parts.llm is None:
        return
    for step in (step for segment in segments for step in segment.steps):
        if step.scores is not None and len(step.valid_actions) > 1:
            break
    else:
        return

    prompt = parts.llm.engine.tokeniser.decode(step.request.prompt_ids)
    table = prior_table(step, parts.settings.policy.root_prior.reduction)
    parts.metrics.text("prior/sample", f"```\n{prompt}\n```\n\n{table}", parts.progress.env_steps)


def log_performance(
    parts: Parts, transitions: int, seconds: float, schedule: Mapping[str, float]
) -> None:
    """Seconds per stage since the last call, speed, and cache hit rates of the run so far.

    Args:
        transitions, seconds: of the iteration.
        schedule: see `log_iteration`.
    """
    totals = parts.collector.totals()
    games, encoder = totals.games, totals.encoder
    lookups = games["state_hits"] + games["state_misses"]
    asked = encoder["hits"] + encoder["misses"]

    perf = {f"seconds_{stage}": spent for stage, spent in parts.watch.lap().items()}
    perf |= {
        "seconds_iteration": seconds,
        "env_steps_per_second": transitions / seconds,
        "valid_action_hit_rate": games["state_hits"] / lookups if lookups else 1.0,
        "encoder_hit_rate": encoder["hits"] / asked if asked else 0.0,
        "memory_gb": parts.memory.update(),
        "episodes_lost": float(parts.progress.episodes_lost),
        "save_failures": float(parts.progress.save_failures),
        "metrics_failures": float(parts.metrics.failures),
    }
    perf |= parts.recorder.stats()
    perf |= totals.search | totals.workers
    perf |= {f"games_{k}": float(v) for k, v in games.items()}
    perf |= {f"vocabulary_{k}": float(v) for k, v in parts.policy.vocabulary.stats().items()}
    if parts.llm is not None:
        llm = totals.llm | parts.llm.phase.stats()
        perf |= {f"llm_{k}": v for k, v in llm.items()}

    if parts.background.degree:
        perf |= parts.background.metrics(parts.policy.acting_version)
    if parts.config.async_eval:
        perf["background_eval_behind"] = float(parts.background.evaluation.behind)
    perf |= schedule

    parts.metrics.scalars("perf", perf, parts.progress.env_steps)
    parts.metrics.flush()


def write_config(parts: Parts) -> None:
    """Keep the settings beside the run.

    Only after a checkpoint was loaded: it may not fit these settings, and then the old ones stay.
    """
    config = parts.config.as_dict() | {"llm_warning": parts.llm_warning}
    text = json.dumps(config, indent=1, default=str)
    (parts.folder / "config.json").write_text(text, encoding="utf-8")
    parts.metrics.settings(config)


def write_summary(parts: Parts) -> dict[str, Any]:
    """Facts of the run; written to summary.json (evaluation.json with eval_only) and to the log."""
    first, last = first_and_last(parts.history.losses)
    summary = {
        "experiment": str(parts.folder),
        "game": in_words(parts.game_names),
        "games": parts.game_names,
        "eval_games": [game.env_id for game in parts.eval_games],
        "seed": parts.settings.seed,
        "iterations": parts.progress.iteration,
        "env_steps": parts.progress.env_steps,
        "minutes": (time.time() - parts.started) / 60,
        "memory_gb": parts.memory.update(),
        "first_losses": first,
        "last_losses": last,
        "seconds_per_stage": {k: round(v, 2) for k, v in parts.watch.seconds.items()},
        "llm": parts.llm_name,
        "llm_warning": parts.llm_warning,
        "evaluations": parts.history.evaluations,
    }
    path = parts.folder / ("evaluation.json" if parts.eval_only else "summary.json")
    try:
        path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    except OSError as error:
        logger.error("%s could not be written: %s", path, error)

    logger.info(
        "Done: %d iterations, %d environment steps in %.1f minutes, %.1f GB at most. %s",
        summary["iterations"],
        summary["env_steps"],
        summary["minutes"],
        summary["memory_gb"],
        ", ".join(f"{k} {first[k]:.4f} → {last[k]:.4f}" for k in last),
    )
    if parts.llm_warning:
        logger.warning("%s", parts.llm_warning)
    return summary
