"""The mixture at the root, against numbers worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest

from priorzero.llm.prior import reduced
from priorzero.search.root_prior import (
    LOG_FLOOR,
    log_softmax,
    mix_root_priors,
    prior_weight,
)
from priorzero.search.roots import Root
from priorzero.settings.policy import RootPriorSettings
from priorzero.types import ActionScores, PriorZeroError

WM = np.array([0.0, math.log(3.0)])  # p_WM = 1/4, 3/4
LLM = np.log([0.8, 0.2]) - 7.0  # p_LLM = 4/5, 1/5; an LLM's own numbers do not sum to one
ENTROPY = 0.8112781244591328  # H(1/4, 3/4) / log 2


def mixed(env_steps=0, wm=WM, llm=LLM, **settings):
    prior = mix_root_priors([wm], [llm], RootPriorSettings(**settings), env_steps)[0]
    assert np.exp(prior.log_mixed).sum() == pytest.approx(1.0, abs=1e-12)
    return prior


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
@pytest.mark.parametrize(
    ("mode", "expected", "weight"),
    [("wm_logits", [0.25, 0.75], 0.0), ("llm_logits", [0.8, 0.2], 1.0)],
)
def test_one_opinion_alone(mixing, mode, expected, weight):
    prior = mixed(mode=mode, mixing=mixing, weight=0.3)
    assert np.exp(prior.log_mixed) == pytest.approx(expected, rel=1e-6)
    assert prior.weight == weight


def test_product_of_experts_at_half_weight():
    # sqrt(0.8 / 4) = 0.447214 and sqrt(0.2 * 3 / 4) = 0.387298, divided by their sum 0.834512.
    assert np.exp(mixed(mixing="logits").log_mixed) == pytest.approx([0.535898, 0.464102], abs=1e-6)


def test_product_of_experts_at_three_quarters():
    a, b = 0.8**0.75 * 0.25**0.25, 0.2**0.75 * 0.75**0.25
    assert np.exp(mixed(mixing="logits", weight=0.75).log_mixed) == pytest.approx(
        [a / (a + b), b / (a + b)], abs=1e-9
    )


def test_mixture_of_probabilities():
    assert np.exp(mixed(mixing="probabilities").log_mixed) == pytest.approx(
        [0.525, 0.475], abs=1e-9
    )
    assert np.exp(mixed(mixing="probabilities", weight=0.1).log_mixed) == pytest.approx(
        [0.305, 0.695], abs=1e-9
    )


def test_temperature_flattens_the_llm_only():
    # sqrt(0.8) : sqrt(0.2) = 2 : 1, and squared 16 : 1.
    assert np.exp(mixed(mode="llm_logits", temperature=2.0).log_mixed) == pytest.approx(
        [2 / 3, 1 / 3], abs=1e-9
    )
    assert np.exp(mixed(mode="llm_logits", temperature=0.5).log_mixed) == pytest.approx(
        [16 / 17, 1 / 17], abs=1e-9
    )
    assert np.exp(mixed(mode="wm_logits", temperature=2.0).log_mixed) == pytest.approx(
        [0.25, 0.75], abs=1e-9
    )


@pytest.mark.parametrize(
    ("env_steps", "scheduled"), [(0, 0.8), (5_000, 0.625), (20_000, 0.1), (90_000, 0.1)]
)
def test_adaptive_weight(env_steps, scheduled):
    prior = mixed(
        env_steps, weighting="adaptive", weight_max=0.8, weight_min=0.1, anneal_env_steps=20_000
    )
    assert prior.weight == pytest.approx(0.1 + (scheduled - 0.1) * ENTROPY, abs=1e-9)
    by_hand = np.array([0.8, 0.2]) ** prior.weight * np.array([0.25, 0.75]) ** (1 - prior.weight)
    assert np.exp(prior.log_mixed) == pytest.approx(by_hand / by_hand.sum(), abs=1e-9)


def test_adaptive_weight_follows_the_world_models_doubt():
    settings = RootPriorSettings(weighting="adaptive", weight_max=0.8, weight_min=0.1)
    assert prior_weight(settings, log_softmax(np.zeros(5)), 0) == pytest.approx(0.8)
    sure = prior_weight(settings, log_softmax(np.array([20.0, 0.0, 0.0])), 0)
    assert 0.1 <= sure < 0.1001
    # The weight only matters in the mode that mixes.
    assert (
        prior_weight(
            RootPriorSettings(mode="llm_logits", weighting="adaptive"), log_softmax(np.zeros(2)), 0
        )
        == 1.0
    )


@pytest.mark.parametrize("weighting", ["fixed", "adaptive"])
@pytest.mark.parametrize("mode", ["wm_logits", "llm_logits", "llm_plus_wm_logits"])
@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_one_valid_action_has_probability_one(weighting, mode, mixing):
    prior = mixed(
        wm=np.array([3.0]), llm=np.array([-40.0]), mode=mode, weighting=weighting, mixing=mixing
    )
    assert prior.log_mixed == pytest.approx([0.0], abs=1e-12)
    assert prior.entropy == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("mode", ["wm_logits", "llm_logits", "llm_plus_wm_logits"])
def test_without_an_answer_the_world_model_stands_alone(mode):
    prior = mixed(llm=None, mode=mode)
    assert np.exp(prior.log_mixed) == pytest.approx([0.25, 0.75])
    assert prior.log_llm is None and prior.weight == 0.0 and prior.kl_from_wm == 0.0


@pytest.mark.parametrize(
    "broken", [np.array([math.nan, -1.0]), np.array([-1.0]), np.array([-1.0, -2.0, -3.0])]
)
def test_an_unusable_answer_raises(broken):
    with pytest.raises(AssertionError, match="one number per valid action"):
        mixed(llm=broken)


def test_an_impossible_text_is_floored_and_does_not_rule_out_its_action():
    prior = mixed(llm=np.array([-1.0, -1e6]), mode="llm_logits")
    assert prior.log_mixed[1] == pytest.approx(LOG_FLOOR, abs=1e-6)
    assert np.isfinite(mixed(llm=np.array([-1.0, -np.inf])).log_mixed).all()


def test_measures_by_hand():
    prior = mixed(mixing="probabilities")
    assert prior.kl_from_wm == pytest.approx(
        0.525 * math.log(0.525 / 0.25) + 0.475 * math.log(0.475 / 0.75)
    )
    assert prior.entropy == pytest.approx(-(0.525 * math.log(0.525) + 0.475 * math.log(0.475)))


def test_reduction_over_tokens():
    scores = ActionScores(((-1.0, -2.0, -3.0), (-4.0,)))
    assert reduced(scores, "sum") == pytest.approx([-6.0, -4.0])
    assert reduced(scores, "mean") == pytest.approx([-2.0, -4.0])  # the order turns round
    assert reduced(None, "sum") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "llm"),
        ("weighting", "none"),
        ("mixing", "sum"),
        ("reduction", "max"),
        ("weight", 1.1),
        ("weight", -0.1),
        ("weight_min", 0.9),
        ("weight_max", 1.5),
        ("temperature", 0.0),
        ("anneal_env_steps", 0),
    ],
)
def test_settings_out_of_range_are_rejected_with_their_value(name, value):
    with pytest.raises(PriorZeroError) as caught:
        RootPriorSettings(**{name: value})
    assert str(value) in str(caught.value)


def test_collect_and_eval_mix_alike(make_policy):
    policy = make_policy()
    policy.settings.root_prior = RootPriorSettings(mixing="probabilities", weight=0.25)
    llm = np.log([0.7, 0.2, 0.1])
    root = Root(np.ones((1, 6), dtype=np.float32), np.array([]), np.array([4, 1, 2]), llm)
    collected = policy.collect_mode.forward([root], 1.0, 77)[0]
    evaluated = policy.eval_mode.forward([root], 77)[0]
    np.testing.assert_array_equal(collected.prior.log_mixed, evaluated.prior.log_mixed)
    # The policy head starts at zero, so p_WM is uniform and the mixture is known.
    expected = 0.25 * np.array([0.7, 0.2, 0.1]) + 0.75 / 3
    assert np.exp(evaluated.prior.log_mixed) == pytest.approx(expected, abs=1e-6)
    only_wm = policy.eval_mode.forward([root], 77, "wm_logits")[0]
    assert np.exp(only_wm.prior.log_mixed) == pytest.approx([1 / 3] * 3, abs=1e-6)


@pytest.mark.parametrize("mode", ["collect", "eval"])
def test_the_schedule_of_the_weight_counts_env_steps(make_policy, mode):
    policy = make_policy()
    policy.settings.root_prior = RootPriorSettings(weighting="adaptive", anneal_env_steps=1000)
    root = Root(np.ones((1, 6), np.float32), np.array([]), np.array([4, 1]), np.log([0.7, 0.3]))
    weights = []
    for env_steps in (0, 500, 2000):
        if mode == "collect":
            output = policy.collect_mode.forward([root], 1.0, env_steps)
        else:
            output = policy.eval_mode.forward([root], env_steps)
        weights.append(output[0].prior.weight)
    assert weights == pytest.approx([0.8, 0.45, 0.1])
