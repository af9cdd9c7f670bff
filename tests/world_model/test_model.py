"""The network's pass along a window against LightZero's own forward, to the last bit."""

from __future__ import annotations

import pytest
import torch

ROWS, STEPS = 3, 5


@pytest.fixture
def made(make_policy, randomise):
    """(network with drawn weights, with dropout, observations, actions)."""
    network = randomise(make_policy().network, seed=1).train()
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(ROWS, STEPS, 6, generator=generator)
    return network, observations, torch.randint(12, (ROWS, STEPS), generator=generator)


def lightzero(network, observations, actions):
    """Latents, rewards, policies and values of LightZero's `WorldModel.forward`."""
    tokens = network.encode(observations).unsqueeze(2), actions.unsqueeze(-1)
    out = network.world_model.forward(
        {"obs_embeddings_and_act_tokens": tokens},
        start_pos=torch.zeros(ROWS, 1, dtype=torch.long),
    )
    return out.logits_observations, out.logits_rewards, out.logits_policy, out.logits_value


def with_gradients(network, outputs):
    """The outputs, and all gradients of a weighted sum of them."""
    generator = torch.Generator().manual_seed(5)
    network.zero_grad()
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs).backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], gradients


def test_outputs_and_gradients_are_lightzeros(made):
    network, observations, actions = made
    torch.manual_seed(3)  # dropout
    theirs, their_gradients = with_gradients(network, lightzero(*made))
    torch.manual_seed(3)
    ours, our_gradients = with_gradients(network, network.predict(observations, actions))

    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    assert our_gradients.keys() == their_gradients.keys() and len(our_gradients) > 40
    for name, gradient in our_gradients.items():
        assert torch.equal(gradient, their_gradients[name]), name
    assert our_gradients["world_model.pos_emb.weight"].abs().max() > 0


def test_values_alone_are_the_predictions_values(made):
    network, observations, actions = made
    network.eval()
    assert torch.equal(
        network.values(observations, actions), network.predict(observations, actions).value
    )
