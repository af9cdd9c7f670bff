"""The network's kernels of a GPU's search against `FusedMemory`, which is tested against the
reference; on the CPU too, under Triton's interpreter (see test_cuda_search.py).
"""

from __future__ import annotations

import pytest
import torch

from priorzero.world_model.fused import FusedMemory, fuse, shape_of
from priorzero.world_model.inference import read_contexts
from tests.search.test_cuda_search import GPU, needs_kernels

SIMULATIONS = 12 if GPU else 4  # the interpreter is slow
ACTIONS, LENGTHS, PADDED, LONGER = 8, [1, 3, 2, 3, 1], 8, 2
DEVICE = "cuda" if GPU else "cpu"


def contexts_of(model, generator):
    """Of roots with 1 to 3 observations."""
    batch, longest = len(LENGTHS), max(LENGTHS)
    return read_contexts(
        model,
        torch.randn(batch, longest, 6, generator=generator).to(DEVICE),
        torch.randint(ACTIONS, (batch, longest), generator=generator).to(DEVICE),
        torch.tensor(LENGTHS, device=DEVICE),
    )


def memories(model, contexts):
    """The reference's and the kernels', with room for more roots and a longer context."""
    from priorzero.search.fused.cuda_network import CudaNetwork, side_by_side

    context = contexts.visible.shape[1] + LONGER
    weights = fuse(model, ACTIONS + 3, context + 2 * SIMULATIONS - 1)
    both = side_by_side(weights).first_actions(ACTIONS)
    sizes = shape_of(model), PADDED, context, SIMULATIONS
    return FusedMemory(weights, *sizes), CudaNetwork(both, *sizes, "tf32x3")


@needs_kernels
@torch.no_grad()
def test_says_what_the_fused_memory_says(make_policy, randomise):
    """Twice in the same memory: the second search sees nothing of the first."""
    network = make_policy(action_vocabulary=dict(kind="positional")).network
    model = randomise(network, seed=1).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    contexts = contexts_of(model, generator)
    want, got = memories(model, contexts)

    values = []
    for simulations in (2, SIMULATIONS):
        want.begin(contexts)
        got.begin(contexts)
        for simulation in range(simulations):
            parents = torch.randint(simulation + 1, (PADDED,), generator=generator).to(DEVICE)
            actions = torch.randint(ACTIONS, (PADDED,), generator=generator).to(DEVICE)
            a = want.expand(simulation, parents, actions)
            b = got.expand(simulation, parents, actions)
            torch.testing.assert_close(b.rewards, a.rewards, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(b.values, a.values, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(b.logits, a.logits[:, :ACTIONS], atol=1e-4, rtol=1e-4)
            values.append(a.values)

    # A chain beyond the trained window, to its end.
    assert torch.stack(values).std(dim=0).min() > 0.01
    rows = len(LENGTHS)
    assert int(got.clamped(rows)) == int(want.clamped(rows))


@needs_kernels
@pytest.mark.parametrize("rows, inner, out", [(5, 40, 101), (20, 256, 96), (70, 33, 7)])
def test_a_product_in_parts_is_the_product(rows, inner, out):
    """Of sizes that fill no block, and with a second half that reads the numbers beyond."""
    from priorzero.search.fused import cuda_network

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2 * inner, generator=generator).to(DEVICE)
    first, second = (
        cuda_network.Affine(
            torch.randn(columns, inner, generator=generator).to(DEVICE).t(),
            torch.randn(columns, generator=generator).to(DEVICE),
        )
        for columns in (out, 70)
    )
    *_, both = cuda_network.beside(first, second, cut=128)
    parts = cuda_network.product(x, both, "tf32x3", cut=128).sum(0)
    wanted = x.double()[:, :inner] @ first.weight.double()
    torch.testing.assert_close(parts[:, :out].double(), wanted, atol=1e-4, rtol=1e-5)
    wanted = x.double()[:, inner:] @ second.weight.double()
    torch.testing.assert_close(parts[:, 128:].double(), wanted, atol=1e-4, rtol=1e-5)

    found = cuda_network.gelu_product(x[:, :inner].contiguous(), first, "tf32x3")
    wanted = torch.nn.functional.gelu(x[:, :inner] @ first.weight + first.bias, approximate="tanh")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
