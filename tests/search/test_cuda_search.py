"""The GPU's search against the CPU's: its kernels on random trees (on the CPU too, under Triton's
interpreter: TRITON_INTERPRET=1, with triton installed), and captured graphs on a network's roots.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

from priorzero.plugins import load
from tests.search.games import POLICIES, Game, begin, grow, random_roots

GPU = torch.cuda.is_available()
KERNELS = GPU or (
    os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
)
SIMULATIONS = 40 if GPU else 10  # the interpreter is slow
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no GPU, nor Triton's interpreter")
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")


class OnDevice:
    """`CudaTree` behind `SearchTree`'s three calls, with numpy in and out and some padding."""

    def __init__(self, policy: str, search, simulations: int, padding: int) -> None:
        from priorzero.search.fused.cuda import CudaTree

        self.device = "cuda" if GPU else "cpu"
        self.search, self.rows, self.simulation = search, len(search.tree.arrays.child), 0
        self.ids = search.tree.arrays.child.shape[2]
        rule = load("priorzero.search.root_policies", policy).fused(search)
        self.batch, self.width = self.rows + padding, self.ids + padding
        self.tree = CudaTree(self.batch, simulations, self.width, rule.halving, self.device)

        # A first search in the same memory, of which the second must see nothing.
        self.tree.begin(search, rule)
        self.tree.plant()
        for _ in range(simulations // 2):
            self.select()
            self.expand(np.ones(self.rows), np.ones(self.rows), np.ones((self.rows, self.ids)))
        self.simulation = 0
        self.tree.begin(search, rule)
        self.tree.plant()

    def select(self):
        parents, actions = (x.cpu().numpy()[: self.rows] for x in self.tree.select())
        assert (actions < self.ids).all()
        return parents, actions

    def expand(self, rewards, values, logits) -> None:
        def padded(x, *shape, dtype):
            wide = np.full(shape, 9.0)  # what lies in the padding must not matter
            wide[tuple(slice(n) for n in x.shape)] = x
            return torch.tensor(wide, dtype=dtype, device=self.device)

        self.tree.expand(
            self.simulation,
            padded(rewards, self.batch, dtype=torch.float64),
            padded(values, self.batch, dtype=torch.float64),
            padded(logits, self.batch, self.width, dtype=torch.float32),
        )
        self.simulation += 1

    def results(self):
        # Every second tree is wanted, too.
        self.tree.finish(self.search, range(0, self.rows, 2))
        return self.search.results()


@needs_kernels
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_kernels_grow_the_same_trees(policy, seed, coarse):
    game, simulations = Game(seed, actions=[3, 9, 40][seed], coarse=coarse), SIMULATIONS
    plain, device = (begin(policy, game, simulations, noisy=seed % 2 == 1) for _ in range(2))
    on_device = OnDevice(policy, device, simulations, padding=seed)

    paths = grow(plain, game, simulations)
    assert grow(on_device, game, simulations) == paths
    assert max(len(path) for nodes in paths for path in nodes) > 2
    for a, b in zip(plain.results(), on_device.results(), strict=True):
        np.testing.assert_array_equal(a.visit_counts, b.visit_counts)
        np.testing.assert_allclose(a.target_policy, b.target_policy, atol=1e-9)
        assert b.value == pytest.approx(a.value, abs=1e-12) and a.choice == b.choice
    for row in range(0, on_device.rows, 2):
        a, b = plain.nodes(row), device.nodes(row)
        for name in ("parent", "action", "visits"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for name in ("q", "reward", "value"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-9)
        # A softmax of float32, each side's own: a GPU's exponential differs in the last digit.
        np.testing.assert_allclose(a.prior, b.prior, atol=1e-7)


# ---- captured graphs -----------------------------------------------------------------------------


def draw(model, make_policy, randomise, seed):
    """Weights drawn on the CPU, so that all devices hold the same numbers."""
    model.load_state_dict(randomise(make_policy(device="cpu").network, seed=seed).state_dict())


def plans(make_policy, randomise, device, backend, policy, batches, weights=(4,), **settings):
    """What a policy on `device` plans for each batch of roots, once for each draw of weights."""
    made = make_policy(
        device=device, root_policy=policy, search_backend=backend, num_simulations=24, **settings
    )
    found = []
    for seed in weights:
        draw(made.network, make_policy, randomise, seed)
        for roots in batches:
            found.append(made.eval_mode.forward(roots, 0))
    return found, made.positions_clamped


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_captured_search_plans_as_the_plain_one_does(policy, precision, make_policy, randomise):
    """Other numbers of roots, and other weights, through the same graphs and new ones."""
    exact = precision == "float32"
    batches = [random_roots(n, 3, 8, seed=n) for n in (24, 5, 24, 1, 7)]
    args = make_policy, randomise
    plain, clamped = plans(*args, "cpu", "plain", policy, batches, weights=(4, 5))
    on_gpu = dict(weights=(4, 5), search_precision=precision)
    captured, found_clamped = plans(*args, "cuda", "fused", policy, batches, **on_gpu)

    pairs = [pair for a, b in zip(plain, captured, strict=True) for pair in zip(a, b, strict=True)]
    equal = [pair for pair in pairs if np.array_equal(*[plan.visit_counts for plan in pair])]
    # Matrix products in single precision differ from device to device.
    assert len(equal) > (0.9 if exact else 0.5) * len(pairs)
    assert found_clamped == pytest.approx(clamped, rel=0.05)
    for a, b in pairs:
        assert b.predicted_value == pytest.approx(a.predicted_value, abs=5e-3)

    # TF32's rounding turns a choice here and there below a root, which equal counts at the root do
    # not show (Gumbel's halving fixes most of them): it is judged by the mean over the roots.
    judge, near = (np.max, 5e-3) if exact else (np.mean, 5e-2)
    assert judge([abs(b.root_value - a.root_value) for a, b in equal]) < near
    assert judge([np.abs(b.target_policy - a.target_policy).max() for a, b in equal]) < 5e-2


@needs_gpu
@torch.no_grad()
def test_a_captured_look_sees_what_the_plain_one_does(make_policy, randomise):
    """Other numbers of roots, other weights, and action texts that lie elsewhere for a while."""
    from priorzero.search.fused.cuda_roots import CudaRoots
    from priorzero.search.roots import batch_contexts
    from priorzero.world_model.inference import read_contexts

    made = make_policy(device="cuda")
    model, context = made.network.eval(), made.settings.context_steps
    captured = CudaRoots(model, context, "cuda")

    def compare(roots):
        a = read_contexts(model, *batch_contexts(roots, "cuda"))
        b = captured.read(roots)
        count = a.visible.shape[1]
        assert torch.equal(a.visible, b.visible[:, :count]) and not b.visible[:, count:].any()
        assert torch.equal(a.position, b.position)
        seen = a.visible[None, :, None, :, None]
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            torch.testing.assert_close(x * seen, y[..., :count, :] * seen, atol=1e-4, rtol=1e-4)
        for x, y in zip(vars(a.root).values(), vars(b.root).values(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
        return b.root.policy_logits

    found = []
    for seed in (4, 5):
        draw(model, make_policy, randomise, seed)
        found += [compare(random_roots(n, context, 8, seed=n)) for n in (5, 24, 5, 1)]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[4])

    roots = random_roots(5, context, 8, seed=5)
    with model.borrowed_action_text():
        model.set_action_text(
            [*range(8)], torch.randn(8, model.world_model.act_embedding_table.text.shape[1])
        )
        assert not torch.equal(compare(roots), found[4])
    assert torch.equal(compare(roots), found[4])


@needs_gpu
def test_the_same_search_twice_is_the_same_to_the_bit(make_policy, randomise):
    batches = [random_roots(16, 3, 8, seed=1)] * 2
    (first, second), _ = plans(make_policy, randomise, "cuda", "fused", "gumbel", batches)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.target_policy, b.target_policy)
        assert a.root_value == b.root_value


@needs_gpu
def test_captures_while_another_thread_uses_the_device(make_policy, randomise):
    """As when training goes on beside a collection in the background."""
    import threading

    stop = threading.Event()

    def work() -> None:
        x = torch.randn(256, 256, device="cuda")
        while not stop.is_set():
            y = torch.empty(np.random.randint(1, 2**20), device="cuda")  # allocations too
            (x @ x).sum().item()
            del y

    thread = threading.Thread(target=work)
    thread.start()
    try:
        batches = [random_roots(n, 3, 8, seed=n) for n in (3, 9)]
        beside, _ = plans(make_policy, randomise, "cuda", "fused", "puct", batches)
    finally:
        stop.set()
        thread.join()
    alone, _ = plans(make_policy, randomise, "cuda", "fused", "puct", batches)
    for a, b in zip(beside, alone, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x.visit_counts, y.visit_counts)


@needs_gpu
def test_a_failed_capture_is_told(make_policy, randomise, monkeypatch):
    from priorzero.search.fused.cuda import CudaTree
    from priorzero.types import PriorZeroError

    def breaks(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(CudaTree, "expand", breaks)
    with pytest.raises(PriorZeroError, match="no kernel image.*policy.search_backend=plain"):
        plans(make_policy, randomise, "cuda", "fused", "puct", [random_roots(2, 3, 8, seed=0)])
