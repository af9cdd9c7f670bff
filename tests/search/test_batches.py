"""Many roots at once against one root after the other: the mixture, the noise, the results."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.plugins import load
from priorzero.search.root_prior import RootPrior, mix_root_priors
from priorzero.search.roots import Root
from priorzero.settings.policy import PolicySettings, RootPriorSettings
from tests.search.games import POLICIES, log_softmax

K, SIZES = 40, [5, 1, 12, 40, 5, 2, 12, 9]  # ids nodes branch over; valid actions per root


def made(seed: int) -> tuple[list[Root], list[RootPrior]]:
    """Roots whose ids are in no order, and priors over them."""
    rng = np.random.default_rng(seed)
    roots = [
        Root(np.zeros((1, 2), np.float32), np.zeros(0, np.int64), rng.permutation(K)[:size])
        for size in SIZES
    ]
    logs = [log_softmax(rng.normal(size=size)) for size in SIZES]
    return roots, [RootPrior(log, log, None, 0.0) for log in logs]


def begun(policy: str, roots, priors, values, noise=None, **settings):
    begin = load("priorzero.search.root_policies", policy).begin
    settings = PolicySettings(num_simulations=12, **settings)
    return begin(roots, priors, np.asarray(values), K, settings, noise)


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
@pytest.mark.parametrize("weighting", ["fixed", "adaptive"])
def test_a_mixture_does_not_depend_on_the_other_roots(mixing, weighting):
    rng = np.random.default_rng(0)
    wm = [rng.normal(size=size).astype(np.float32) for size in SIZES]
    llm = [None if i in (3, 6) else 9.0 * rng.normal(size=n) for i, n in enumerate(SIZES)]
    settings = RootPriorSettings(mixing=mixing, weighting=weighting)

    together = mix_root_priors(wm, llm, settings, 4000)
    assert len({prior.weight for prior in together}) == (2 if weighting == "fixed" else 7)
    for i, prior in enumerate(together):
        (alone,) = mix_root_priors([wm[i]], [llm[i]], settings, 4000)
        np.testing.assert_array_equal(prior.log_mixed, alone.log_mixed)
        np.testing.assert_array_equal(prior.log_wm, alone.log_wm)
        assert prior.weight == alone.weight and len(prior.log_mixed) == SIZES[i]
        assert (prior.log_llm is None) == (llm[i] is None)
        if llm[i] is not None:
            np.testing.assert_array_equal(prior.log_llm, alone.log_llm)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 2.0])
def test_dirichlet_noise_is_numpys_root_after_root(alpha):
    roots, priors = made(1)
    ours, theirs = np.random.default_rng(2), np.random.default_rng(2)
    search = begun("puct", roots, priors, np.zeros(8), ours, root_dirichlet_alpha=alpha)

    expected = np.zeros((len(roots), K))
    for row, (root, prior) in enumerate(zip(roots, priors, strict=True)):
        draw = theirs.dirichlet([alpha] * len(root.valid_ids))
        expected[row, root.valid_ids] = 0.75 * np.exp(prior.log_mixed) + 0.25 * draw
    np.testing.assert_array_equal(search.tree.arrays.prior[:, 0], expected)
    np.testing.assert_array_equal(search.tree.arrays.valid, expected > 0)
    assert ours.random() == theirs.random()


def test_gumbel_noise_is_numpys_root_after_root():
    roots, priors = made(1)
    ours, theirs = np.random.default_rng(2), np.random.default_rng(2)
    search = begun("gumbel", roots, priors, np.zeros(8), ours)
    for row, root in enumerate(roots):
        np.testing.assert_array_equal(
            search.gumbel[row, root.valid_ids], theirs.gumbel(size=len(root.valid_ids))
        )
    assert (search.gumbel != 0).sum() == sum(SIZES) and ours.random() == theirs.random()


@pytest.mark.parametrize("target", ["regularised", "visits"])
@pytest.mark.parametrize("policy", POLICIES)
def test_results_do_not_depend_on_the_other_roots(policy, target):
    roots, priors = made(3)
    rng = np.random.default_rng(4)
    values = rng.normal(size=len(roots))
    said = rng.normal(size=(12, 2, len(roots))), rng.normal(size=(12, len(roots), K))

    def grown(rows: slice):
        search = begun(policy, roots[rows], priors[rows], values[rows], policy_target=target)
        for scalars, logits in zip(*said, strict=True):
            search.select()
            search.expand(scalars[0, rows], scalars[1, rows], logits[rows])
        return search, search.results()

    search, together = grown(slice(None))
    for row, (root, result) in enumerate(zip(roots, together, strict=True)):
        (alone,) = grown(slice(row, row + 1))[1]
        np.testing.assert_array_equal(result.visit_counts, alone.visit_counts)
        np.testing.assert_array_equal(result.target_policy, alone.target_policy)
        assert (result.value, result.choice) == (alone.value, alone.choice)

        # Each number belongs to its own id, whatever the order of the ids.
        visits = search.tree.arrays.visits[row, 0]
        np.testing.assert_array_equal(result.visit_counts, visits[root.valid_ids])
        assert result.visit_counts.sum() == 12 and result.target_policy.sum() == pytest.approx(1)
        if policy == "gumbel":
            assert result.visit_counts[result.choice] == result.visit_counts.max()
