"""Batches gathered from columns against the slow reference, to the last bit and with the same
random numbers.
"""

from __future__ import annotations

import numpy as np
import pytest

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.data.packing import pack, unpack
from priorzero.data.segment import Segment
from priorzero.run.randomness import generator_state
from priorzero.settings.policy import PolicySettings
from tests.data.slow_batch import draw, slow_batch
from tests.test_buffer import DIM, random_episode, settings

ROWS = 13


class Truth:
    """What the buffer should hold: transitions in order, their priorities, a generator."""

    def __init__(self, settings: PolicySettings, seed: int) -> None:
        self.settings = settings
        self.rng, self.errors = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        self.segments: list[Segment] = []
        self.first, self.largest = 0, 1.0
        self.priorities = np.zeros(0)

    def push(self, segment: Segment) -> None:
        self.segments.append(segment)
        new = np.full(len(segment), self.largest)
        self.priorities = np.concatenate([self.priorities, new])

    def evict(self) -> None:
        while len(self.priorities) > self.settings.replay_buffer_size and len(self.segments) > 1:
            gone = len(self.segments.pop(0))
            self.first, self.priorities = self.first + gone, self.priorities[gone:]

    def check_batch_and_learn(self, buffer: PriorZeroGameBuffer) -> None:
        """The next batch is the reference's; then both get the same priorities."""
        s = self.settings
        indices, weights = draw(self.rng, self.first, self.priorities, ROWS, s)
        steps = [(segment, p) for segment in self.segments for p in range(len(segment))]
        places = {self.first + i: place for i, place in enumerate(steps)}
        want, revisits = slow_batch(self.rng, places, indices, s, DIM)

        batch = buffer.sample(ROWS)
        for name, value in (want | dict(indices=indices, weights=weights)).items():
            given = getattr(batch, name)
            assert given.dtype == value.dtype and given.flags.c_contiguous, name
            np.testing.assert_array_equal(given, value, err_msg=name)

        assert len(batch.revisits) == len(revisits)
        for ours, theirs in zip(batch.revisits, revisits, strict=True):
            assert ours.step is theirs.step
            assert list(map(id, ours.context)) == list(map(id, theirs.context))
            assert ours.policy_of == theirs.policy_of and ours.value_of == theirs.value_of

        # Nobody drew more random numbers than the other.
        np.testing.assert_equal(buffer.state_dict()["rng"], generator_state(self.rng))

        learnt = np.abs(self.errors.normal(size=ROWS)).astype(np.float32)
        buffer.update_priority(indices, learnt)
        self.priorities[indices - self.first] = learnt + np.float32(1e-6)
        self.largest = max(self.largest, float((learnt + np.float32(1e-6)).max()))


def restored(buffer: PriorZeroGameBuffer, truth: Truth, rng: np.random.Generator):
    """Buffer and truth after a resume in which one segment was lost."""
    held = dict(buffer.numbered_segments())
    copies = dict(zip(held, unpack(pack(list(held.values()))), strict=True))
    numbers = list(copies)
    at = int(rng.integers(len(numbers)))
    lost = len(copies.pop(numbers[at]))

    again = PriorZeroGameBuffer(truth.settings, DIM, seed=0)
    assert again.load_state_dict(buffer.state_dict(), copies) == lost
    begin = sum(len(s) for s in truth.segments[:at])
    truth.priorities = np.delete(truth.priorities, slice(begin, begin + lost))
    truth.first, truth.segments = truth.first + lost, list(copies.values())
    return again


@pytest.mark.parametrize("seed", range(10))
def test_batches_equal_the_slow_reference(seed):
    """Random episodes in random segments, several at a time; eviction, priorities, burn-in,
    reanalysis, and a resume in which a segment is missing.
    """
    rng = np.random.default_rng(seed)
    unroll, td, context = (int(rng.integers(1, 7)) for _ in range(3))
    context = min(context, unroll)
    s = settings(
        num_unroll_steps=unroll,
        td_steps=td,
        context_steps=context,
        burn_in=int(rng.integers(context)) if seed % 2 else 0,
        replay_buffer_size=60,
        use_priority=seed % 3 == 0,
        reanalyse_ratio=0.3 if seed % 4 == 1 else 0.0,
        value_bootstrap="search" if seed % 8 == 1 else "target_network",
    )
    truth, buffer = Truth(s, seed), PriorZeroGameBuffer(s, DIM, seed)
    queues, resumes = [random_episode(i, rng).segments() for i in range(25)], 0

    while any(queues):
        segment = queues[int(rng.choice([i for i, q in enumerate(queues) if q][:4]))].pop(0)
        buffer.push_game_segments([segment])
        truth.push(segment)
        if rng.random() < 0.3:
            buffer.remove_oldest_data_to_fit()
            truth.evict()
        if rng.random() < 0.3:
            truth.check_batch_and_learn(buffer)
        if rng.random() < 0.1 and len(truth.segments) > 5:
            buffer = restored(buffer, truth, rng)
            resumes += 1
    assert resumes > 0 and buffer.get_num_of_transitions() == len(truth.priorities)
    truth.check_batch_and_learn(buffer)
