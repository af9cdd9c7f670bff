"""The per-sample loss against LightZero's `WorldModel.compute_loss` and against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from priorzero.settings.policy import LossWeights
from priorzero.world_model.loss import (
    WorldModelTargets,
    cross_entropy,
    group_kl,
    world_model_loss,
)
from priorzero.world_model.model import Unrolled

B, T, V, S = 4, 5, 12, 21


@pytest.fixture
def setting(make_policy, randomise):
    """(model, target model, batch in LightZero's form, the same as outputs and targets for our
    loss).
    """
    policy = make_policy()
    model, target = randomise(policy.network, seed=1), randomise(policy.target_network, seed=2)
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor([5, 4, 2, 5])
    mask = torch.arange(T) < known[:, None]
    observations = torch.randn(B, T + 1, 6, generator=generator)
    batch = dict(
        observations=observations[:, :-1],
        actions=torch.randint(V, (B, T), generator=generator),
        rewards=torch.softmax(torch.randn(B, T, S, generator=generator), -1),
        mask_padding=mask,
        ends=torch.zeros(B, T, dtype=torch.long),
        timestep=torch.zeros(B, T, dtype=torch.long),
        target_value=torch.softmax(torch.randn(B, T, S, generator=generator), -1),
        target_policy=torch.softmax(2 * torch.randn(B, T, V, generator=generator), -1),
    )
    return model, target, observations, batch


def ours(
    model,
    target,
    observations,
    batch,
    sample_weights=None,
    weights=None,
    used=None,
    mask_latent=None,
):
    outputs = model.unroll(model.encode(observations[:, :-1]), batch["actions"])
    with torch.no_grad():
        latent = target.encode(observations[:, 1:])
    mask = batch["mask_padding"].float()
    used = torch.ones(V, dtype=torch.bool) if used is None else used
    targets = WorldModelTargets(
        latent,
        batch["rewards"],
        batch["target_value"],
        batch["target_policy"],
        mask if mask_latent is None else mask_latent,
        mask,
        mask,
        mask,
        used,
    )
    return world_model_loss(
        outputs,
        targets,
        torch.ones(B) if sample_weights is None else sample_weights,
        8,
        weights or LossWeights(),
    )


@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_with_unit_weights_it_is_lightzeros_loss(setting, entropy):
    model, target, observations, batch = setting
    wm = model.world_model
    wm.policy_entropy_weight = entropy
    stock = wm.compute_loss(batch, target.world_model.tokenizer, None)
    # LightZero compares T - 1 predicted latents and masks each by the step it leads to; the last
    # one it drops.
    shifted = torch.cat([batch["mask_padding"][:, 1:].float(), torch.zeros(B, 1)], dim=1)
    total, terms = ours(
        model,
        target,
        observations,
        batch,
        weights=LossWeights(entropy=entropy),
        mask_latent=shifted,
    )
    for name, theirs in [
        ("latent_loss", "loss_obs"),
        ("reward_loss", "loss_rewards"),
        ("value_loss", "loss_value"),
        ("policy_loss", "orig_policy_loss"),
        ("policy_entropy", "policy_entropy"),
    ]:
        expected = stock.intermediate_losses[theirs].detach()
        assert terms[name].item() == pytest.approx(expected.item(), rel=1e-5), name
        assert terms[name].item() > 0.01, name
    assert total.item() == pytest.approx(stock.loss_total.item(), rel=1e-5)


def test_the_last_latent_counts_where_its_step_was_played(setting):
    model, target, observations, batch = setting
    shifted = torch.cat([batch["mask_padding"][:, 1:].float(), torch.zeros(B, 1)], dim=1)
    _, without = ours(model, target, observations, batch, mask_latent=shifted)
    _, full = ours(model, target, observations, batch)
    per_step = group_kl(
        model.unroll(model.encode(observations[:, :-1]), batch["actions"]).latent,
        target.encode(observations[:, 1:]),
        8,
    )
    assert full["latent_loss"].item() == pytest.approx(
        per_step[batch["mask_padding"]].mean().item(), rel=1e-5
    )
    assert abs(full["latent_loss"] - without["latent_loss"]) > 1e-4


def test_importance_weights_scale_each_samples_loss_and_gradient(setting):
    model, target, observations, batch = setting
    head = model.world_model.head_value.head_module[-1].weight

    def loss_and_gradient(sample_weights):
        model.zero_grad()
        total, _ = ours(model, target, observations, batch, sample_weights)
        total.backward()
        return total.item(), head.grad.clone(), model.world_model.pos_emb.weight.grad.clone()

    alone = [loss_and_gradient(torch.eye(B)[b]) for b in range(B)]
    weights = torch.tensor([0.1, 1.0, 0.5, 0.25])
    total, value_gradient, position_gradient = loss_and_gradient(weights)
    assert total == pytest.approx(
        sum(w * a[0] for w, a in zip(weights.tolist(), alone, strict=True)), rel=1e-5
    )
    torch.testing.assert_close(
        value_gradient, sum(w * a[1] for w, a in zip(weights, alone, strict=True))
    )
    torch.testing.assert_close(
        position_gradient, sum(w * a[2] for w, a in zip(weights, alone, strict=True))
    )
    even, even_gradient, _ = loss_and_gradient(torch.ones(B))
    assert abs(total - even) > 0.1 and (value_gradient - even_gradient).abs().max() > 1e-3


def test_ids_without_an_action_get_no_gradient(setting):
    model, target, observations, batch = setting
    used = torch.arange(V) < 7
    batch["target_policy"] = batch["target_policy"] * used
    batch["target_policy"] /= batch["target_policy"].sum(-1, keepdim=True)
    total, _ = ours(model, target, observations, batch, weights=LossWeights(entropy=0.1), used=used)
    total.backward()
    last = model.world_model.head_policy.head_module[-1]
    assert last.weight.grad[7:].abs().max() == 0 and last.bias.grad[7:].abs().max() == 0
    assert last.weight.grad[:7].abs().sum(1).min() > 0


def test_terms_by_hand():
    logits = torch.tensor([0.0, math.log(3.0)])
    assert cross_entropy(logits, torch.tensor([0.5, 0.5])).item() == pytest.approx(
        0.5 * (math.log(4) + math.log(4 / 3))
    )
    prediction, target = torch.tensor([0.5, 0.5, 0.25, 0.75]), torch.tensor([1.0, 0.0, 0.25, 0.75])
    assert group_kl(prediction, target, 2).item() == pytest.approx(
        0.5 * math.log(2), abs=1e-4
    )  # second group: 0

    one = torch.ones(1, 2)
    zeros = torch.zeros(1, 2, 2)
    targets = WorldModelTargets(
        latent=torch.tensor([[[1.0, 0.0]] * 2]),
        reward=torch.tensor([[[1.0, 0.0]] * 2]),
        value=torch.tensor([[[0.0, 1.0]] * 2]),
        policy=torch.tensor([[[1.0, 0.0, 0.0]] * 2]),
        mask_latent=one,
        mask_reward=torch.tensor([[1.0, 0.0]]),
        mask_value=one,
        mask_policy=one,
        used_actions=torch.tensor([True, True, False]),
    )
    outputs = Unrolled(latent=zeros + 0.5, reward=zeros, policy=torch.zeros(1, 2, 3), value=zeros)
    total, terms = world_model_loss(
        outputs,
        targets,
        torch.tensor([0.5]),
        2,
        LossWeights(latent=2.0, reward=3.0, policy=5.0, value=7.0, entropy=11.0),
    )
    # Every term is log 2 (the policy over two used ids), halved by the sample's weight; entropy is
    # subtracted.
    half = 0.5 * math.log(2)
    assert all(value.item() == pytest.approx(half, abs=1e-4) for value in terms.values())
    assert total.item() == pytest.approx((2 + 3 + 5 + 7 - 11) * half, abs=1e-3)


def test_a_batch_without_any_known_step_gives_zero_not_nan():
    zero = torch.zeros(1, 1)
    two = torch.tensor([[[1.0, 0.0]]])
    targets = WorldModelTargets(
        two, two, two, two, zero, zero, zero, zero, torch.tensor([True, True])
    )
    total, _ = world_model_loss(
        Unrolled(two, two, two, two), targets, torch.ones(1), 2, LossWeights()
    )
    assert total.item() == 0.0
