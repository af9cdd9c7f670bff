"""What collector and evaluator share about an environment being played: its state as text, its
history, its vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.search.context import EpisodeContext
from priorzero.search.roots import Root
from priorzero.types import HistoryItem, TextState


@dataclass(frozen=True, eq=False)
class Decision:
    """A state where an action is due: text for the LLM, vector and ids for the search.

    valid_actions: what the search may choose from, `A` of them, with `valid_ids` in the same order;
    equal to `state.valid_actions` unless the vocabulary is full.
    """

    state: TextState
    observation: np.ndarray
    valid_actions: tuple[str, ...]
    valid_ids: np.ndarray


@dataclass(frozen=True)
class HistoryWindow:
    """Past steps kept in `TextState.history`: at most `length`, and the oldest `drop` leave
    together when there are more.

    Between two drops prompts only grow, so an engine computes what is new; with drop 1 a full
    window moves every step.
    """

    length: int = 5
    drop: int = 1


class Seat:
    """One environment's running episode.

    Args:
        goal: line of the game's goal for the prompts.
        history: past steps kept in `TextState.history`.
    """

    def __init__(self, goal: str, history: HistoryWindow, context_steps: int) -> None:
        self._goal = goal
        self._context_steps = context_steps
        self._window = history
        self.start({"text": "", "valid_actions": (), "score": 0.0})

    def start(self, observation: dict) -> None:
        """A new episode begins with this observation of the environment."""
        self._history: list[HistoryItem] = []
        self.observation = observation
        self.context = EpisodeContext(self._context_steps)
        self.timestep = 0
        self.episode_return = 0.0

    def advance(self, action: str, reward: float, observation: dict) -> None:
        """The action was played and earned `reward`."""
        self._history.append(HistoryItem(self.observation["text"], action, reward))
        if len(self._history) > self._window.length:
            del self._history[: self._window.drop]
        self.observation = observation
        self.timestep += 1
        self.episode_return += reward

    @property
    def state(self) -> TextState:
        return TextState(
            self.observation["text"],
            tuple(self.observation["valid_actions"]),
            tuple(self._history),
            self._goal,
            float(self.observation["score"]),
        )


def decisions(
    seats: Sequence[Seat],
    encode: Callable[[Sequence[str]], np.ndarray],
    register: Callable[[Sequence[str]], list[int | None]],
) -> list[Decision]:
    """Vectors and ids for several seats; all texts go through the encoder in one call."""
    states = [seat.state for seat in seats]
    vectors = encode([s.observation for s in states])
    result = []
    for state, vector in zip(states, vectors, strict=True):
        known = [
            (a, i)
            for a, i in zip(state.valid_actions, register(state.valid_actions), strict=True)
            if i is not None
        ]
        result.append(
            Decision(state, vector, tuple(a for a, _ in known), np.asarray([i for _, i in known]))
        )
    return result


def roots_of(
    seats: Sequence[Seat], due: Sequence[Decision], llm_logprobs: Sequence[np.ndarray | None]
) -> list[Root]:
    """What the search plans from; each decision's vector enters its episode's context."""
    roots = []
    for seat, decision, logprobs in zip(seats, due, llm_logprobs, strict=True):
        seat.context.observe(decision.observation)
        context = seat.context
        roots.append(Root(context.observations, context.actions, decision.valid_ids, logprobs))
    return roots
