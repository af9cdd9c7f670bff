"""The network's kernels of a GPU's search against `FusedMemory`, which is tested against the
reference; on the CPU too, under Triton's interpreter (see test_cuda_search.py).
"""

from __future__ import annotations

import pytest
import torch

from priorzero.world_model.fused import FusedMemory, fuse, shape_of
from priorzero.world_model.inference import read_contexts
from tests.search.test_cuda_search import GPU, needs_kernels

SIMULATIONS, ACTIONS, LENGTHS = 6, 8, [1, 3, 2, 3, 1]
DEVICE = "cuda" if GPU else "cpu"


@needs_kernels
@pytest.mark.parametrize("kind", ["stable", "positional"])
@torch.no_grad()
def test_says_what_the_fused_memory_says(make_policy, randomise, kind):
    from priorzero.search.fused.cuda_network import CudaNetwork, side_by_side

    network = make_policy(action_vocabulary=dict(kind=kind)).network
    model = randomise(network, seed=1).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    batch, longest = len(LENGTHS), max(LENGTHS)
    contexts = read_contexts(
        model,
        torch.randn(batch, longest, 6, generator=generator).to(DEVICE),
        torch.randint(ACTIONS, (batch, longest), generator=generator).to(DEVICE),
        torch.tensor(LENGTHS, device=DEVICE),
    )
    count = contexts.visible.shape[1]
    weights = fuse(model, ACTIONS, count + 2 + 2 * SIMULATIONS - 1)
    memory = FusedMemory(weights, shape_of(model), 8, count + 2, SIMULATIONS)
    found = CudaNetwork(side_by_side(weights), shape_of(model), 8, count + 2, SIMULATIONS, "ieee")
    for _ in range(2):
        memory.begin(contexts)
        found.begin(contexts)
        for simulation in range(SIMULATIONS):
            parents = torch.randint(simulation + 1, (8,), generator=generator).to(DEVICE)
            actions = torch.randint(ACTIONS, (8,), generator=generator).to(DEVICE)
            a = memory.expand(simulation, parents, actions)
            b = found.expand(simulation, parents, actions)
            torch.testing.assert_close(b.rewards, a.rewards, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(b.values, a.values, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(b.logits, a.logits, atol=1e-4, rtol=1e-4)
        assert int(found.clamped(5)) == int(memory.clamped(5))
