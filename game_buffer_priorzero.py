"""The replay buffer: whole segments in, world-model batches and LLM batches out.

Replaces LightZero 0.2.0's buffers, whose windows break at segment ends, whose bootstrap values are
one step off and whose priorities and importance weights have no effect (tests/test_stock_defects.py
shows each on the stock classes).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np
from easydict import EasyDict

from priorzero.data.batch import LLMSample, WorldModelBatch, fill_row
from priorzero.data.segment import PriorZeroSegment, window
from priorzero.quiet import quiet_base
from priorzero.types import PriorZeroError

with quiet_base():
    from ding.utils import BUFFER_REGISTRY

logger = logging.getLogger(__name__)


@BUFFER_REGISTRY.register("game_buffer_priorzero")
class PriorZeroGameBuffer:
    """Segments in order of arrival, sampled by transition.

    Args:
        cfg: the policy's settings: replay_buffer_size (transitions), num_unroll_steps, td_steps,
            discount_factor, use_priority, priority_prob_alpha, priority_prob_beta,
            model.action_space_size, model.observation_shape.
        seed: of the sampling.
    """

    config = dict(type="game_buffer_priorzero")

    @classmethod
    def default_config(cls) -> EasyDict:
        """For DI-engine's config compile; the settings that matter are the policy's."""
        return EasyDict(cls.config, cfg_type=cls.__name__ + "Dict")

    def __init__(self, cfg, seed: int = 0) -> None:
        self._cfg = cfg
        self._segments: deque[PriorZeroSegment] = deque()
        self._last_of_episode: dict[int, PriorZeroSegment] = {}
        self._rng = np.random.default_rng(seed)
        self._transitions = 0
        self._dropped = 0  # transitions removed so far; indices count from the first ever pushed
        self._starts: deque[int] = deque()
        self._priorities = np.zeros(1024, dtype=np.float64)
        self._offset = 0  # global index of _priorities[0]
        self._max_priority = 1.0

    def push_game_segments(self, segments: Sequence[PriorZeroSegment]) -> None:
        """Add finished segments, oldest first, and link each to the part of its episode that came
        before.
        """
        for segment in segments:
            if len(segment) == 0:
                raise PriorZeroError(
                    "an empty segment was pushed: a collector must push what it played or nothing"
                )
            previous = self._last_of_episode.pop(segment.episode_id, None)
            if previous is not None:
                previous.successor = segment
            if segment.done_kind == "running":
                self._last_of_episode[segment.episode_id] = segment
            start = self._dropped + self._transitions
            self._segments.append(segment)
            self._starts.append(start)
            self._transitions += len(segment)
            self._reserve(start - self._offset + len(segment))
            self._priorities[start - self._offset : start - self._offset + len(segment)] = (
                self._max_priority
            )

    def _reserve(self, size: int) -> None:
        if size > len(self._priorities):
            grown = np.zeros(max(size, 2 * len(self._priorities)), dtype=np.float64)
            grown[: len(self._priorities)] = self._priorities
            self._priorities = grown

    def remove_oldest_data_to_fit(self) -> int:
        """Drop the oldest segments until at most replay_buffer_size transitions remain; returns how
        many were dropped.
        """
        before = self._transitions
        while self._transitions > self._cfg.replay_buffer_size and len(self._segments) > 1:
            gone = self._segments.popleft()
            self._starts.popleft()
            self._transitions -= len(gone)
            self._dropped += len(gone)
            if self._last_of_episode.get(gone.episode_id) is gone:
                del self._last_of_episode[gone.episode_id]
        if self._dropped - self._offset > len(self._priorities) // 2:
            self._priorities = np.roll(self._priorities, -(self._dropped - self._offset))
            self._offset = self._dropped
        return before - self._transitions

    def get_num_of_game_segments(self) -> int:
        return len(self._segments)

    def get_num_of_transitions(self) -> int:
        return self._transitions

    def _locate(self, indices: np.ndarray) -> list[tuple[PriorZeroSegment, int]]:
        """Global transition indices -> (segment, position)."""
        starts = np.fromiter(self._starts, dtype=np.int64, count=len(self._starts))
        which = np.searchsorted(starts, indices, side="right") - 1
        return [
            (self._segments[w], int(i - starts[w])) for w, i in zip(which, indices, strict=True)
        ]

    def _draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Global indices `[count]` and importance weights `[count]` (prioritised replay,
        arXiv:1511.05952).

        P(i) = p_i^alpha / sum_j p_j^alpha; w_i = (N P(i))^-beta / max_j w_j over the batch.
        """
        if self._transitions == 0:
            raise PriorZeroError("the replay buffer is empty: collect before training")
        if not self._cfg.use_priority:
            return self._dropped + self._rng.integers(self._transitions, size=count), np.ones(
                count, dtype=np.float32
            )
        low = self._dropped - self._offset
        scaled = self._priorities[low : low + self._transitions] ** self._cfg.priority_prob_alpha
        probability = scaled / scaled.sum()
        chosen = self._rng.choice(self._transitions, size=count, p=probability)
        weights = (self._transitions * probability[chosen]) ** -self._cfg.priority_prob_beta
        return self._dropped + chosen, (weights / weights.max()).astype(np.float32)

    def sample(self, batch_size: int) -> WorldModelBatch:
        """Draw a world-model batch; see `WorldModelBatch` for what it holds and `fill_row` for the
        targets.
        """
        cfg, unroll = self._cfg, self._cfg.num_unroll_steps
        indices, weights = self._draw(batch_size)
        shape, dim = (batch_size, unroll), cfg.model.observation_shape
        zeros = lambda *s: np.zeros(s, dtype=np.float32)  # noqa: E731
        batch = WorldModelBatch(
            observations=zeros(batch_size, unroll + 1, dim),
            actions=np.zeros(shape, dtype=np.int64),
            rewards=zeros(*shape),
            policies=zeros(*shape, cfg.model.action_space_size),
            mask_step=zeros(*shape),
            mask_value=zeros(*shape),
            mask_reward=zeros(*shape),
            returns=zeros(*shape),
            discounts=zeros(*shape),
            bootstrap_observations=zeros(*shape, dim),
            bootstrap_actions=np.zeros(shape, dtype=np.int64),
            bootstrap_index=np.zeros(shape, dtype=np.int64),
            search_values=np.full(shape, np.nan, dtype=np.float32),
            weights=weights,
            indices=indices,
        )
        for row, (segment, position) in enumerate(self._locate(indices)):
            view = window(segment, position, unroll + cfg.td_steps)
            filler = int(self._rng.choice(view.steps[-1].valid_ids))
            fill_row(batch, row, view, unroll, cfg.td_steps, cfg.discount_factor, filler)
        return batch

    def update_priority(self, batch: WorldModelBatch) -> None:
        """Take over the priorities the update left in `batch.new_priorities`; rows dropped
        meanwhile are skipped.
        """
        if batch.new_priorities is None:
            raise PriorZeroError(
                "the batch carries no new priorities: run the policy's learn step on it first"
            )
        alive = batch.indices >= self._dropped
        # The small constant keeps a perfectly predicted transition reachable.
        values = np.abs(batch.new_priorities[alive]) + 1e-6
        self._priorities[batch.indices[alive] - self._offset] = values
        if len(values):
            self._max_priority = max(self._max_priority, float(values.max()))

    def sample_llm(self, count: int, recent: int | None = None) -> list[LLMSample]:
        """Draw decisions at text level, without repetition, from the newest `recent` transitions
        (None: from all).

        Decisions with fewer than two valid actions teach a policy nothing and are left out, so
        fewer than `count` may come back.
        """
        low = max(self._transitions - recent, 0) if recent else 0
        order = self._dropped + low + self._rng.permutation(self._transitions - low)
        samples: list[LLMSample] = []
        for segment, position in self._locate(order):
            if len(samples) == count:
                break
            if len(segment.steps[position].valid_actions) >= 2:
                samples.append(self._llm_sample(segment, position))
        return samples

    def _llm_sample(self, segment: PriorZeroSegment, position: int) -> LLMSample:
        cfg = self._cfg
        view = window(segment, position, cfg.td_steps + 1)
        step, span = view.steps[0], min(cfg.td_steps, len(view.steps))
        value = sum(cfg.discount_factor**i * view.steps[i].reward for i in range(span))
        if span < len(view.steps):
            value += cfg.discount_factor**span * view.steps[span].root_value
        elif view.end != "terminated":
            # The state after a cut was never searched; the last searched value one step earlier
            # stands in for it.
            value += cfg.discount_factor**span * view.steps[-1].root_value
        return LLMSample(
            step.state,
            step.valid_actions,
            step.visit_distribution,
            step.behaviour,
            step.action_index,
            value,
            value - step.predicted_value,
            step.prior_logprobs,
            step.prior_version,
            step.reasoning,
        )
