"""Everything the prior report says: walks, scores and play, game by game and LLM by LLM."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.compute import resolve_device
from priorzero.evidence.choice import best_settings, held_out
from priorzero.evidence.kept import kept_walk
from priorzero.evidence.metrics import (
    REDUCTIONS,
    Judged,
    figures,
    judge,
    reduce,
    reliability,
    uniform_figures,
)
from priorzero.evidence.play import Player, play, play_figures
from priorzero.evidence.scores import Asker, Scored
from priorzero.evidence.search import measure_search
from priorzero.evidence.walk import Walk, walk
from priorzero.games.catalogue import resolve_game
from priorzero.games.env import TextGameEnv
from priorzero.games.families import kinship
from priorzero.games.group import GameEnvGroup
from priorzero.games.judging import judging_only
from priorzero.games.records import GameSpec
from priorzero.llm.engines.base import LLMEngine
from priorzero.llm.engines.choice import create_engine
from priorzero.llm.model import resolve_llm
from priorzero.llm.prompts import ACTION_MARKER
from priorzero.llm.seen import Seen, read_seen
from priorzero.settings.llm import LLMSettings, PromptSettings
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

PLAYED = ("bare", "history")  # prompt variants of play: without and with history
_WALK_VERSION = 1  # of what `walk` gives; raised when it changes
_ENVIRONMENTS = 8  # episodes at once

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        llms: as `llm.model`. games: as `env.env_id`.
        steps: walkthrough commands per game; 0: all.
        variants: prompt variants (`variants.VARIANTS`) that are scored.
        temperatures: of the softmax over a state's commands; 1 is among them.
        prompt: settings the variants are laid over.
        episodes: per player; 0: nothing is played. play_steps: commands per episode.
        play_reductions: how the LLM's players reduce token log-probabilities.
        engine: as `llm.engine`. device: auto, cpu or cuda. seed: of episodes and draws.
        run: experiment whose search is measured on its own game; None: no search.
        checkpoint: of that run: latest, best or a folder's name.
    """

    llms: tuple[str, ...]
    games: tuple[str, ...]
    steps: int
    variants: tuple[str, ...]
    temperatures: tuple[float, ...]
    prompt: PromptSettings
    episodes: int
    play_steps: int
    play_reductions: tuple[str, ...]
    engine: str
    device: str
    seed: int
    run: Path | None = None
    checkpoint: str = "latest"


async def measure(plan: Plan) -> dict[str, Any]:
    """All figures of the report.

    Returns:
        lists of rows: `games` (what was walked), `uniform` and `prior` (ranks and calibration),
        `reliability` (curves), `mass`, `play`, `search`, `seen` (games and relatives an LLM had
        been trained on), `best`, `held_out`.

    Raises:
        PriorZeroError: a game or model cannot be had, nothing can be judged, or an engine fails.
    """
    games = [resolve_game(name) for name in plan.games]
    names = ("games", "uniform", "prior", "reliability", "mass", "play", "search", "seen")
    report = {name: [] for name in names}

    walks = [await asyncio.to_thread(_walk, game, plan) for game in games]
    for walked in walks:
        report["games"].append(_game_row(walked))
        outcomes = [step.outcomes for step in walked.judged]
        report["uniform"].append(_of(walked) | uniform_figures(outcomes))

    report["play"] += await _play_all([Player()], "-", walks, plan)
    for name in plan.llms:
        await _measure_llm(name, walks, plan, report)
    if plan.run is not None:
        report["search"] = await measure_search(plan.run, plan.checkpoint, plan.steps)

    report["best"] = best_settings(report["prior"])
    report["held_out"] = held_out(report["prior"])
    return report


# ---- games ---------------------------------------------------------------------------------------


def _walk(game: GameSpec, plan: Plan) -> Walk:
    """A walk that can be judged by; from the disk where it was walked before."""
    facts = (_WALK_VERSION, plan.steps, plan.prompt.history_length)
    walked, _ = kept_walk("walks", facts, game, lambda: walk(game, *facts[1:]))
    if not walked.judged:
        raise PriorZeroError(
            f"none of the {len(walked.steps)} walked commands of {game.env_id} can be judged (they "
            "are in no list of valid commands, or change nothing); raise --steps or leave the game "
            "out"
        )
    note = " (judging only: nothing is chosen on it)" if judging_only(game) else ""
    logger.info(
        "%s: %d commands walked, %d judged%s",
        game.env_id,
        len(walked.steps),
        len(walked.judged),
        note,
    )
    return walked


def _of(walked: Walk) -> Row:
    game = walked.game
    return {"game": game.env_id, "family": game.kind, "judging_only": judging_only(game)}


def _game_row(walked: Walk) -> Row:
    missing = [step.command for step in walked.steps if not (step.listed or step.idle)]
    return _of(walked) | {
        "title": walked.game.title,
        "walkthrough": len(walked.game.walkthrough),
        "walked": len(walked.steps),
        "decisions": len(walked.judged),
        "missing": len(missing),
        "missing_commands": missing,
        "idle": sum(step.idle for step in walked.steps),
        "respelled": sum(step.command not in step.state.valid_actions for step in walked.judged),
        "fault": walked.fault,
    }


# ---- LLMs ----------------------------------------------------------------------------------------


async def _measure_llm(
    name: str, walks: Sequence[Walk], plan: Plan, report: dict[str, list[Row]]
) -> None:
    """One LLM on all walks, and its play."""
    engine, title, seen = await _start(name, plan)
    report["seen"] += _told(title, seen, walks)
    try:
        askers = {
            variant: Asker(engine, variant, plan.prompt)
            for variant in dict.fromkeys((*plan.variants, *PLAYED))
        }
        for variant in plan.variants:
            everything: list[Scored] = []
            for walked in walks:
                place = {"llm": title} | _of(walked) | {"variant": variant}
                scored = await _score(askers[variant], walked, place)
                everything += scored
                report["prior"] += [place | row for row in _rows(scored, plan.temperatures)]
                outside = sum(one.mass_outside for one in scored) / len(scored)
                report["mass"].append(place | {"mass_outside": outside})

            # The curve is over all games: one game's decisions would be too few.
            curves = _curves(everything, plan.temperatures)
            report["reliability"] += [{"llm": title, "variant": variant} | row for row in curves]

        players = [
            Player(askers[variant], variant, reduction, temperature)
            for variant in PLAYED
            for reduction in plan.play_reductions
            for temperature in (0.0, 1.0)
        ]
        report["play"] += await _play_all(players, title, walks, plan)
    finally:
        await engine.close()


def _told(llm: str, seen: Seen, walks: Sequence[Walk]) -> list[Row]:
    """Games of the report that the LLM had been trained on, or relatives of; logged too."""
    rows = []
    for walked in walks:
        kin = kinship(walked.game)
        warning = seen.warning(kin.game, kin.family)
        if warning:
            rows.append({"llm": llm, "game": walked.game.env_id, "warning": warning})
            logger.warning("%s, %s: %s", llm, walked.game.env_id, warning)
    return rows


async def _start(name: str, plan: Plan) -> tuple[LLMEngine, str, Seen]:
    """The LLM's engine, the LLM's name in the report, and what it was trained on."""
    settings = LLMSettings(model=name, engine=plan.engine, required=True)
    settings.prompt.use_cot = "thought" in plan.variants
    resolved = await asyncio.to_thread(resolve_llm, name)
    engine = await create_engine(
        settings,
        resolved,
        device=resolve_device(plan.device, "--device"),
        marker=ACTION_MARKER,
        seed=plan.seed,
    )
    return engine, resolved.name, read_seen(resolved.path)


async def _score(asker: Asker, walked: Walk, place: Row) -> list[Scored]:
    started = time.perf_counter()
    scored = await asker.walk(walked)
    seconds = time.perf_counter() - started
    names = place["llm"], place["game"], place["variant"]
    logger.info("%s, %s, %s: %d decisions in %.0f s", *names, len(scored), seconds)
    return scored


def _rows(scored: Sequence[Scored], temperatures: Sequence[float]) -> list[Row]:
    """Figures of every reduction and temperature."""
    return [
        {"reduction": reduction, "temperature": t} | figures(_judge_all(scored, reduction, t))
        for reduction in REDUCTIONS
        for t in temperatures
    ]


def _curves(scored: Sequence[Scored], temperatures: Sequence[float]) -> list[Row]:
    """Per reduction the reliability curve, at the temperature with the lowest log loss."""
    rows = _rows(scored, temperatures)
    found = []
    for reduction in REDUCTIONS:
        own = [row for row in rows if row["reduction"] == reduction]
        best = min(own, key=lambda row: row["log_loss"])["temperature"]
        curve = reliability(_judge_all(scored, reduction, best))
        found.append({"reduction": reduction, "temperature": best, "reliability": curve})
    return found


def _judge_all(scored: Sequence[Scored], reduction: str, temperature: float) -> list[Judged]:
    return [
        judge(reduce(one.tokens, one.unconditional, reduction), one.outcomes, temperature)
        for one in scored
    ]


# ---- play ----------------------------------------------------------------------------------------


async def _play_all(
    players: Sequence[Player], llm: str, walks: Sequence[Walk], plan: Plan
) -> list[Row]:
    """Let every player play every game."""
    rows = []
    for walked in walks if plan.episodes else ():
        settings = {"env_id": walked.game.env_id, "split": "eval", "max_steps": plan.play_steps}
        count = min(plan.episodes, _ENVIRONMENTS)
        envs = GameEnvGroup([TextGameEnv(settings) for _ in range(count)])
        try:
            for player in players:
                started = time.perf_counter()
                episodes = await play(player, envs, plan.episodes, plan.seed)
                place = {"llm": llm} | _of(walked) | {"player": player.name}
                rows.append(place | play_figures(episodes))
                logger.info(
                    "%s, %s: %d episodes in %.0f s, return %.2f",
                    walked.game.env_id,
                    player.name,
                    len(episodes),
                    time.perf_counter() - started,
                    rows[-1]["return"],
                )
        finally:
            envs.close()
    return rows
