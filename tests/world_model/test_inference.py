"""Cached inference of the search against LightZero's own uncached forward over context + path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from priorzero.world_model.inference import SearchMemory

SIMULATIONS, ACTIONS = 14, 8


@pytest.fixture
def model(make_policy, randomise):
    return randomise(make_policy().network, seed=1)


def contexts(lengths, seed=0):
    """observations [B, C, 6], actions [B, C], lengths [B]; what lies beyond a row's length is
    noise, not zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    return (
        torch.randn(len(lengths), longest, 6, generator=generator),
        torch.randint(ACTIONS, (len(lengths), longest), generator=generator),
        torch.tensor(lengths),
    )


def lightzero_forward(model, latents, actions):
    """LightZero's `WorldModel.forward` itself on one sequence, latents [T, D] and actions [T]."""
    return model.world_model.forward(
        {"obs_embeddings_and_act_tokens": (latents[None, :, None], actions[None, :, None])},
        start_pos=torch.zeros(1, 1, dtype=torch.long),
    )


class Reference:
    """One root, all of whose nodes are recomputed from scratch: each node is a list of latents and
    actions.
    """

    def __init__(self, model, observations, actions):
        self.model = model
        latents = model.tokenizer.encoder(observations)
        self.nodes = [(latents, actions[: len(latents) - 1])]

    def look(self, node):
        """policy and value logits of a node; the trailing action comes after what is read, so it
        cannot matter.
        """
        latents, actions = self.nodes[node]
        out = lightzero_forward(self.model, latents, torch.cat([actions, torch.tensor([0])]))
        return out.logits_policy[0, -1], out.logits_value[0, -1]

    def expand(self, parent, action):
        latents, actions = self.nodes[parent]
        actions = torch.cat([actions, torch.tensor([action])])
        out = lightzero_forward(self.model, latents, actions)
        self.nodes.append((torch.cat([latents, out.logits_observations[0, -1:]]), actions))
        return out.logits_rewards[0, -1]


def random_tree(lengths, simulations, max_steps, seed):
    """Parents and actions [simulations, B] of branching paths that stay within max_steps steps of
    context + path.
    """
    rng = np.random.default_rng(seed)
    depth = [[length] for length in lengths]
    parents = np.zeros((simulations, len(lengths)), dtype=np.int64)
    for simulation in range(simulations):
        for row, depths in enumerate(depth):
            allowed = [i for i, d in enumerate(depths) if d < max_steps]
            parents[simulation, row] = rng.choice(allowed)
            depths.append(depths[parents[simulation, row]] + 1)
    assert max(max(d) for d in depth) == max_steps  # the deepest allowed path is among them
    return parents, rng.integers(ACTIONS, size=parents.shape)


@torch.no_grad()
def test_branching_paths_equal_lightzeros_full_forward(model):
    lengths = [1, 3, 2, 3]
    observations, actions, sizes = contexts(lengths)
    memory = SearchMemory(model, SIMULATIONS)
    root = memory.root(observations, actions, sizes)
    references = [Reference(model, observations[b, :n], actions[b]) for b, n in enumerate(lengths)]
    for row, reference in enumerate(references):
        policy, value = reference.look(0)
        torch.testing.assert_close(root.policy_logits[row], policy, atol=1e-4, rtol=0)
        torch.testing.assert_close(root.value_logits[row], value, atol=1e-4, rtol=0)
    parents, taken = random_tree(lengths, SIMULATIONS, 5, seed=3)
    outputs = []
    for simulation in range(SIMULATIONS):
        node = memory.expand(
            simulation, torch.from_numpy(parents[simulation]), torch.from_numpy(taken[simulation])
        )
        outputs.append(node.policy_logits)
        for row, reference in enumerate(references):
            reward = reference.expand(int(parents[simulation, row]), int(taken[simulation, row]))
            policy, value = reference.look(-1)
            torch.testing.assert_close(node.reward_logits[row], reward, atol=1e-4, rtol=0)
            torch.testing.assert_close(node.policy_logits[row], policy, atol=1e-4, rtol=0)
            torch.testing.assert_close(node.value_logits[row], value, atol=1e-4, rtol=0)
    assert memory.positions_clamped == 0
    # Were the outputs nearly constant, any two computations would agree.
    assert torch.stack(outputs).std(dim=0).mean() > 0.01


@torch.no_grad()
def test_unroll_is_lightzeros_forward(model):
    observations, actions, _ = contexts([5, 5, 5])
    latents = model.encode(observations)
    next_latent, reward, policy, value = model.unroll(latents, actions)
    for row in range(3):
        out = lightzero_forward(model, model.tokenizer.encoder(observations[row]), actions[row])
        torch.testing.assert_close(next_latent[row], out.logits_observations[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(reward[row], out.logits_rewards[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(policy[row], out.logits_policy[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(value[row], out.logits_value[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_environment_does_not_depend_on_the_others_in_the_batch(model):
    lengths = [1, 3, 2]
    observations, actions, sizes = contexts(lengths)
    parents, taken = random_tree(lengths, SIMULATIONS, 5, seed=5)

    def play(rows, longest):
        memory = SearchMemory(model, SIMULATIONS)
        root = memory.root(observations[rows, :longest], actions[rows, :longest], sizes[rows])
        seen = [torch.cat([root.policy_logits, root.value_logits], 1)]
        for simulation in range(SIMULATIONS):
            out = memory.expand(
                simulation,
                torch.from_numpy(parents[simulation][rows]),
                torch.from_numpy(taken[simulation][rows]),
            )
            seen.append(torch.cat([out.policy_logits, out.value_logits], 1))
        return torch.cat([seen[0], *seen[1:]], 1)

    together = play([0, 1, 2], 3)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            play([row], length)[0], together[row], atol=1e-5, rtol=0
        )  # less padding as well
    torch.testing.assert_close(play([2, 0, 1], 3), together[[2, 0, 1]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_lies_beyond_a_context_is_ignored(model):
    observations, actions, sizes = contexts([1, 3])
    changed = observations.clone()
    changed[0, 1:] += 100.0
    first, second = SearchMemory(model, 1), SearchMemory(model, 1)
    a, b = (
        first.root(observations, actions, sizes),
        second.root(
            changed,
            (actions + 1) % ACTIONS * (sizes < 3)[:, None] + actions * (sizes == 3)[:, None],
            sizes,
        ),
    )
    torch.testing.assert_close(a.policy_logits, b.policy_logits)
    step = torch.tensor([0, 0]), torch.tensor([1, 2])
    torch.testing.assert_close(
        first.expand(0, *step).value_logits, second.expand(0, *step).value_logits
    )


@torch.no_grad()
def test_paths_beyond_the_trained_window_reuse_the_last_positions_and_are_counted(model):
    """Context 3, window 5 steps (10 tokens): the path's third latent is token 10, then tokens 11,
    12, 13, 14.
    """
    observations, actions, sizes = contexts([3])
    memory = SearchMemory(model, 5)
    memory.root(observations, actions, sizes)
    path = torch.tensor([1, 2, 3, 4, 5])
    outputs = [memory.expand(s, torch.tensor([s]), path[s : s + 1]) for s in range(5)]
    assert memory.positions_clamped == 5

    wm = model.world_model
    tokens = [
        model.encode(observations)[0, 0],
        wm.act_embedding_table(actions[0, 0]),
        model.encode(observations)[0, 1],
        wm.act_embedding_table(actions[0, 1]),
        model.encode(observations)[0, 2],
    ]
    positions = [0, 1, 2, 3, 4]
    for block in wm.transformer.blocks:  # LightZero's causal mask ends with the window as well
        block.attn.mask = torch.tril(torch.ones(16, 16))
    by_hand = [5, 6, 7, 8, 9, 8, 9, 8, 9, 8]

    def feed(token, position):
        tokens.append(token)
        positions.append(position)
        return wm.transformer(torch.stack(tokens)[None] + wm.pos_emb(torch.tensor(positions)))

    for step in range(5):
        x = feed(wm.act_embedding_table(path[step]), by_hand[2 * step])
        x = feed(wm.head_observations.head_module(x[:, -1])[0], by_hand[2 * step + 1])
    torch.testing.assert_close(
        outputs[4].policy_logits[0], wm.head_policy.head_module(x[0, -1]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        outputs[4].value_logits[0], wm.head_value.head_module(x[0, -1]), atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_observations_encode_alike_alone_in_a_batch_and_in_training(model):
    """LightZero's own encoder normalises over the batch, so training and search would see different
    latents.
    """
    observations, _, _ = contexts([5, 5])
    together = model.encode(observations)
    torch.testing.assert_close(
        model.encode(observations[1:, 3:4])[0, 0], together[1, 3], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(model.train().encode(observations), together)
    torch.testing.assert_close(together.unflatten(-1, (-1, 8)).sum(-1), torch.ones(2, 5, 4))
