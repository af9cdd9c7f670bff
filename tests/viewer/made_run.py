"""A run's folder with made-up numbers, written by the run's own writers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from priorzero.decisions.record import Moment
from priorzero.decisions.recorder import Recorder
from priorzero.search.root_prior import RootPrior, log_softmax
from priorzero.search.roots import SearchOutput, TreeNodes
from priorzero.settings.decisions import DecisionSettings
from priorzero.types import ActionScores, TextState, TokenisedRequest
from priorzero_config import HybridTrainingConfig

COMMANDS = ("east", "open <trap> & door", "take lamp", "west")
CHOSEN = (1, 2, 0, 3, 2)  # by step, then from the start
LONG = "You stand in an open field west of a white house with a boarded front door. " * 4


def reward_of(step: int) -> float:
    """Every fourth step earns 2."""
    return 2.0 if step % 4 == 3 else 0.0


def chosen_at(step: int) -> int:
    """Position of the command that is played."""
    return CHOSEN[step % len(CHOSEN)]


def plan_of(rng: np.random.Generator, step: int) -> SearchOutput:
    """A search that took the commands of the next three steps one below the other, and another."""
    n = len(COMMANDS)
    wm, llm = (log_softmax(rng.normal(size=n)) for _ in range(2))
    mixed = log_softmax(wm + llm)
    actions = [chosen_at(step), chosen_at(step + 1), chosen_at(step + 2), (chosen_at(step) + 1) % n]
    tree = TreeNodes(
        parent=np.array([-1, 0, 1, 2, 0]),
        action=np.array([-1, *actions]),
        visits=np.array([4.0, 3.0, 2.0, 1.0, 1.0]),
        q=rng.normal(size=5),
        prior=np.full(5, 0.25),
        reward=np.array([0.0, 0.125, 0.375, 0.625, 0.875]),
        value=rng.normal(size=5),
    )
    visits = np.bincount(actions[:1] * 3 + actions[3:], minlength=n).astype(float)
    return SearchOutput(
        action_index=chosen_at(step),
        visit_counts=visits,
        target_policy=visits / visits.sum(),
        behaviour=np.eye(n)[chosen_at(step)],
        root_value=float(rng.normal()),
        predicted_value=float(rng.normal()),
        prior=RootPrior(mixed, wm, llm, 0.5),
        tree=tree,
    )


def make_run(
    folder: Path,
    *,
    episodes: int = 6,
    length: int = 10,
    llm: bool = True,
    games: Sequence[str] = ("made <up>",),
) -> Path:
    """A finished run; half its episodes are of an evaluation, `llm` with the LLM and without. Of
    two games training plays the first, evaluation the second.
    """
    rng = np.random.default_rng(0)
    recorder = Recorder(
        folder / "decisions",
        DecisionSettings(collect_share=1.0),
        reduction="sum",
        decode=lambda ids: f"What the LLM reads at {ids[0]}. {LONG}",
    )
    for episode in range(episodes):
        if episode % 2:
            facts = dict(game=games[1 % len(games)], seed=1001, env_steps=400)
            mode = "world_model_llm"
            tape = recorder.evaluation("iter000010", mode, episode // 2, **facts)
        else:
            tape = recorder.collection(episode // 2, game=games[0], seed=1000)
        score = 0.0
        for step in range(length):
            done = step == length - 1
            info = {
                "done_kind": "terminated" if done else "running",
                "score": score + reward_of(step),
                "eval_episode_return": score + reward_of(step),
            }
            last = {"text": f"The end of {episode}."}
            outcome = SimpleNamespace(info=info, reward=reward_of(step), done=done, obs=last)
            moment = Moment(
                TextState(f"Episode {episode}, step {step}. {LONG}", COMMANDS, score=score),
                COMMANDS,
                COMMANDS[chosen_at(step)],
                outcome,
                TokenisedRequest((), (step,), ((1,),) * 4) if llm else None,
                ActionScores(((-1.0,), (-2.0,), (-3.0,), (-4.0,)), 3) if llm else None,
                plan_of(rng, step),
            )
            tape.write(step, moment, np.arange(4), COMMANDS.__getitem__, env_steps=10 * episode)
            score += reward_of(step)
    recorder.close()

    config = HybridTrainingConfig(env_id="tw-simple", enable_llm=llm).as_dict()
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        row
        for step in range(0, 400, 40)
        for row in (
            {"namespace": "wm", "step": step, "wm_loss": 5 - step / 100, "value_loss": 1.0},
            {"namespace": "perf", "step": step, "seconds_iteration": 2.5},
            {"namespace": "eval", "step": step, "world_model_llm/return_mean": step / 40},
        )
    ]
    (folder / "log").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log" / "metrics.jsonl").write_text(lines)
    return folder
