"""Targets from a search: by hand, in their limits, against long searches, and free of the noise."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest

from priorzero.search.root_policies.puct import begin
from priorzero.search.root_prior import RootPrior
from priorzero.search.roots import Root
from priorzero.search.targets import regularised, visit_shares
from priorzero.settings.policy import PolicySettings

PRIOR = np.array([0.5, 0.3, 0.15, 0.05])


def bandit(rewards, prior, simulations, noise=None, **settings):
    """A search in which action a of the root earns rewards[a] and nothing is earned below."""
    actions = len(rewards)
    log = np.log(prior)
    root = Root(np.zeros((1, 1), np.float32), np.array([]), np.arange(actions))
    tree = begin(
        [root],
        [RootPrior(log, log, None, 0.0)],
        np.zeros(1),
        actions,
        PolicySettings(num_simulations=simulations, **settings),
        noise,
    )
    for _ in range(simulations):
        parents, taken = tree.select()
        reward = rewards[taken[0]] if parents[0] == 0 else 0.0
        tree.expand(np.array([reward]), np.zeros(1), np.zeros((1, actions)))
    return tree.results()[0]


def test_visit_shares():
    assert visit_shares(np.array([3.0, 0.0, 1.0])).tolist() == [0.75, 0.0, 0.25]
    with pytest.raises(AssertionError):
        visit_shares(np.zeros(3))


def test_two_actions_by_hand():
    """p = (1/2, 1/2), q = (0, 1), c = 2.5, N = 4: lambda = 2.5 * 2 / 6 = 5/6.

    5/12 / alpha + 5/12 / (alpha - 1) = 1, so alpha^2 - 11/6 alpha + 5/12 = 0 and the larger root is
    alpha = (11/6 + sqrt(121/36 - 60/36)) / 2 = (11 + sqrt(61)) / 12.
    """
    alpha = (11 + np.sqrt(61)) / 12
    expected = [5 / 12 / alpha, 5 / 12 / (alpha - 1)]
    assert sum(expected) == pytest.approx(1.0)
    policy = regularised(np.array([0.5, 0.5]), np.array([0.0, 1.0]), 4, 2.5)
    assert policy == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.7, -140.0])
@pytest.mark.parametrize("simulations", [1, 16, 10_000])
def test_values_that_say_nothing_leave_the_prior(level, simulations):
    policy = regularised(PRIOR, np.full(4, level), simulations, 1.25)
    assert policy == pytest.approx(PRIOR, abs=1e-9)


def test_it_tends_to_the_greedy_action_as_simulations_grow():
    q, last = np.array([0.2, 0.5, 0.9, 1.0]), 0.0
    for simulations in (4, 40, 400, 4_000, 400_000, 40_000_000):
        policy = regularised(PRIOR, q, simulations, 1.25)
        assert policy.sum() == pytest.approx(1.0) and policy.min() > 0
        assert policy[3] > last
        last = policy[3]
    assert last > 0.99


def test_it_maximises_what_it_is_said_to():
    """q . pi - lambda KL(prior || pi) is smaller at any other policy."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        prior, q = rng.dirichlet(np.ones(6)), rng.random(6)
        weight = 1.25 * np.sqrt(16) / (6 + 16)

        def objective(pi, prior=prior, q=q, weight=weight):
            return q @ pi - weight * (prior * np.log(prior / pi)).sum()

        best = regularised(prior, q, 16, 1.25)
        others = [0.95 * best + 0.05 * rng.dirichlet(np.ones(6)) for _ in range(50)]
        assert all(objective(best) > objective(other) for other in others)


def to_sixty_digits(prior, q, simulations: int, exploration: float) -> np.ndarray:
    """The policy by bisection in decimals."""
    with localcontext(prec=60):
        n = Decimal(simulations)
        weight = Decimal(exploration) * n.sqrt() / (len(q) + n)
        p, q = ([Decimal(float(x)) for x in numbers] for numbers in (prior, q))
        low, high = max(q), max(q) + weight
        for _ in range(190):
            alpha = (low + high) / 2
            above = sum(weight * a / (alpha - b) for a, b in zip(p, q, strict=True)) > 1
            low, high = (alpha, high) if above else (low, alpha)
        policy = [weight * a / (high - b) for a, b in zip(p, q, strict=True)]
        return np.array([float(x / sum(policy)) for x in policy])


@pytest.mark.parametrize("flat", [1.0, 0.1, 1e-13])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 300.0])
def test_it_is_exact_even_where_the_prior_leaves_an_action_no_room(flat, scale):
    rng = np.random.default_rng(5)
    for actions in (1, 2, 7, 25):
        prior = rng.dirichlet(np.full(actions, max(flat, 0.1))) + 1e-13
        if flat < 0.1:  # the values' favourite is as unlikely as the prior's floor allows
            prior[:-1] = 1e-13
        prior /= prior.sum()
        q = scale * np.linspace(1.0, 0.0, actions).round(1)
        policy = regularised(prior, q, 16, 1.25)
        np.testing.assert_allclose(policy, to_sixty_digits(prior, q, 16, 1.25), rtol=1e-12)


def test_roots_of_a_batch_do_not_know_each_other():
    """Padded to the longest, to the last bit what each root gets alone."""
    rng = np.random.default_rng(6)
    sizes = rng.integers(1, 30, size=50)
    priors, qs, simulations = np.zeros((50, 29)), rng.normal(size=(50, 29)), np.arange(1, 51)
    for prior, size in zip(priors, sizes, strict=True):
        prior[:size] = rng.dirichlet(np.ones(size)) + 1e-13
        prior /= prior.sum()
    factors = rng.uniform(0.5, 3.0, size=50)

    together = regularised(priors, qs, simulations, factors)
    for row, n in enumerate(sizes):
        alone = regularised(priors[row, :n], qs[row, :n], simulations[row], factors[row])
        np.testing.assert_array_equal(together[row, :n], alone)
        assert not together[row, n:].any()


@pytest.mark.parametrize("action", range(4))
def test_an_action_without_any_chance_in_the_prior_keeps_the_sum_at_one(action):
    prior = np.full(4, 1e-13)
    prior[0] = 1 - 3e-13
    policy = regularised(prior, np.eye(4)[action], 16, 1.25)
    assert policy.sum() == pytest.approx(1.0) and np.isfinite(policy).all()


def test_a_long_search_without_noise_visits_in_these_shares():
    """Grill et al., proposition 1: (1 + n_a) / (A + N) follows the regularised policy."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        prior, rewards = rng.dirichlet(np.ones(5)), rng.random(5)
        target = bandit(rewards, prior, 1500).target_policy
        shares = bandit(rewards, prior, 1500, policy_target="visits").target_policy
        assert np.abs(target - shares).max() < 0.01
        assert np.abs(target - prior).max() > 0.05  # the values did say something


def test_the_target_does_not_know_the_noise():
    """Same values, other noise: the visits differ, the target does not."""
    rewards = np.array([0.3, 0.6, 0.1, 0.9])
    quiet = bandit(rewards, PRIOR, 200)
    loud = [bandit(rewards, PRIOR, 200, np.random.default_rng(s)) for s in range(4)]
    assert all((run.visit_counts > 0).all() for run in [quiet, *loud])  # every value is known
    for run in loud:
        assert run.target_policy == pytest.approx(quiet.target_policy, abs=1e-9)
    assert len({tuple(run.visit_counts) for run in loud}) == 4

    old = [
        bandit(rewards, PRIOR, 200, np.random.default_rng(s), policy_target="visits")
        for s in range(4)
    ]
    assert max(np.abs(old[0].target_policy - o.target_policy).max() for o in old) > 0.01


def test_noise_alone_teaches_nothing():
    """No reward anywhere: visits follow the noise, the target is the prior."""
    run = bandit(np.zeros(4), PRIOR, 16, np.random.default_rng(0), root_noise_weight=0.9)
    assert run.target_policy == pytest.approx(PRIOR, abs=1e-9)
    assert np.abs(visit_shares(run.visit_counts) - PRIOR).max() > 0.1
