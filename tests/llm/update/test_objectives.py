"""What an objective prepares of a phase, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from priorzero.llm.update.objectives import RFT, make_objectives
from priorzero.types import ActionScores
from tests.llm.decisions import ACTIONS, REQUESTS, request, sample, settings, trainer_of

# Two actions of total log-probability log(1/4) and log(3/4), in two tokens each.
QUARTER = ((math.log(0.25), 0.0), (math.log(0.5), math.log(1.5)))
TWO = REQUESTS[0]


def scored(token_logprobs):
    return lambda requests: [ActionScores(token_logprobs)] * len(requests)


def rft(reduction: str = "sum", **fields) -> RFT:
    usual = dict(clip_epsilon=0.2, kl_coef=0.0, entropy_coef=0.0, max_importance=2.0)
    return RFT(reduction, **usual | fields)


def test_only_what_is_enabled_is_trained_and_sft_goes_first():
    both = settings()
    assert list(make_objectives(both, "sum")) == ["sft", "rft"]
    both.sft.enable = False
    assert list(make_objectives(both, "sum")) == ["rft"]


def test_advantages_are_normalised_over_the_phase():
    drawn = [sample(TWO, value_target=v, predicted_value=1.0) for v in (0.0, 1.0, 5.0)]
    targets, metrics = rft().prepare(drawn, scored(QUARTER))
    mean, spread = 1.0, math.sqrt((4 + 1 + 9) / 3)
    by_hand = [(a - mean) / spread for a in (-1.0, 0.0, 4.0)]
    assert [t.advantage for t in targets] == pytest.approx(by_hand, abs=1e-5)
    assert metrics == {"advantage_raw": pytest.approx(mean)}


def test_one_decision_keeps_its_advantage():
    targets, _ = rft().prepare([sample(TWO, value_target=3.0)], scored(QUARTER))
    assert targets[0].advantage == 3.0


@pytest.mark.parametrize(
    ("limit", "behaviour", "weight"),
    [
        (2.0, (0.5, 0.5), 0.5),  # pi = 1/4, mu = 1/2
        (2.0, (0.05, 0.95), 2.0),  # 5, truncated
        (0.0, (0.05, 0.95), 1.0),  # switched off
    ],
)
def test_the_importance_weight_is_truncated(limit, behaviour, weight):
    drawn = [sample(TWO, behaviour=behaviour)]
    targets, _ = rft(max_importance=limit).prepare(drawn, scored(QUARTER))
    assert targets[0].weight == pytest.approx(weight)
    assert targets[0].old_logprob == pytest.approx(math.log(0.25))


def test_the_reference_is_the_policy_that_collected():
    drawn = [sample(TWO, collected_logprobs=((-1.0, -1.0), (-1.0, -1.0))), sample(TWO)]
    targets, _ = rft().prepare(drawn, scored(QUARTER))
    assert targets[0].reference == pytest.approx([math.log(0.5)] * 2)
    assert targets[1].reference is None


def test_mean_reduction_is_used_on_both_sides():
    targets, _ = rft("mean").prepare([sample(TWO)], scored(((-4.0, 0.0), (-1.0, -1.0))))
    assert targets[0].old_logprob == pytest.approx(-math.log1p(math.exp(1.0)))


def test_a_hopeless_action_has_its_true_ratio(byte_model):
    """Actions of very unlikely texts: the old policy is the new one, down to the smallest."""
    asked = request("Room 1.\nAction:", (ACTIONS[0], "say " + "supercalifragilistic " * 2))
    trainer = trainer_of(byte_model, kl_coef=0.1)
    collected = trainer.score([asked])[0].token_logprobs
    assert sum(collected[1]) < sum(collected[0]) - 100

    drawn = sample(asked, action_index=1, value_target=1.0, collected_logprobs=collected)
    metrics = trainer.update({"rft": [drawn]})

    assert metrics["rft_ratio"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["rft_approx_kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["rft_kl_reference"] == pytest.approx(0.0, abs=1e-5)
