"""The simulations of a search against LightZero's `UniZeroMCTSCtree.search`, both driven by the
same table of network outputs.

LightZero's C++ selection is not reproducible: it weighs priors with sqrt(visits - 1), so in a node
visited once every child scores alike, and it breaks the tie with `rand()` seeded from the clock at
each traversal. So the first search is recorded, and the second one redraws each traversal until it
makes the recorded choice. A traversal changes nothing in the tree; where the second search could
not make that choice at all, the redraws run out and the test fails.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from easydict import EasyDict

from priorzero.plugins import load
from priorzero.quiet import quiet_base
from priorzero.search.planner import simulate
from priorzero.search.root_prior import RootPrior, mix_root_priors
from priorzero.search.roots import Root
from priorzero.settings.policy import PolicySettings, RootPriorSettings
from priorzero.world_model.inference import NodeOutput

with quiet_base():
    from lzero.mcts.ctree.ctree_muzero import mz_tree
    from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
    from lzero.model.common import MZNetworkOutput
    from lzero.policy import InverseScalarTransform

V, SCALE = 10, 5
SUPPORT = 2 * SCALE + 1


class Table(torch.nn.Module):
    """A deterministic network: outputs depend on (row, path of actions) and nothing else."""

    def __init__(self, seed: int, policy=None, flat_value: bool = False, ids: int = V) -> None:
        super().__init__()
        self.action_space_size = ids
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._seed, self._policy, self._flat = seed, policy, flat_value

    def look(self, row: int, path: tuple[int, ...]):
        """reward [S], value [S], policy [V] logits."""
        rng = np.random.default_rng([self._seed, row, *(a + 1 for a in path)])
        reward, value, policy = (
            rng.normal(size=n) for n in (SUPPORT, SUPPORT, self.action_space_size)
        )
        if self._flat:
            reward, value = np.zeros(SUPPORT), np.zeros(SUPPORT)  # symmetric support: both are 0
        policy = 2 * policy if self._policy is None else np.asarray(self._policy)
        return [torch.tensor(x, dtype=torch.float32) for x in (2 * reward, 2 * value, policy)]


class OurMemory:
    """`SearchMemory`'s part in the search: nodes by index."""

    def __init__(self, table: Table, batch: int) -> None:
        self.table, self.paths, self.calls = table, [[()] for _ in range(batch)], []

    def expand(self, simulation, parents, actions) -> NodeOutput:
        rows = []
        for row, (parent, action) in enumerate(
            zip(parents.tolist(), actions.tolist(), strict=True)
        ):
            path = (*self.paths[row][parent], action)
            assert len(self.paths[row]) == simulation + 1
            self.paths[row].append(path)
            self.calls.append((row, parent, action))
            rows.append(self.table.look(row, path))
        reward, value, policy = (torch.stack(x) for x in zip(*rows, strict=True))
        return NodeOutput(reward, value, policy)


class LightZeroModel(torch.nn.Module):
    """The same table behind LightZero's `recurrent_inference`; a latent is [row, number of its
    path].
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table, self.paths = table, [()]

    def recurrent_inference(
        self, state_action_history, simulation_index=0, search_depth=None, timestep=None
    ):
        latents, actions = state_action_history[-1]
        out, rows = [], []
        for latent, action in zip(latents, actions.tolist(), strict=True):
            row, path = int(latent[0]), (*self.paths[int(latent[1])], action)
            self.paths.append(path)
            out.append([row, len(self.paths) - 1])
            rows.append(self.table.look(row, path))
        reward, value, policy = (torch.stack(x) for x in zip(*rows, strict=True))
        return MZNetworkOutput(value, reward, policy, torch.tensor(out, dtype=torch.float32))


class Ties:
    """Stands in for `mz_tree`'s traversal and backup: records choices, or makes the recorded ones
    again.
    """

    def __init__(self, monkeypatch) -> None:
        self.choices: list[tuple] = []
        self._replay: list[tuple] | None = None
        self._drawn = None
        self._traverse, self._backup = mz_tree.batch_traverse, mz_tree.batch_backpropagate
        monkeypatch.setattr(mz_tree, "batch_traverse", self.traverse)
        monkeypatch.setattr(mz_tree, "batch_backpropagate", self.backup)

    def replay(self) -> None:
        """The next search shall make the choices of the last one."""
        self._replay, self.choices = list(self.choices), []

    def traverse(self, roots, pb_c_base, pb_c_init, discount, stats, results, to_play):
        wanted = self._replay[len(self.choices)] if self._replay is not None else None
        for _ in range(20_000):
            self._drawn = mz_tree.ResultsWrapper(num=roots.num)
            found = self._traverse(
                roots, pb_c_base, pb_c_init, discount, stats, self._drawn, to_play
            )
            choice = (tuple(found[0]), tuple(found[2]))
            if wanted in (None, choice):
                self.choices.append(choice)
                return found
        raise AssertionError(f"simulation {len(self.choices)}: this search never chooses {wanted}")

    def backup(self, index, discount, rewards, values, policies, stats, results, to_play):
        self._backup(index, discount, rewards, values, policies, stats, self._drawn, to_play)


@pytest.fixture
def ties(monkeypatch):
    return Ties(monkeypatch)


def transform():
    return InverseScalarTransform(SCALE, "cpu", True)


def prior_of(logits) -> RootPrior:
    return mix_root_priors([np.array(logits)], [None], RootPriorSettings(mode="wm_logits"), 0)[0]


def search_settings(simulations=40, discount=0.97, policy="puct", noise=0.25) -> PolicySettings:
    return PolicySettings(
        num_simulations=simulations,
        discount_factor=discount,
        root_policy=policy,
        root_noise_weight=noise,
    )


def run_ours(table, priors, valid, settings, noise=None, vocabulary=V):
    memory, actions = OurMemory(table, len(valid)), min(vocabulary, table.action_space_size)
    roots = [Root(np.zeros((1, 2), np.float32), np.array([]), np.array(ids)) for ids in valid]
    policy = load("priorzero.search.root_policies", settings.root_policy)
    tree = policy.begin(roots, priors, np.zeros(len(roots)), actions, settings, noise)
    results = simulate(tree, memory, settings.num_simulations, actions, transform(), "cpu")
    return results, memory


def run_lightzero(table, priors, valid, settings, draws=None):
    cfg = EasyDict(
        num_simulations=settings.num_simulations,
        discount_factor=settings.discount_factor,
        device="cpu",
        env_type="not_board_games",
        model=dict(support_scale=SCALE, categorical_distribution=True),
    )
    model, batch = LightZeroModel(table), len(valid)
    logits = np.zeros((batch, table.action_space_size), dtype=np.float32)
    for row, ids in enumerate(valid):
        logits[row, ids] = priors[row].log_mixed
    roots = UniZeroMCTSCtree.roots(batch, valid)
    if draws is None:
        roots.prepare_no_noise([0.0] * batch, logits.tolist(), [-1] * batch)
    else:
        roots.prepare(
            settings.root_noise_weight, draws, [0.0] * batch, logits.tolist(), [-1] * batch
        )
    latents = np.stack([[row, 0] for row in range(batch)]).astype(np.float32)
    UniZeroMCTSCtree(cfg).search(roots, model, latents, [-1] * batch, [0] * batch)
    return roots.get_distributions(), roots.get_values()


VALID = [[0, 3], [2], [1, 2, 3]]
SMALL = 4  # ids of the tables below: few, so that redrawing ties for a whole batch stays cheap


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noisy", [False, True])
def test_same_visits_and_values_as_lightzero(seed, noisy, ties):
    table, rng = Table(seed, ids=SMALL), np.random.default_rng(seed)
    priors = [prior_of(rng.normal(size=len(ids))) for ids in VALID]
    settings = search_settings(policy="lightzero")
    draws = None
    if noisy:
        generator = np.random.default_rng(100 + seed)
        draws = [generator.dirichlet([0.3] * len(ids)).astype(np.float32).tolist() for ids in VALID]
    visits, values = run_lightzero(table, priors, VALID, settings, draws)
    ties.replay()
    results, memory = run_ours(
        table, priors, VALID, settings, np.random.default_rng(100 + seed) if noisy else None
    )
    for result, expected, value in zip(results, visits, values, strict=True):
        np.testing.assert_array_equal(result.visit_counts, expected)
        assert result.value == pytest.approx(value, abs=1e-6)
        assert result.visit_counts.sum() == 40
    assert max(len(path) for paths in memory.paths for path in paths) > 3  # the trees have depth
    assert any(len(set(r.visit_counts)) > 1 for r in results)


@pytest.mark.parametrize("change", ["values", "discount", "prior"])
def test_the_comparison_notices_a_difference(change, ties):
    """The same search with one thing changed cannot follow, or ends with other values."""
    table, settings = (
        Table(0, ids=SMALL),
        search_settings(policy="lightzero"),
    )
    priors = [prior_of([1.0, -1.0, 0.0])]
    visits, values = run_lightzero(table, priors, VALID[2:], settings)
    ties.replay()
    if change == "values":
        table = Table(1, ids=SMALL)
    elif change == "discount":
        settings = search_settings(discount=0.9, policy="lightzero")
    else:
        priors = [prior_of([-6.0, 6.0, 0.0])]
    try:
        result = run_ours(table, priors, VALID[2:], settings)[0][0]
    except AssertionError:
        return
    assert (result.visit_counts != visits[0]).any() or abs(result.value - values[0]) > 1e-3


def test_noise_enters_at_the_root_from_the_given_generator():
    """With all weight on the noise and flat values, visits follow the draw."""
    table = Table(0, policy=[0.0] * V, flat_value=True)
    settings = search_settings(60, noise=1.0)
    for seed in range(5):
        draw = np.random.default_rng(seed).dirichlet([0.3] * 10)
        result = run_ours(
            table,
            [prior_of(np.zeros(10))],
            [list(range(10))],
            settings,
            np.random.default_rng(seed),
        )[0][0]
        counts = result.visit_counts
        assert np.corrcoef(counts, draw)[0, 1] > 0.95


def test_the_prior_decides_at_the_root_and_only_there():
    """Values are flat. The network likes id 4 everywhere; the root's prior likes id 1 or id 6."""
    wm_policy = [0.0] * V
    wm_policy[4] = 9.0
    table, settings = (
        Table(0, policy=wm_policy, flat_value=True),
        search_settings(),
    )
    ids = [1, 4, 6]
    for favourite in (0, 2):
        logits = np.zeros(3)
        logits[favourite] = 6.0
        result, memory = run_ours(table, [prior_of(logits)], [ids], settings)
        assert result[0].visit_counts.argmax() == favourite
        assert result[0].visit_counts[favourite] > 30
        # Below the root the network's favourite is tried first, whatever the root's prior says.
        first_child: dict[int, int] = {}
        for _, parent, action in memory.calls:
            if parent != 0:
                first_child.setdefault(parent, action)
        assert len(first_child) > 5 and set(first_child.values()) == {4}


def test_the_roots_logits_come_from_the_mixture():
    """Same world-model opinion, two LLMs: only the mixture differs, and visits follow it."""
    table = Table(0, policy=[0.0] * V, flat_value=True)
    settings, mixing = search_settings(20), RootPriorSettings(weight=0.9)
    for favourite in range(3):
        llm = np.full(3, -8.0)
        llm[favourite] = -0.5
        prior = mix_root_priors([np.zeros(3)], [llm], mixing, 0)[0]
        visits = run_ours(table, [prior], [[0, 5, 9]], settings)[0][0].visit_counts
        assert visits.argmax() == favourite


def test_inner_nodes_branch_over_ids_in_use_only():
    table, settings = Table(3), search_settings()
    _, memory = run_ours(table, [prior_of([0.0, 1.0])], [[0, 2]], settings, vocabulary=3)
    inner = {action for _, parent, action in memory.calls if parent != 0}
    assert inner == {0, 1, 2}
    _, free = run_ours(table, [prior_of([0.0, 1.0])], [[0, 2]], settings)
    assert max(action for _, parent, action in free.calls if parent != 0) > 2


@pytest.mark.parametrize("tree", ["puct", "lightzero"])
def test_prior_arrays_follow_the_order_of_the_valid_ids(ties, tree):
    """Ids need not be sorted: position i of prior, visits and ids is the same command."""
    table, settings = Table(5, ids=SMALL), search_settings(25, policy=tree)
    logits, order = np.array([2.0, -1.0, 0.5]), [1, 2, 0]
    a = run_ours(table, [prior_of(logits)], [[3, 0, 1]], settings)[0][0]
    ties.replay()
    b = run_ours(table, [prior_of(logits[order])], [[0, 1, 3]], settings)[0][0]
    np.testing.assert_array_equal(a.visit_counts[order], b.visit_counts)
    assert len(set(a.visit_counts)) > 1
    assert a.value == pytest.approx(b.value)


def test_a_real_network_gives_the_tree_what_its_unrolled_forward_says(
    make_policy, randomise, scalar_of
):
    """One root, one simulation: the root's value is the mean that is backed up, from the model's
    full forward.
    """
    policy = make_policy(num_simulations=1, discount_factor=0.9, root_prior=dict(mode="wm_logits"))
    model = randomise(policy.network, seed=4)
    observation = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0))
    root = Root(observation[0].numpy(), np.array([]), np.array([3]))
    output = policy.eval_mode.forward([root], 0)[0]
    with torch.no_grad():
        first = model.unroll(model.encode(observation), torch.tensor([[3]]))
        latents = torch.cat([model.encode(observation), first.latent], 1)
        both = model.unroll(latents, torch.tensor([[3, 0]]))
    reward = scalar_of(both.reward[:, 0]).item()
    root_value, value = (scalar_of(both.value[:, k]).item() for k in (0, 1))
    assert abs(reward + 0.9 * value) > 1e-3
    assert output.predicted_value == pytest.approx(root_value, abs=1e-4)
    assert output.root_value == pytest.approx((root_value + reward + 0.9 * value) / 2, abs=1e-4)
