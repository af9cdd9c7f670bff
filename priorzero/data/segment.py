"""A segment: a stretch of one episode as it was played, with everything both learners need to know
about each step.

Written by `priorzero_collector.py`, held by `game_buffer_priorzero.py`. Segments of one episode are
linked by `successor`, so a window of steps runs on across a segment's end as long as the episode
does. LightZero pads each segment with a copy of the next one's head instead, forgets to pad action
masks, and crashes on games whose valid actions vary (tests/test_stock_defects.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from priorzero.quiet import quiet_base
from priorzero.types import TextState

with quiet_base():
    from lzero.mcts.buffer.game_segment import GameSegment

# How a step left the episode. "hang" counts as truncation: the interpreter was killed, the game did
# not end.
DONE_KINDS = ("running", "terminated", "truncated", "hang")


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One decision and what came of it.

    state: what the LLM was shown. observation: `[E]` float32, the same text's embedding. valid_ids:
    `[A]` action ids in the order of `valid_actions`, the state's commands less any the full
    vocabulary dropped. action_index: position of the chosen one. visit_counts: `[A]` of the search.
    prior_logprobs: `[A]` tuples of token log-probabilities from the LLM or None where it was not
    asked; prior_version: weights that gave them; prior_weight: its share in the root mixture;
    behaviour: `[A]` probabilities the action was drawn from. root_value: of the search;
    predicted_value: of the network before the search. reward: what the action earned. done_kind:
    one of DONE_KINDS. timestep: from 0.
    """

    state: TextState
    observation: np.ndarray
    valid_actions: tuple[str, ...]
    valid_ids: np.ndarray
    action_index: int
    visit_counts: np.ndarray
    behaviour: np.ndarray
    root_value: float
    predicted_value: float
    reward: float
    done_kind: str
    timestep: int
    prior_logprobs: tuple[tuple[float, ...], ...] | None = None
    prior_version: int = 0
    prior_weight: float = 0.0
    reasoning: str = ""

    @property
    def action_id(self) -> int:
        return int(self.valid_ids[self.action_index])

    @property
    def action(self) -> str:
        return self.valid_actions[self.action_index]

    @property
    def visit_distribution(self) -> np.ndarray:
        """`[A]`, sums to one."""
        return self.visit_counts / self.visit_counts.sum()


class PriorZeroSegment(GameSegment):
    """LightZero's `GameSegment` with text, prior and search record of every step.

    The stock lists (observations, actions, rewards, root values, timesteps) are filled as LightZero
    fills them; `steps` holds the full records and `final_observation` the embedding of the state
    after the last one.
    """

    def __init__(self, cfg, env_id: int, episode_id: int, first_observation: np.ndarray) -> None:
        super().__init__(
            cfg.model.action_space_size, game_segment_length=cfg.game_segment_length, config=cfg
        )
        self.env_id = env_id
        self.episode_id = episode_id
        self.steps: list[StepRecord] = []
        self.final_observation = first_observation
        self.successor: PriorZeroSegment | None = None
        self.reset([first_observation])

    def record(self, step: StepRecord, next_observation: np.ndarray) -> None:
        """Append a step; `next_observation` `[E]` is the embedding of the state it led to."""
        self.append(
            step.action_id, next_observation, step.reward, step.valid_ids, -1, step.timestep
        )
        self.child_visit_segment.append(step.visit_distribution)
        self.root_value_segment.append(step.root_value)
        self.steps.append(step)
        self.final_observation = next_observation

    @property
    def done_kind(self) -> str:
        """How the last step left the episode; "running" for an episode that goes on in another
        segment.
        """
        return self.steps[-1].done_kind if self.steps else "running"

    def __len__(self) -> int:
        return len(self.steps)

    def is_full(self) -> bool:
        return len(self.steps) >= self.game_segment_length


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive steps r_0..r_{m-1} of one episode, the state after them, and how the episode
    stands there.

    end: "more" (the episode goes on in the data), "terminated", or "cut" (truncated, or not
    collected any further).
    """

    steps: list[StepRecord]
    final_observation: np.ndarray
    end: str

    def observation(self, index: int) -> np.ndarray:
        """Embedding of state s_index; beyond the end, of the last state."""
        return self.steps[index].observation if index < len(self.steps) else self.final_observation


def window(segment: PriorZeroSegment, position: int, length: int) -> Window:
    """Up to `length` steps from `position` on, across successors."""
    steps: list[StepRecord] = []
    end = position
    while True:
        taken = segment.steps[position : position + length - len(steps)]
        steps += taken
        end = position + len(taken)
        if len(steps) == length or segment.successor is None:
            break
        segment, position = segment.successor, 0
    if end < len(segment.steps):
        return Window(steps, segment.steps[end].observation, "more")
    if segment.done_kind == "terminated":
        return Window(steps, segment.final_observation, "terminated")
    return Window(
        steps, segment.final_observation, "more" if segment.successor is not None else "cut"
    )
