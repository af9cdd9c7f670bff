"""What the benchmarks share: their last line, and states of a real game to work on."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.types import HistoryItem, TextState

ROOT = Path(__file__).resolve().parents[1]
"""The repository's root: benchmarks run there."""


def quiet_logging() -> None:
    """Warnings only, on stderr: stdout belongs to the benchmark."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")


def say(text: str) -> None:
    """A line for the reader, at once."""
    print(text, flush=True)


def finish(result: Mapping[str, Any]) -> None:
    """The last line: everything measured, as one line of JSON."""
    say(json.dumps(rounded(result), ensure_ascii=False))


def rounded(value: Any) -> Any:
    """Floats with five significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return value


def synchronize() -> None:
    """Wait for the GPU where there is one: its work is started, not done, when a call returns."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class PlayedStep:
    """One step of random play. `state` is what was seen, `next_text` what the action led to."""

    state: TextState
    action: str
    reward: float
    done_kind: str
    next_text: str
    episode: int
    timestep: int


def random_play(
    env_id: str, steps: int, seed: int = 0, history_length: int = 20, max_steps: int = 50
) -> list[PlayedStep]:
    """Play `steps` steps with uniformly drawn valid actions, over as many episodes as that takes.

    Raises:
        PriorZeroError: the game is not there or does not start.
    """
    from priorzero.games.env import TextGameEnv

    rng = random.Random(seed)
    env = TextGameEnv({"env_id": env_id, "seed": seed, "max_steps": max_steps})
    played: list[PlayedStep] = []
    try:
        episode = -1
        while len(played) < steps:
            episode += 1
            seen, history = env.reset(), []
            for timestep in range(min(max_steps, steps - len(played))):
                state = TextState(
                    seen["text"],
                    tuple(seen["valid_actions"]),
                    tuple(history[-history_length:]),
                    env.game.goal,
                    float(seen["score"]),
                )
                action = rng.choice(state.valid_actions)
                outcome = env.step(action)
                played.append(
                    PlayedStep(
                        state,
                        action,
                        float(outcome.reward),
                        outcome.info["done_kind"],
                        outcome.obs["text"],
                        episode,
                        timestep,
                    )
                )
                history.append(HistoryItem(seen["text"], action, float(outcome.reward)))
                seen = outcome.obs
                if outcome.done:
                    break
    finally:
        env.close()
    return played
