"""Which prior stands in a target: by hand, from the planner to what each learner is taught, and
what each setting makes of an LLM that is wrong and sure of it.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

from priorzero.play.players import search_move
from priorzero.plugins import load
from priorzero.search.planner import Planner
from priorzero.search.root_prior import RootPrior, mix_root_priors, prior_in_target
from priorzero.search.roots import Root
from priorzero.settings.policy import PolicySettings, RootPriorSettings
from priorzero.types import PriorZeroError
from priorzero_config import get_priorzero_config
from tests.search.games import POLICIES, Game, begin, grow
from tests.search.test_targets import to_sixty_digits

LLM = np.array([-0.1, -3.0, -5.0, -4.0])
SHARES = np.exp(LLM) / np.exp(LLM).sum()


def bandit(policy: str, rewards, prior, simulations: int, **settings):
    """A grown search: action a of the root earns rewards[a], and nothing is earned below."""
    actions, log = len(rewards), np.log(prior)
    search = load("priorzero.search.root_policies", policy).begin(
        [Root(np.zeros((1, 1), np.float32), np.array([]), np.arange(actions))],
        [RootPrior(log, log, None, 0.0)],
        np.zeros(1),
        actions,
        PolicySettings(num_simulations=simulations, **settings),
        None,
    )
    for _ in range(simulations):
        parents, taken = search.select()
        reward = rewards[taken[0]] if parents[0] == 0 else 0.0
        search.expand(np.array([reward]), np.zeros(1), np.zeros((1, actions)))
    return search


def targets(policy: str, search, prior):
    (found,) = load("priorzero.search.root_policies", policy).targets(search, [np.asarray(prior)])
    return found


# ---- the operators -------------------------------------------------------------------------------


def test_gumbels_target_by_hand():
    """Two actions, two simulations, each tried once: sigma = (50 + 1) * 0.1 * (0, 1) = (0, 5.1)."""
    search = bandit("gumbel", [0.0, 1.0], np.array([0.5, 0.5]), 2)
    (result,) = search.results()
    assert result.visit_counts.tolist() == [1.0, 1.0]
    lift = np.exp(5.1)
    assert result.target_policy == pytest.approx([1 / (1 + lift), lift / (1 + lift)])
    expected = np.array([0.9, 0.1 * lift])
    assert targets("gumbel", search, [0.9, 0.1]) == pytest.approx(expected / expected.sum())


def test_gumbels_completed_values_stay_the_searchs():
    """Only the likeliest of three actions is tried (one simulation, reward 1): the mixed value is
    (0 + 1 * 1) / 2 whatever p is, scaled to (1, 0, 0), and sigma (51 * 0.1, 0, 0).
    """
    search = bandit("gumbel", [1.0, 1.0, 1.0], np.array([0.6, 0.3, 0.1]), 1)
    expected = np.array([0.2 * np.exp(5.1), 0.2, 0.6])
    found = targets("gumbel", search, [0.2, 0.2, 0.6])
    assert found == pytest.approx(expected / expected.sum())


@pytest.mark.parametrize("simulations", [4, 24])
def test_pucts_target_to_sixty_digits(simulations):
    """Every q is the reward, or where nothing was tried the mean of all returns; both over the
    largest q, the smallest being that of the steps below, 0.
    """
    rewards, start = np.array([0.2, 1.0, 0.5]), np.array([0.8, 0.1, 0.1])
    search = bandit("puct", rewards, start, simulations)
    visits = search.results()[0].visit_counts
    returns = (visits * rewards).sum()
    mean = returns / (1 + simulations)
    tried = visits > 0
    low = 0.0 if (visits > 1).any() else rewards[tried].min()
    span = max(rewards[tried].max() - low, 0.01)
    q = (np.where(tried, rewards, mean) - low) / span
    c = 1.25 + np.log((simulations + 1 + 19652 + 1) / 19652)
    assert (visits == 0).any() == (simulations == 4)

    for prior in (start, np.array([0.05, 0.15, 0.8])):
        want = to_sixty_digits(prior, q, simulations, c)
        np.testing.assert_allclose(targets("puct", search, prior), want, rtol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_the_searchs_own_prior_it_is_the_searchs_own_target(policy):
    """To the last bit, with noise in the search and roots of several sizes."""
    game = Game(3, actions=6, coarse=False)
    search = begin(policy, game, 12, noisy=True)
    grow(search, game, 12)
    results = search.results()
    sizes = [len(r.visit_counts) for r in results]
    own = [np.exp(log) for log in logs_of(game, search, sizes)]
    for result, found in zip(
        results, load("priorzero.search.root_policies", policy).targets(search, own), strict=True
    ):
        np.testing.assert_array_equal(found, result.target_policy)
    assert len(set(sizes)) > 2


def logs_of(game: Game, search, sizes):
    """The roots' priors without noise, as `begin` took them."""
    from tests.search.games import log_softmax

    ids = np.split(search._actions.ids, np.cumsum(sizes)[:-1])
    return [log_softmax(game.look(row, ())[2][i].astype(float)) for row, i in enumerate(ids)]


# ---- which prior it is ---------------------------------------------------------------------------


def test_the_llms_is_at_temperature_one_and_the_mixtures_is_not():
    settings = RootPriorSettings(temperature=2.0, weight=1.0)
    (prior,) = mix_root_priors([np.zeros(4)], [LLM], settings, 0)
    softened = np.exp(LLM / 2) / np.exp(LLM / 2).sum()
    assert np.exp(prior_in_target("mixture", prior, LLM)) == pytest.approx(softened)
    assert np.exp(prior_in_target("llm", prior, LLM)) == pytest.approx(SHARES)
    assert np.exp(prior_in_target("world_model", prior, LLM)) == pytest.approx([0.25] * 4)


def test_where_no_llm_answered_the_llms_is_the_mixture():
    (prior,) = mix_root_priors([np.array([1.0, 0.0])], [None], RootPriorSettings(), 0)
    assert prior_in_target("llm", prior, None) is prior.log_mixed


# ---- what each learner is taught -----------------------------------------------------------------

SAYS_NOTHING, SAYS_SO = np.zeros(4), np.array([0.0, 0.3, 1.0, 0.2])


@pytest.fixture
def taught(monkeypatch):
    """(world model's target, LLM's target) of a played decision whose world model is undecided and
    whose LLM is sure of action 0.
    """

    def made(policy: str, rewards, world_model: str, llm: str) -> tuple[np.ndarray, np.ndarray]:
        (prior,) = mix_root_priors([np.zeros(4)], [LLM], RootPriorSettings(weight=0.5), 0)
        search = bandit(policy, rewards, np.exp(prior.log_mixed), 32)
        planner = Planner.__new__(Planner)
        planner._policy = load("priorzero.search.root_policies", policy)
        root = Root(np.zeros((1, 1), np.float32), np.array([]), np.arange(4), LLM)
        targets = [planner._targets(search, [root], [prior], [n])[0] for n in (world_model, llm)]
        (result,) = search.results()
        move = search_move(
            SimpleNamespace(
                action_index=0,
                behaviour=result.target_policy,
                target_policy=result.target_policy,
                visit_counts=result.visit_counts,
                root_value=0.0,
                predicted_value=0.0,
                prior=prior,
                world_model_target=targets[0],
                llm_target=targets[1],
            )
        )
        return move.target_policy, (
            move.target_policy if move.llm_target is None else move.llm_target
        )

    return made


@pytest.mark.parametrize("policy", POLICIES)
def test_where_the_search_found_nothing_the_mixture_teaches_the_other_ones_opinion(taught, policy):
    mixed_wm, mixed_llm = taught(policy, SAYS_NOTHING, "mixture", "mixture")
    assert mixed_wm[0] > 0.6 and mixed_llm is mixed_wm  # the world model learns the LLM's mistake
    assert SHARES[0] - mixed_llm[0] > 0.05  # and the LLM is drawn to a policy that knows nothing

    own_wm, own_llm = taught(policy, SAYS_NOTHING, "world_model", "llm")
    assert own_wm == pytest.approx([0.25] * 4, abs=1e-9)
    assert own_llm == pytest.approx(SHARES, abs=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_where_it_found_something_each_learner_moves_from_where_it_stands(taught, policy):
    mixed, _ = taught(policy, SAYS_SO, "mixture", "mixture")
    wm, llm = taught(policy, SAYS_SO, "world_model", "llm")
    assert wm[2] > mixed[2] > llm[2] > SHARES[2]  # towards the good action, all of them
    assert wm[0] < 0.25 and mixed[0] > wm[0]  # the LLM's mistake is none of the world model's own
    assert llm[0] < SHARES[0]
    crossed = taught(policy, SAYS_SO, "llm", "world_model")
    np.testing.assert_array_equal(crossed[0], llm)
    np.testing.assert_array_equal(crossed[1], wm)


def test_the_llm_gets_the_mixtures_where_only_the_world_models_is_another(taught):
    wm, llm = taught("puct", SAYS_SO, "world_model", "mixture")
    both, _ = taught("puct", SAYS_SO, "mixture", "mixture")
    np.testing.assert_array_equal(llm, both)
    assert np.abs(wm - llm).max() > 0.05


# ---- through the policy --------------------------------------------------------------------------


@pytest.mark.parametrize("root_policy", POLICIES)
def test_a_plan_brings_both_and_plays_from_the_mixture(make_policy, randomise, root_policy):
    def forward(target_prior, llm_target_prior):
        policy = make_policy(root_policy=root_policy)
        policy.settings.root_prior = RootPriorSettings()
        policy.settings.target_prior = target_prior
        randomise(policy.network, seed=3)
        rng = np.random.default_rng(2)
        roots = [
            Root(
                rng.normal(size=(1, 6)).astype(np.float32),
                np.zeros(0, np.int64),
                np.arange(3 + row),
                None if row == 2 else rng.normal(size=3 + row),
                llm_target_prior=llm_target_prior,
            )
            for row in range(3)
        ]
        return policy.collect_mode.forward(roots, 1.0, 0)

    plain, own = forward("mixture", "mixture"), forward("world_model", "llm")
    for a, b in zip(plain, own, strict=True):
        assert a.action_index == b.action_index
        for name in ("visit_counts", "target_policy", "behaviour"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert a.world_model_target is None and a.llm_target is None
        assert b.world_model_target.sum() == pytest.approx(1) == b.llm_target.sum()
    for b in own[:2]:
        assert np.abs(b.world_model_target - b.target_policy).max() > 2e-3
        assert np.abs(b.llm_target - b.target_policy).max() > 2e-3
    # Where no LLM answered, all three are one.
    np.testing.assert_allclose(own[2].llm_target, own[2].target_policy, atol=1e-12)
    np.testing.assert_allclose(own[2].world_model_target, own[2].target_policy, atol=1e-12)


def test_a_root_policy_without_the_operator_is_refused(make_policy):
    policy = make_policy(root_policy="lightzero")
    root = Root(np.zeros((1, 6), np.float32), np.array([]), np.arange(3), np.zeros(3), False, "llm")
    with pytest.raises(PriorZeroError, match="no target with another prior.*mixture"):
        policy.collect_mode.forward([root], 1.0, 0)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "llm", "overrides"),
    [
        ("policy.target_prior is 'both'.*world_model or llm", True, dict(target_prior="both")),
        (
            "policy.target_prior is 'llm'.*no function of a prior",
            True,
            dict(target_prior="llm", policy_target="visits", root_policy="puct"),
        ),
        (
            "policy.target_prior is 'world_model'.*no function of a prior",
            True,
            dict(target_prior="world_model", root_policy="lightzero"),
        ),
        (
            "policy.target_prior is 'world_model'.*without an LLM",
            False,
            dict(target_prior="world_model"),
        ),
        ("llm.sft.target_prior is 'llm'.*no function of a prior", True, "visits"),
        ("llm.sft.target_prior is 'llm'.*only SFT reads it", True, "off"),
        ("llm.sft.target_prior is 'llm'.*without an LLM", False, "on"),
    ],
)
def test_what_makes_no_sense_is_refused(message, llm, overrides):
    if isinstance(overrides, str):
        settings = dict(llm=dict(sft=dict(target_prior="llm", enable=overrides != "off")))
        if overrides == "visits":
            settings["policy"] = dict(policy_target="visits", root_policy="puct")
    else:
        settings = dict(policy=overrides)
    with pytest.raises(PriorZeroError) as error:
        get_priorzero_config(enable_llm=llm, overrides=settings)
    assert re.search(message, str(error.value))


def test_what_makes_sense_is_not():
    settings, _ = get_priorzero_config(
        overrides=dict(
            policy=dict(target_prior="world_model", root_policy="gumbel", policy_target="visits"),
            llm=dict(sft=dict(target_prior="llm")),
        )
    )
    assert settings.policy.target_prior == "world_model"
