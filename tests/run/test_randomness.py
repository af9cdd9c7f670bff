"""Generators go on where they were, through a file."""

from __future__ import annotations

import random

import numpy as np
import torch

from priorzero.run.checkpoint import CheckpointStore
from priorzero.run.randomness import (
    generator_state,
    global_states,
    set_generator_state,
    set_global_states,
)


def draws() -> list[float]:
    # A normal draw leaves a second one waiting, which is part of the state.
    legacy = np.random.normal()  # noqa: NPY002
    return [random.random(), random.gauss(0, 1), legacy, float(torch.rand(())), *torch.randn(2)]


def test_global_generators(tmp_path):
    draws()
    store = CheckpointStore(tmp_path)
    store.save(1, {"random": global_states()}, None, {})
    expected = draws()
    draws()
    set_global_states(store.load()[0]["random"])
    assert draws() == expected


def test_one_generator():
    one, two = np.random.default_rng(5), np.random.default_rng(6)
    one.integers(10, size=3, dtype=np.uint32)  # half of a 64 bit word waits
    set_generator_state(two, generator_state(one))
    assert one.random(5).tolist() == two.random(5).tolist()
    assert one.integers(10, size=3).tolist() == two.integers(10, size=3).tolist()
