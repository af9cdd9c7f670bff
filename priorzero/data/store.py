"""What batches are made of, of every step that is held, as arrays: a batch is gathered from them by
index arithmetic, without a loop over its rows.

`game_buffer_priorzero.py` fills it segment by segment and keeps the segments themselves beside it,
for the LLM's decisions, for reanalysis and for the archive. Steps are known by a running number,
from the first ever pushed.

Letters: `B` rows, `L` steps of a window, `c` steps of burn-in, `E` embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from priorzero.data.columns import Column, VectorTable
from priorzero.data.segment import Segment, StepRecord


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of up to `L` consecutive steps r_0..r_{m-1} of an episode, and the context before.

    Attributes:
        steps: `[B, L]` running numbers; after the last known step that one is repeated.
        known: `[B]` m, 1..L.
        over: `[B]` bool, whether the episode truly ended with r_{m-1}.
        context: `[B]` 0..c, steps of context there are.
        states: `[B, c+L+1]` rows of the vector table: from column c on s_0..s_m, the last one
            repeated; before it the context, right-aligned.
        actions: `[B, c+L]` ids taken in them; meaningless after step m - 1.
    """

    steps: np.ndarray
    known: np.ndarray
    over: np.ndarray
    context: np.ndarray
    states: np.ndarray
    actions: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """`[B]` running number of each window's last known step."""
        return self.steps[:, -1]


class StepStore:
    """The steps that are held, oldest first, as columns.

    Args:
        dim: `E`.
        burn_in: `c`, steps of context that are kept with each step.
        first: running number of the first step to come.
    """

    def __init__(self, dim: int, burn_in: int, first: int = 0) -> None:
        self._burn_in = burn_in
        self._vectors = VectorTable(dim)

        def column(dtype: type, *shape: int) -> Column:
            return Column(dtype, shape, first)

        self._state = column(np.int32)  # its observation, in the table
        self._after = column(np.int32)  # the observation it led to
        self._action = column(np.int32)
        self._reward = column(np.float64)
        self._root_value = column(np.float32)
        self._over = column(np.bool_)  # the game truly ended with it
        self._next = column(np.int64)  # the step after it; itself where none is known
        self._segment = column(np.int64)  # running number of its segment
        self._position = column(np.int32)  # in its segment

        # Valid ids and target policies are of different lengths: they have numbers of their own.
        self._valid_start, self._valid_count = column(np.int64), column(np.int32)
        self._valid_id, self._target = Column(np.int32), Column(np.float32)

        # The c steps before each step, right-aligned; fewer at an episode's beginning.
        self._context = column(np.int32)
        self._context_state = column(np.int32, burn_in)
        self._context_action = column(np.int32, burn_in)

    def __len__(self) -> int:
        """Steps that are held."""
        return self.end - self.first

    @property
    def first(self) -> int:
        """Running number of the oldest step."""
        return self._state.first

    @property
    def end(self) -> int:
        """Running number of the next step."""
        return self._state.end

    def append(self, segment: Segment, number: int, joins: int | None) -> None:
        """Add a segment's steps.

        Args:
            number: running number of the segment.
            joins: the step of the same episode, still held, that its first one follows.
        """
        steps, start = segment.steps, self.end
        states = self._vectors.add(s.observation for s in steps)
        final = self._vectors.add([segment.final_observation])
        actions = np.array([s.action_id for s in steps], dtype=np.int32)

        self._state.append(states)
        self._after.append(np.concatenate([states[1:], final]))
        self._action.append(actions)
        self._reward.append(np.array([s.reward for s in steps]))
        self._root_value.append(np.array([s.root_value for s in steps]))
        self._over.append(np.array([s.done_kind == "terminated" for s in steps]))
        self._segment.append(np.full(len(steps), number))
        self._position.append(np.arange(len(steps)))

        following = np.arange(start + 1, start + len(steps) + 1)
        following[-1] -= 1
        self._next.append(following)
        if joins is not None:
            self._next[joins] = start

        self._append_valid(steps)
        self._append_context(segment.before, states, actions)

    def _append_valid(self, steps: list[StepRecord]) -> None:
        counts = np.array([len(s.valid_ids) for s in steps])
        self._valid_count.append(counts)
        self._valid_start.append(self._valid_id.end + np.cumsum(counts) - counts)
        self._valid_id.append(np.concatenate([s.valid_ids for s in steps]))
        self._target.append(np.concatenate([s.target_policy for s in steps]))

    def _append_context(
        self, before: tuple[StepRecord, ...], states: np.ndarray, actions: np.ndarray
    ) -> None:
        kept = before[max(len(before) - self._burn_in, 0) :]
        padding = np.zeros(self._burn_in - len(kept), dtype=np.int32)
        old_states = self._vectors.add(s.observation for s in kept)
        old_actions = np.array([s.action_id for s in kept], dtype=np.int32)

        def behind(old: np.ndarray, own: np.ndarray) -> np.ndarray:
            """`[n, c]`, what stands before each of the segment's own steps."""
            line = np.concatenate([padding, old, own])
            return np.stack([line[i : i + self._burn_in] for i in range(len(own))])

        positions = np.arange(len(states))
        self._context.append(np.minimum(len(kept) + positions, self._burn_in))
        self._context_state.append(behind(old_states, states))
        self._context_action.append(behind(old_actions, actions))

    def drop(self, until: int) -> None:
        """Forget all steps before this running number, where a segment begins."""
        gone = np.arange(self._state.first, until)
        if not len(gone):
            return

        # What their segments name in the table: each step's observation, what the last one led to,
        # and the context of the first one.
        begins = self._position[gone] == 0
        ends = np.append(begins[1:], True)
        own = np.arange(self._burn_in) >= self._burn_in - self._context[gone[begins]][:, None]
        released = [self._state[gone], self._after[gone[ends]]]
        released.append(self._context_state[gone[begins]][own])
        self._vectors.release(np.concatenate(released))

        kept = until < self.end
        valid = int(self._valid_start[until]) if kept else self._valid_id.end
        for ragged in (self._valid_id, self._target):
            ragged.drop(valid)
        for column in self._per_step():
            column.drop(until)

    def _per_step(self) -> list[Column]:
        return [
            self._state,
            self._after,
            self._action,
            self._reward,
            self._root_value,
            self._over,
            self._next,
            self._segment,
            self._position,
            self._valid_start,
            self._valid_count,
            self._context,
            self._context_state,
            self._context_action,
        ]

    # ---- reading: numbers are running numbers of steps that are held -----------------------------

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Running numbers of the steps' segments, and their positions in them, `[n]` each."""
        return self._segment[numbers], self._position[numbers]

    def windows(self, numbers: np.ndarray, length: int) -> Windows:
        """The windows of `length` steps that begin with these steps `[B]`."""
        steps = np.empty((len(numbers), length), dtype=np.int64)
        steps[:, 0] = numbers
        for k in range(1, length):
            steps[:, k] = self._next[steps[:, k - 1]]
        known = 1 + (steps[:, 1:] != steps[:, :-1]).sum(axis=1)

        # Beyond the last known step stands the state that it led to.
        last = steps[:, -1]
        final = self._after[last][:, None]
        inside = np.arange(length) < known[:, None]
        own = np.where(inside, self._state[steps], final)
        return Windows(
            steps=steps,
            known=known,
            over=self._over[last],
            context=self._context[numbers].astype(np.int64),
            states=np.concatenate([self._context_state[numbers], own, final], axis=1),
            actions=np.concatenate([self._context_action[numbers], self._action[steps]], axis=1),
        )

    def observations(self, states: np.ndarray) -> np.ndarray:
        """Vectors of rows of the table: `[...]` -> `[..., E]` float32."""
        return self._vectors[states]

    def rewards(self, numbers: np.ndarray) -> np.ndarray:
        """What the steps earned, float64, in the shape of `numbers`."""
        return self._reward[numbers]

    def root_values(self, numbers: np.ndarray) -> np.ndarray:
        """The search's own values, float32, in the shape of `numbers`."""
        return self._root_value[numbers]

    def targets(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Target policies of steps `[n]`, one after the other.

        Returns:
            which of the steps, valid id and target probability, `[sum of A]` each.
        """
        counts = self._valid_count[numbers]
        which = np.repeat(np.arange(len(numbers)), counts)
        begins = self._valid_start[numbers] - (np.cumsum(counts) - counts)
        at = np.arange(len(which)) + begins[which]
        return which, self._valid_id[at], self._target[at]

    def draw_valid(self, numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A valid id of each of these steps `[n]`, drawn uniformly."""
        return self._valid_id[self._valid_start[numbers] + rng.integers(self._valid_count[numbers])]
