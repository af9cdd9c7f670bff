"""The replay buffer: whole segments in, world-model batches and LLM batches out.

Windows of steps run across segment ends, and priorities and importance weights act, unlike in
LightZero's own buffers (docs/LIGHTZERO.md).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from easydict import EasyDict

from priorzero.data.batch import Revisit, WorldModelBatch, find_revisits, gather_batch
from priorzero.data.columns import Column
from priorzero.data.episodes import whole_episodes
from priorzero.data.returns import n_step_return
from priorzero.data.segment import Segment, StepRecord, window
from priorzero.data.store import StepStore
from priorzero.llm.update.groups import Rate
from priorzero.llm.update.samples import LLMSample, build_sample
from priorzero.quiet import quiet_base
from priorzero.run.randomness import generator_state, set_generator_state
from priorzero.settings.policy import PolicySettings

with quiet_base():
    from ding.utils import BUFFER_REGISTRY

_LOOK_AT = 1024  # transitions that `sample_llm` looks up at once

Method = TypeVar("Method", bound=Callable)


def _one_at_a_time(method: Method) -> Method:
    """A method of the buffer that holds its lock."""

    @functools.wraps(method)
    def locked(self, *args, **kwargs):
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


@BUFFER_REGISTRY.register("game_buffer_priorzero")
class PriorZeroGameBuffer:
    """Segments in order of arrival, sampled by transition.

    Transitions are known by a running number, from the first ever pushed; it is what a batch's
    `indices` hold.

    Thread-safe: collection may push while another thread samples.

    Args:
        settings: replay size, unroll and bootstrap steps, discount, priorities, vocabulary.
        observation_dim: `E`.
        seed: of the sampling.
    """

    config = dict(type="game_buffer_priorzero")

    @classmethod
    def default_config(cls) -> EasyDict:
        """For DI-engine's config compile; the settings that matter are the policy's."""
        return EasyDict(cls.config, cfg_type=cls.__name__ + "Dict")

    def __init__(self, settings: PolicySettings, observation_dim: int, seed: int) -> None:
        self._lock = threading.RLock()
        self._settings = settings
        self._segments: dict[int, Segment] = {}  # by running number, oldest first
        self._next_number = 0
        self._dim = observation_dim
        self._clear(first=0)
        # Segments whose episode goes on, and their last transitions.
        self._last_of_episode: dict[int, tuple[Segment, int]] = {}
        self._rng = np.random.default_rng(seed)
        self._max_priority = 1.0

    def _clear(self, first: int) -> None:
        """Empty columns, in which transitions count from `first` on."""
        self._store = StepStore(self._dim, self._settings.burn_in, first)
        self._priorities = Column(np.float64, first=first)
        self._powered = Column(np.float64, first=first)  # the priorities ** priority_prob_alpha

    @_one_at_a_time
    def push_game_segments(self, segments: Sequence[Segment]) -> None:
        """Add finished segments, oldest first, and link each to the part of its episode that came
        before.
        """
        for segment in segments:
            assert len(segment) > 0, "a collector pushes what it played or nothing"
            self._append(segment, self._next_number, np.full(len(segment), self._max_priority))
            self._next_number += 1

    def _append(self, segment: Segment, number: int, priorities: np.ndarray) -> None:
        assert len(priorities) == len(segment)
        self._store.append(segment, number, self._link(segment))
        self._segments[number] = segment
        self._priorities.append(priorities)
        self._powered.append(priorities**self._settings.priority_prob_alpha)
        if segment.done_kind == "running":
            self._last_of_episode[segment.episode_id] = segment, self._store.end - 1

    def _link(self, segment: Segment) -> int | None:
        """The last transition of the part of the episode that came right before, if it is held."""
        previous, last = self._last_of_episode.pop(segment.episode_id, (None, None))
        # After a resume the part between may be missing.
        if previous is None or previous.steps[-1].timestep + 1 != segment.steps[0].timestep:
            return None
        previous.successor = segment
        return last

    @_one_at_a_time
    def remove_oldest_data_to_fit(self) -> int:
        """Drop the oldest segments until at most replay_buffer_size transitions remain; returns how
        many were dropped.
        """
        before = len(self._store)
        left = before
        while left > self._settings.replay_buffer_size and len(self._segments) > 1:
            gone = self._segments.pop(next(iter(self._segments)))
            left -= len(gone)
            if self._last_of_episode.get(gone.episode_id, (None,))[0] is gone:
                del self._last_of_episode[gone.episode_id]

        first = self._store.end - left
        for part in (self._store, self._priorities, self._powered):
            part.drop(first)
        return before - left

    @_one_at_a_time
    def numbered_segments(self) -> Iterator[tuple[int, Segment]]:
        """What is held, oldest first, with running numbers from the first segment ever pushed."""
        return iter(list(self._segments.items()))

    @_one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """Running numbers, priorities and generator, as plain values and arrays. The segments are
        immutable and go to an archive (`priorzero/data/archive.py`).
        """
        return {
            "numbers": np.array(list(self._segments), dtype=np.int64),
            "lengths": np.array([len(s) for s in self._segments.values()], dtype=np.int64),
            "next_number": self._next_number,
            "dropped": self._store.first,
            "priorities": self._priorities.held().copy(),
            "max_priority": self._max_priority,
            "rng": generator_state(self._rng),
        }

    @_one_at_a_time
    def load_state_dict(self, state: Mapping[str, Any], segments: Mapping[int, Segment]) -> int:
        """Go on from a saved state; this buffer is still empty.

        Args:
            state: of `state_dict`.
            segments: by running number; those that are missing are left out.

        Returns:
            transitions that are missing.
        """
        assert not self._segments, "a state is loaded into a new buffer"
        numbers, lengths = np.asarray(state["numbers"]), np.asarray(state["lengths"])
        priorities = np.split(np.asarray(state["priorities"]), np.cumsum(lengths)[:-1])
        found = np.array([number in segments for number in numbers.tolist()], dtype=bool)
        missing = int(lengths[~found].sum())

        self._next_number = state["next_number"]
        # What is missing counts as dropped, so that the running numbers to come stay the same.
        self._clear(first=state["dropped"] + missing)
        self._max_priority = state["max_priority"]
        set_generator_state(self._rng, state["rng"])
        for i in np.flatnonzero(found):
            segment = segments[int(numbers[i])]
            assert len(segment) == lengths[i]
            self._append(segment, int(numbers[i]), priorities[i])
        return missing

    @_one_at_a_time
    def get_num_of_game_segments(self) -> int:
        return len(self._segments)

    @_one_at_a_time
    def get_num_of_transitions(self) -> int:
        return len(self._store)

    def _locate(self, indices: np.ndarray) -> list[tuple[Segment, int]]:
        """Running numbers of transitions -> (segment, position)."""
        numbers, positions = self._store.places(indices)
        return [
            (self._segments[number], position)
            for number, position in zip(numbers.tolist(), positions.tolist(), strict=True)
        ]

    @_one_at_a_time
    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Transitions to train on: running numbers `[count]` and importance weights `[count]`.

        With priorities (prioritised replay, arXiv:1511.05952):

        P(i) = p_i^alpha / sum_j p_j^alpha; w_i = (N P(i))^-beta / max_j w_j over the batch.
        """
        first, total = self._store.first, len(self._store)
        assert total > 0, "nothing was pushed yet"
        if not self._settings.use_priority:
            ones = np.ones(count, dtype=np.float32)
            return first + self._rng.integers(total, size=count), ones

        # The same draws as `Generator.choice`, which checks all N probabilities each time.
        powered = self._powered.held()
        probability = powered / powered.sum()
        cumulative = probability.cumsum()
        chosen = (cumulative / cumulative[-1]).searchsorted(self._rng.random(count), side="right")
        weights = (total * probability[chosen]) ** -self._settings.priority_prob_beta
        return first + chosen, (weights / weights.max()).astype(np.float32)

    @_one_at_a_time
    def sample(self, batch_size: int) -> WorldModelBatch:
        """A batch of `draw`n transitions."""
        return self.batch_of(*self.draw(batch_size))

    @_one_at_a_time
    def batch_of(self, indices: np.ndarray, weights: np.ndarray) -> WorldModelBatch:
        """The batch whose rows begin at these transitions; see `gather_batch` for the targets.

        Args:
            indices: `[B]` running numbers of transitions that are still held.
            weights: `[B]` float32 importance weights.
        """
        s = self._settings
        windows = self._store.windows(np.asarray(indices), s.num_unroll_steps + s.td_steps)
        batch = gather_batch(
            self._store,
            windows,
            weights,
            self._store.draw_valid(windows.last, self._rng),
            unroll=s.num_unroll_steps,
            burn_in=s.burn_in,
            td_steps=s.td_steps,
            discount=s.discount_factor,
            vocabulary=s.action_vocabulary.capacity,
        )
        return replace(batch, revisits=self._revisits(batch)) if s.reanalyse_ratio else batch

    def _revisits(self, batch: WorldModelBatch) -> list[Revisit]:
        """Of a share of the rows, drawn anew for each batch."""
        s = self._settings
        count = max(1, round(s.reanalyse_ratio * len(batch)))
        rows = self._rng.choice(len(batch), size=count, replace=False)

        length, reach = s.num_unroll_steps + s.td_steps, max(s.burn_in, s.context_steps - 1)
        places = self._locate(batch.indices[rows])
        return find_revisits(
            {
                int(row): window(segment, position, length, reach)
                for row, (segment, position) in zip(rows, places, strict=True)
            },
            s.num_unroll_steps,
            s.td_steps,
            s.discount_factor,
            s.context_steps,
            with_values=s.value_bootstrap == "search",
        )

    @_one_at_a_time
    def update_priority(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        """Take over new priorities; transitions dropped meanwhile are skipped.

        Args:
            indices: `[B]` of the batch that was trained on.
            priorities: `[B]`, their absolute values count.
        """
        assert indices.shape == priorities.shape == (len(indices),)
        alive = indices >= self._store.first
        # The small constant keeps a perfectly predicted transition reachable.
        values = np.abs(priorities[alive]) + 1e-6
        self._priorities[indices[alive]] = values
        self._powered[indices[alive]] = (
            self._priorities[indices[alive]] ** self._settings.priority_prob_alpha
        )
        if len(values):
            self._max_priority = max(self._max_priority, float(values.max()))

    @_one_at_a_time
    def sample_llm(self, count: int, recent: int | None = None) -> list[LLMSample]:
        """Draw decisions for the LLM, without repetition.

        Decisions with fewer than two valid actions, without an LLM's request, or without a search
        (where they were taken, or where their return bootstraps from) teach it nothing and are left
        out, so fewer than `count` may come back.

        Args:
            count: how many.
            recent: draw from the newest so many transitions; None: from all.
        """
        total = len(self._store)
        low = max(total - recent, 0) if recent else 0
        order = self._store.first + low + self._rng.permutation(total - low)
        samples: list[LLMSample] = []
        # Few of a large buffer's transitions are looked at: `count`, and what teaches nothing.
        for start in range(0, len(order), _LOOK_AT):
            for segment, position in self._locate(order[start : start + _LOOK_AT]):
                if len(samples) == count:
                    return samples
                step = segment.steps[position]
                if len(step.valid_actions) < 2 or not step.searched:
                    continue
                target = self._value_target(segment, position)
                sample = build_sample(step, target) if np.isfinite(target) else None
                if sample is not None:
                    samples.append(sample)
        return samples

    @_one_at_a_time
    def newest_scored(self, count: int) -> list[StepRecord]:
        """The newest decisions that a search took and the LLM answered for, newest first; those
        with fewer than two valid actions are left out.

        Args:
            count: at most.
        """
        found: list[StepRecord] = []
        for segment in reversed(self._segments.values()):
            for step in reversed(segment.steps):
                if len(found) == count:
                    return found
                if step.searched and step.scores is not None and len(step.valid_actions) > 1:
                    found.append(step)
        return found

    @_one_at_a_time
    def sample_episodes(self, count: int, recent: int, rate: Rate) -> list[LLMSample]:
        """Draw decisions of whole episodes for the LLM, without repetition; those with fewer than
        two valid actions, or without an LLM's request, are left out.

        Args:
            count: how many.
            recent: of the newest so many transitions, in which the episodes must lie.
            rate: the episodes -> decisions that may be drawn, each with how it turned out
                (`GroupDraw`).
        """
        newest: list[Segment] = []
        room = recent
        for segment in reversed(self._segments.values()):
            room -= len(segment)
            if room < 0:
                break
            newest.append(segment)
        rated = rate(whole_episodes(reversed(newest)))

        samples: list[LLMSample] = []
        for i in self._rng.permutation(len(rated)):
            if len(samples) == count:
                break
            step, outcome = rated[i]
            if len(step.valid_actions) < 2:
                continue
            sample = build_sample(step, *outcome)
            if sample is not None:
                samples.append(sample)
        return samples

    def _value_target(self, segment: Segment, position: int) -> float:
        """n-step return of a step, bootstrapped with the search's own values."""
        s = self._settings
        view = window(segment, position, s.td_steps + 1)
        # Only states that were searched have a root value; the one after the last step was not.
        last = len(view.steps) - 1
        target = n_step_return(view, 0, s.td_steps, s.discount_factor, last_valued=last)
        if target.discount == 0.0:
            return target.reward_sum
        return target.reward_sum + target.discount * view.steps[target.state].root_value
