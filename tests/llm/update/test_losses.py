"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from priorzero.llm.update.losses import (
    approx_kl,
    clipped_surrogate,
    entropy,
    entropy_of,
    kl_divergence,
    kl_estimate,
    reinforce_surrogate,
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


def test_sft_at_a_temperature_reads_the_root_of_the_odds():
    """At temperature 2 odds of 1 to 9 are 1 to 3, and the gradient is half of policy - target."""
    totals = (2 * TOTALS).requires_grad_()
    loss = sft_action_loss(totals, torch.tensor([1.0, 0.0]), temperature=2.0)
    assert loss.item() == pytest.approx(math.log(4))
    loss.backward()
    assert totals.grad.tolist() == pytest.approx([(0.25 - 1) / 2, 0.75 / 2])


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


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "clipped"),
    [
        (1.0, 2.0, 2.0, False),
        (2.0, 2.0, 1.2 * 2.0, True),  # good action: no more than 1 + eps is rewarded
        (2.0, -2.0, -2.0 * 2.0, False),  # bad action: the whole ratio is punished
        (0.5, -2.0, -0.8 * 2.0, True),  # bad action: enough already
        (0.5, 2.0, 0.5 * 2.0, False),
    ],
)
def test_clipping(ratio, advantage, value, clipped):
    got = clipped_surrogate(math.log(ratio) * ONE, advantage * ONE, low=0.2, high=0.2)
    assert float(got.value) == pytest.approx(value, rel=1e-5)
    assert bool(got.clipped) is clipped and float(got.ratio) == pytest.approx(ratio)


def test_the_upper_clip_may_be_another():
    log_ratio, advantage = torch.tensor([2.0, 0.5]).log(), torch.tensor([1.0, -1.0])
    got = clipped_surrogate(log_ratio, advantage, low=0.2, high=0.28)
    assert got.value.tolist() == pytest.approx([1.28, -0.8])


def test_the_dual_clip_bounds_what_a_bad_action_costs():
    """Only where A < 0 and the ratio is beyond it: there value and gradient stand still."""
    log_ratio = torch.tensor([5.0, 2.0, 5.0]).log().requires_grad_()
    advantage = torch.tensor([-1.0, -1.0, 1.0])
    got = clipped_surrogate(log_ratio, advantage, low=0.2, high=0.2, dual=3.0)
    assert got.value.tolist() == pytest.approx([-3.0, -2.0, 1.2])
    assert got.clipped.tolist() == [True, False, True]
    got.value.sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx([0.0, -2.0, 0.0])


def test_a_clipped_unit_gives_no_gradient():
    log_ratio = torch.tensor([math.log(2.0)], requires_grad=True)
    clipped_surrogate(log_ratio, 2.0 * ONE, low=0.2, high=0.2).value.sum().backward()
    assert log_ratio.grad.tolist() == [0.0]


def test_reinforce_by_hand():
    """A log pi, whatever the old policy was; its gradient is the advantage."""
    value = torch.tensor([-1.0, -2.0], requires_grad=True)
    got = reinforce_surrogate(value, torch.tensor([0.0, math.log(9.0)]), torch.tensor([2.0, -3.0]))
    assert got.value.tolist() == [-2.0, 6.0] and got.clipped.tolist() == [False, False]
    assert got.ratio.tolist() == pytest.approx([1.0, 9.0])
    got.value.sum().backward()
    assert value.grad.tolist() == [2.0, -3.0]


@pytest.mark.parametrize(
    ("estimator", "value"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_kl_estimates_by_hand(estimator, value):
    """p = 1/2, q = 1/4: log q - log p = -log 2."""
    got = kl_estimate(torch.tensor(0.5).log(), torch.tensor(0.25).log(), estimator)
    assert float(got) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", "forward", None),
        ("k2", None, "forward"),
        ("k3", "forward", "backward"),
    ],
)
def test_what_the_kl_estimates_are_in_the_mean(estimator, value, gradient):
    """Summed over all actions with their own probabilities, against the KL written out."""
    logits = torch.tensor([0.3, -1.0, 0.9], requires_grad=True)
    log_q = torch.tensor([-0.2, 0.1, 0.4]).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    chances = log_p.detach().exp()  # of drawing an action: no gradient goes through them
    mean = (chances * kl_estimate(log_p, log_q, estimator)).sum()

    forward = (log_p.exp() * (log_p - log_q)).sum()
    backward = (log_q.exp() * (log_q - log_p)).sum()
    if value:
        assert mean.item() == pytest.approx(forward.item(), rel=1e-5)
    got = torch.autograd.grad(mean, logits, retain_graph=True)[0]
    wanted = torch.zeros(3)
    if gradient:
        whole = forward if gradient == "forward" else backward
        wanted = torch.autograd.grad(whole, logits)[0]
    assert got.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_approx_kl_by_hand():
    assert float(approx_kl(torch.tensor(math.log(2.0)))) == pytest.approx(1 - math.log(2))
