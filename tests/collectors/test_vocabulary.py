"""Ids of actions that several processes meet at once, against a list made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.collectors.vocabulary import ActionList, SharedVocabulary
from priorzero.text.vocabulary import ActionVocabulary


def shared(capacity: int, overflow: int, workers: int):
    """A list, and vocabularies that take their ids from it."""
    actions = ActionList([], capacity - overflow)
    return actions, [SharedVocabulary(capacity, overflow, actions.extend) for _ in range(workers)]


def test_an_id_is_the_same_wherever_and_whenever_it_is_asked_for():
    actions, (one, two) = shared(12, 2, 2)
    assert one.ids(["look", "north"]) == [0, 1]
    assert two.ids(["take lamp", "north"]) == [2, 1]
    assert two.size == 3 and one.size == 2, "one learns of the lamp when it asks next"
    assert one.ids(["look"]) == [0] and one.size == 2, "what is known is not asked for"
    assert one.ids(["wait", "take lamp"]) == [3, 2]
    assert [one.action_of(i) for i in range(5)] == ["look", "north", "take lamp", "wait", None]
    assert actions.extend(2, []) == ["take lamp", "wait"]


@pytest.mark.parametrize("seed", range(5))
def test_learner_and_workers_agree_on_every_state_they_ever_met(seed):
    """Three workers meet random states, by turns, until the list is long full; the learner names
    what they named and numbers each state anew.
    """
    rng = np.random.default_rng(seed)
    words = [f"command {i}" for i in range(40)]
    actions, workers = shared(24, 4, 3)
    learner = ActionVocabulary(24, 4)
    met = []
    for _ in range(60):
        worker = workers[rng.integers(3)]
        state = list(rng.permutation(words[: 8 + len(met)])[: rng.integers(1, 7)])
        met.append((state, worker.ids(state)))

        if rng.random() < 0.3:  # the end of a round
            learner.ids(actions.extend(learner.size, []))
            for known, given in met:
                assert learner.ids(known) == given
            assert set(np.flatnonzero(workers[0].used_mask)) <= set(range(24))

    learner.ids(actions.extend(learner.size, []))
    assert learner.size == 20, "the list is full"
    used = np.zeros(24, bool)
    for known, given in met:
        assert learner.ids(known) == given
        used[[i for i in given if i is not None]] = True
    # Everything that a worker has used is known to the learner as used, overflow ids included.
    assert (learner.used_mask >= used).all() and used[20:].any()


def test_a_list_begins_where_the_learner_is():
    learner = ActionVocabulary(8, 2)
    learner.ids(["look", "wait"])
    actions = ActionList(["look", "wait"], 6)
    worker = SharedVocabulary(8, 2, actions.extend)
    assert worker.ids(["wait", "sing"]) == [1, 2]
    assert worker.copy().ids(["sing"]) == [2]
