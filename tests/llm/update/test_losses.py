"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from priorzero.llm.update.losses import (
    entropy,
    entropy_of,
    kl_divergence,
    rft_loss,
    sft_action_loss,
    sft_token_loss,
)

# totals log(1), log(3): the policy is 1/4, 3/4 whatever is added to both.
TOTALS = torch.tensor([0.0, math.log(3)]) - 7.5


def test_sft_action_loss():
    by_hand = 0.5 * math.log(4) + 0.5 * math.log(4 / 3)
    assert float(sft_action_loss(TOTALS, torch.tensor([0.5, 0.5]))) == pytest.approx(by_hand)
    # Its minimum is the target's entropy, reached where policy and target agree.
    agreeing = torch.tensor([0.25, 0.75])
    assert float(sft_action_loss(TOTALS, agreeing)) == pytest.approx(float(entropy_of(agreeing)))


def test_sft_action_gradient_is_policy_minus_target():
    totals = TOTALS.clone().requires_grad_()
    sft_action_loss(totals, torch.tensor([1.0, 0.0])).backward()
    assert totals.grad.tolist() == pytest.approx([0.25 - 1, 0.75])


def test_sft_token_loss():
    assert float(
        sft_token_loss(torch.tensor([-2.0, -4.0]), torch.tensor([0.25, 0.75]))
    ) == pytest.approx(3.5)


def test_entropy_and_kl():
    half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(entropy(half)) == pytest.approx(math.log(2))
    assert float(entropy_of(torch.tensor([0.0, 1.0]))) == 0.0
    assert float(kl_divergence(quarter, half)) == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    )


@pytest.mark.parametrize(
    ("old", "advantage", "policy_loss", "clipped"),
    [
        (0.25, 2.0, -2.0, False),  # ratio 1
        (0.125, 2.0, -1.2 * 2.0, True),  # ratio 2, good action: no more than 1 + eps is rewarded
        (0.125, -2.0, 2.0 * 2.0, False),  # ratio 2, bad action: the whole ratio is punished
        (0.5, -2.0, 0.8 * 2.0, True),  # ratio 1/2, bad action: enough already
        (0.5, 2.0, -0.5 * 2.0, False),
    ],
)
def test_rft_clipping(old, advantage, policy_loss, clipped):
    terms = rft_loss(TOTALS, 0, advantage, math.log(old), clip_epsilon=0.2)
    assert float(terms.policy_loss) == pytest.approx(policy_loss, rel=1e-5)
    assert terms.clipped is clipped
    assert float(terms.loss) == pytest.approx(policy_loss, rel=1e-5)


def test_rft_weight_kl_and_entropy_add_up():
    reference = torch.tensor([0.5, 0.5]).log()
    terms = rft_loss(
        TOTALS,
        1,
        1.0,
        math.log(0.75),
        weight=0.5,
        reference=reference,
        kl_coef=0.1,
        entropy_coef=0.01,
    )
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    spread = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert float(terms.loss) == pytest.approx(-0.5 + 0.1 * kl - 0.01 * spread, rel=1e-5)


def test_rft_clipped_action_gives_no_gradient():
    totals = TOTALS.clone().requires_grad_()
    rft_loss(totals, 0, 2.0, math.log(0.125)).loss.backward()
    assert totals.grad.tolist() == [0.0, 0.0]
