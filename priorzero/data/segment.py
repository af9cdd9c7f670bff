"""A segment: a stretch of one episode as it was played, with everything both trainers need to know
about each step.

Written by `priorzero_collector.py`, held by `game_buffer_priorzero.py`. Segments of one episode are
linked by `successor`, so a window of steps runs on across a segment's end as long as the episode
does. Backwards a segment itself keeps the few steps that its first root looked back on: a link
would keep a whole episode alive in the buffer, or break when its beginning is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.types import ActionScores, TextState, TokenisedRequest

# How a step left the episode. "hang" counts as truncation: the interpreter was killed, the game did
# not end.
DONE_KINDS = ("running", "terminated", "truncated", "hang")


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One decision and what came of it.

    Attributes:
        state: what the LLM was shown.
        observation: `[E]` float32, the same text's embedding.
        valid_actions: `A` commands the search could choose from: the state's, less any the full
            vocabulary dropped.
        valid_ids: `[A]` their ids, in the same order.
        action_index: position of the chosen one.
        visit_counts: `[A]` of the search; all 0 where the LLM played alone.
        behaviour: `[A]` probabilities the action was drawn from.
        target_policy: `[A]` what the world model's policy is trained on, from the search, sums to
            one; `behaviour` where there was none.
        root_value: of the search; nan where there was none.
        predicted_value: of the network before the search; nan where there was none.
        reward: what the action earned.
        done_kind: one of DONE_KINDS.
        timestep: from 0.
        request: the prompt and the actions as token ids, None where no LLM is used.
        scores: what the LLM answered, None where it was not asked or failed.
        prior_weight: the LLM's share in the root's mixture; 1 where it played alone.
        llm_target: `[A]` what the LLM is trained on, where that is not `target_policy`; else None.
    """

    state: TextState
    observation: np.ndarray
    valid_actions: tuple[str, ...]
    valid_ids: np.ndarray
    action_index: int
    visit_counts: np.ndarray
    behaviour: np.ndarray
    target_policy: np.ndarray
    root_value: float
    predicted_value: float
    reward: float
    done_kind: str
    timestep: int
    request: TokenisedRequest | None = None
    scores: ActionScores | None = None
    prior_weight: float = 0.0
    llm_target: np.ndarray | None = None

    def __post_init__(self) -> None:
        actions = len(self.valid_actions)
        assert actions >= 1 and 0 <= self.action_index < actions
        for array in (self.valid_ids, self.visit_counts, self.behaviour, self.target_policy):
            assert array.shape == (actions,)
        assert self.llm_target is None or self.llm_target.shape == (actions,)
        assert self.done_kind in DONE_KINDS

    @property
    def action_id(self) -> int:
        return int(self.valid_ids[self.action_index])

    @property
    def action(self) -> str:
        return self.valid_actions[self.action_index]

    @property
    def searched(self) -> bool:
        """Whether a search chose the action; else the LLM played alone."""
        return bool(self.visit_counts.any())


class Segment:
    """Consecutive steps of one episode.

    Args:
        env_id: where it was played.
        episode_id: the same for all segments of an episode, and for no other.
        length: steps it holds when it is full.
        before: the episode's steps right before the first one here, oldest first: as many as a root
            looks back on, or as the episode has.
        game: plain name of the game where the run plays several; else empty.

    Attributes:
        env_id, episode_id, length, game: as given.
        steps: the full records.
        final_observation: `[E]` embedding of the state after the last step; None without steps.
        successor: the next segment of the episode, once the buffer holds it.
    """

    def __init__(
        self,
        env_id: int,
        episode_id: int,
        length: int,
        before: Sequence[StepRecord] = (),
        game: str = "",
    ) -> None:
        self.env_id = env_id
        self.game = game
        self.episode_id = episode_id
        self.before = tuple(before)
        self.steps: list[StepRecord] = []
        self.final_observation: np.ndarray | None = None
        self.successor: Segment | None = None
        self.length = length

    def record(self, step: StepRecord, next_observation: np.ndarray) -> None:
        """Append a step; `next_observation` `[E]` is the embedding of the state it led to."""
        assert not self.is_full()
        assert self.done_kind == "running", "the episode has ended"
        assert next_observation.shape == step.observation.shape
        self.steps.append(step)
        self.final_observation = next_observation

    @property
    def done_kind(self) -> str:
        """How the last step left the episode; "running" where it goes on in another segment."""
        return self.steps[-1].done_kind if self.steps else "running"

    def history(self, position: int, reach: int) -> list[StepRecord]:
        """The steps before `position`, oldest first: at most `reach`, fewer at the episode's start.

        Args:
            position: 0..len(self); the latter for what a next segment has before it.
        """
        assert 0 <= position <= len(self.steps) and reach >= 0
        own = self.steps[max(position - reach, 0) : position]
        missing = reach - len(own)
        return [*self.before[max(len(self.before) - missing, 0) :], *own]

    def __len__(self) -> int:
        return len(self.steps)

    def is_full(self) -> bool:
        return len(self.steps) >= self.length


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive steps r_0..r_{m-1} of one episode, m >= 1, and how the episode goes on.

    Attributes:
        steps: `m` records.
        final_observation: `[E]` embedding of s_m, the state after them.
        end: "more" (s_m was played in the data too), "terminated", or "cut" (truncated, or not
            collected any further).
        before: the steps right before r_0, oldest first.
    """

    steps: list[StepRecord]
    final_observation: np.ndarray
    end: str
    before: list[StepRecord]

    def observation(self, index: int) -> np.ndarray:
        """Embedding `[E]` of state s_index; beyond the end, of the last state."""
        return self.steps[index].observation if index < len(self.steps) else self.final_observation

    def history(self, index: int, reach: int) -> list[StepRecord]:
        """At most `reach` steps before state s_index, oldest first."""
        assert 0 <= index <= len(self.steps) and reach >= 0
        known = [*self.before, *self.steps[:index]]
        return known[max(len(known) - reach, 0) :]


def window(segment: Segment, position: int, length: int, reach: int = 0) -> Window:
    """Up to `length` steps from `position` on, across successors, and up to `reach` before them."""
    assert 0 <= position < len(segment) and length >= 1
    before = segment.history(position, reach)
    steps: list[StepRecord] = []

    while True:
        taken = segment.steps[position : position + length - len(steps)]
        steps += taken
        end = position + len(taken)
        if len(steps) == length or segment.successor is None:
            break
        segment, position = segment.successor, 0

    if end < len(segment.steps):
        return Window(steps, segment.steps[end].observation, "more", before)
    if segment.done_kind == "terminated":
        return Window(steps, segment.final_observation, "terminated", before)
    goes_on = segment.successor is not None
    return Window(steps, segment.final_observation, "more" if goes_on else "cut", before)
