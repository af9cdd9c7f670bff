"""A draw from the LLM alone: from what, how often, and what is written down of it."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.play.players import llm_move, llm_policy

LOGPROBS = np.log([0.1, 0.4, 0.2])  # of texts; they need not sum to one


@pytest.mark.parametrize(
    ("temperature", "policy"),
    [
        (1.0, [1 / 7, 4 / 7, 2 / 7]),
        (0.5, [1 / 21, 16 / 21, 4 / 21]),
        (2.0, np.sqrt([1, 4, 2]) / np.sqrt([1, 4, 2]).sum()),
    ],
)
def test_what_is_drawn_from(temperature, policy):
    assert llm_policy(LOGPROBS, temperature) == pytest.approx(policy)
    rng = np.random.default_rng(0)
    moves = [llm_move(LOGPROBS, temperature, rng) for _ in range(4000)]
    assert moves[0].behaviour == pytest.approx(policy)
    counts = np.bincount([m.action_index for m in moves], minlength=3)
    assert counts / 4000 == pytest.approx(policy, abs=0.03)


def test_nothing_passes_for_a_search():
    move = llm_move(LOGPROBS, 1.0, np.random.default_rng(0))
    assert not move.visit_counts.any() and move.prior_weight == 1.0
    assert np.isnan([move.root_value, move.predicted_value]).all()
    np.testing.assert_array_equal(move.target_policy, move.behaviour)
