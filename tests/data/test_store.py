"""Columns of steps: what is dropped is forgotten. What is read is tested with batches."""

from __future__ import annotations

import pickle

import numpy as np

from priorzero.data.segment import Segment
from priorzero.data.store import StepStore
from tests.test_buffer import Episode


def fresh(number: int) -> list[Segment]:
    """An episode in two segments; no state of it is seen anywhere else."""
    return Episode(number, [1.0] * 12, "truncated", cuts=[6, 6]).segments()


def test_what_is_dropped_leaves_nothing_behind():
    """Forty times as much has gone through the second time as is held, and it is no larger."""
    store, sizes = StepStore(3, burn_in=4), []
    for number in range(600):
        for part, segment in enumerate(fresh(number)):
            store.append(segment, 2 * number + part, store.end - 1 if part else None)
        if len(store) > 200:
            store.drop(store.end - 120)
        if number in (60, 599):
            sizes.append(len(pickle.dumps(store)))
    assert sizes[1] < 1.2 * sizes[0]

    last = store.windows(np.array([store.end - 12]), 12)
    assert last.known.tolist() == [12]
    assert store.observations(last.states)[0, 4:, :2].tolist() == [[599, t] for t in range(13)]
