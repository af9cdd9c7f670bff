"""The LLM's temperature, fitted to targets: against brute force, scipy and cases whose best value
is known; and who plans with it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from priorzero.data.segment import StepRecord
from priorzero.search.calibration import Answers, best_temperature, calibrate, comparable
from priorzero.search.root_prior import mix_root_priors
from priorzero.search.roots import Root
from priorzero.search.targets import regularised
from priorzero.settings.policy import CalibrationSettings, RootPriorSettings
from priorzero.types import ActionScores, TextState

LOW, HIGH = 0.25, 64.0


def softmax(x) -> np.ndarray:
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


def slow_loss(logprobs, targets, temperature: float) -> float:
    """Mean cross-entropy, one number after the other."""
    losses = []
    for said, target in zip(logprobs, targets, strict=True):
        norm = math.log(sum(math.exp((x - max(said)) / temperature) for x in said))
        logs = [(x - max(said)) / temperature - norm for x in said]
        losses.append(-sum(p * log for p, log in zip(target, logs, strict=True)))
    return sum(losses) / len(losses)


def drawn(seed: int, decisions: int = 40, hint: float = 0.3) -> tuple[list, list]:
    """Scores of 2 to 12 actions, with a spread of nats, and targets that agree with them a bit."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 13, size=decisions)
    logprobs = [rng.normal(-15, 6, size=n) for n in sizes]
    targets = [softmax(hint * x + rng.normal(0, 2, size=len(x))) for x in logprobs]
    return logprobs, targets


@pytest.mark.parametrize("seed", range(5))
def test_the_best_temperature_is_that_of_brute_force_and_of_scipy(seed):
    logprobs, targets = drawn(seed)
    found = best_temperature(Answers.of(logprobs, targets), LOW, HIGH)

    def loss(log_t: float) -> float:
        return slow_loss(logprobs, targets, math.exp(log_t))

    bounds = math.log(LOW), math.log(HIGH)
    grid = np.linspace(*bounds, 800)
    best = grid[np.argmin([loss(at) for at in grid])]
    assert abs(math.log(found) - best) <= grid[1] - grid[0]

    options = dict(xatol=1e-10)
    reference = minimize_scalar(loss, bounds=bounds, method="bounded", options=options)
    assert math.log(found) == pytest.approx(reference.x, abs=1e-6)
    assert loss(math.log(found)) <= reference.fun + 1e-12
    assert LOW < found < HIGH


def test_loss_and_slope_are_as_defined_and_convex_in_the_inverse():
    logprobs, targets = drawn(7)
    answers = Answers.of(logprobs, targets)
    betas = np.linspace(0.02, 4.0, 60)
    for beta in betas[::12]:
        assert answers.loss(beta) == pytest.approx(slow_loss(logprobs, targets, 1 / beta))
        step = 1e-5
        numeric = (answers.loss(beta + step) - answers.loss(beta - step)) / (2 * step)
        assert answers.slope(beta) == pytest.approx(numeric, rel=1e-5, abs=1e-7)
    assert (np.diff([answers.slope(beta) for beta in betas]) > 0).all()
    uniform = np.mean([math.log(len(said)) for said in logprobs])
    assert answers.loss(0.0) == pytest.approx(uniform)


@pytest.mark.parametrize("true", [0.7, 1.0, 5.0, 30.0])
def test_a_known_temperature_is_found(true):
    logprobs, _ = drawn(3)
    answers = Answers.of(logprobs, [softmax(said / true) for said in logprobs])
    assert best_temperature(answers, LOW, HIGH) == pytest.approx(true, rel=1e-9)


def test_of_labels_too_as_far_as_they_tell():
    """Walkthrough-like targets, one action each, drawn at the true temperature."""
    rng = np.random.default_rng(5)
    logprobs = [rng.normal(0, 8, size=10) for _ in range(4000)]
    labels = [np.eye(10)[rng.choice(10, p=softmax(said / 6))] for said in logprobs]
    found = best_temperature(Answers.of(logprobs, labels), LOW, HIGH)
    assert found == pytest.approx(6, rel=0.07)


def test_beyond_the_bounds_it_is_the_bound():
    logprobs, _ = drawn(4)
    contrary = [softmax(-said) for said in logprobs]
    right = [np.eye(len(said))[np.argmax(said)] for said in logprobs]
    assert best_temperature(Answers.of(logprobs, contrary), LOW, HIGH) == HIGH
    assert best_temperature(Answers.of(logprobs, right), LOW, HIGH) == LOW


def test_an_action_that_is_impossible_to_the_llm_does_no_harm():
    logprobs, targets = drawn(6)
    said = np.append(logprobs[0], -np.inf)
    logprobs[0], targets[0] = said, np.append(0.99 * targets[0], 0.01)
    found = best_temperature(Answers.of(logprobs, targets), LOW, HIGH)
    assert LOW <= found <= HIGH and np.isfinite(Answers.of(logprobs, targets).loss(1 / found))


# ---- what the search's targets do to it ----------------------------------------------------------


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 16.0), (0.8, 10.0), (1.0, 8.0)])
def test_where_nothing_is_found_the_llm_fades_by_its_share(weight, expected):
    """Targets are then the mixture. The world model has no opinion: 1 / T falls by w."""
    logprobs, _ = drawn(8)
    settings = RootPriorSettings(temperature=8.0, weight=weight)
    priors = mix_root_priors([np.zeros(len(x)) for x in logprobs], logprobs, settings, 0)
    targets = [
        regularised(np.exp(p.log_mixed), np.zeros(len(p.log_mixed)), 16, 1.25) for p in priors
    ]
    found = best_temperature(Answers.of(logprobs, targets), LOW, HIGH)
    assert found == pytest.approx(expected, rel=1e-6)


def test_what_is_found_for_the_llm_sharpens_it_and_against_it_softens_it():
    logprobs, _ = drawn(9)
    settings = RootPriorSettings(temperature=8.0)
    priors = mix_root_priors([np.zeros(len(x)) for x in logprobs], logprobs, settings, 0)

    def found(value) -> float:
        targets = [
            regularised(np.exp(p.log_mixed), value(said), 16, 1.25)
            for p, said in zip(priors, logprobs, strict=True)
        ]
        return best_temperature(Answers.of(logprobs, targets), LOW, HIGH)

    best = found(lambda said: np.eye(len(said))[np.argmax(said)])
    worst = found(lambda said: np.eye(len(said))[np.argmin(said)])
    nothing = found(lambda said: np.zeros(len(said)))
    assert best < 8.0 < nothing < worst


# ---- decisions -----------------------------------------------------------------------------------


def step(logprobs, target, version: int = 0) -> StepRecord:
    """A decision of which the LLM said this, and the search that; two tokens an action."""
    count = len(logprobs)
    actions = tuple(f"action {i}" for i in range(count))
    return StepRecord(
        state=TextState("room", actions),
        observation=np.ones(6, np.float32),
        valid_actions=actions,
        valid_ids=np.arange(count),
        action_index=0,
        visit_counts=np.ones(count),
        behaviour=np.full(count, 1 / count),
        target_policy=np.asarray(target),
        root_value=0.0,
        predicted_value=0.0,
        reward=0.0,
        done_kind="running",
        timestep=0,
        scores=ActionScores(tuple((0.25 * x, 0.75 * x) for x in logprobs), version),
    )


def decided(true: float, count: int, seed: int = 0, version: int = 0) -> list[StepRecord]:
    """Decisions whose targets are the LLM's sums at this temperature."""
    logprobs, _ = drawn(seed, count)
    logprobs = [said[:8] for said in logprobs]  # as many as `make_policy` has names for
    return [step(said, softmax(said / true), version) for said in logprobs]


def test_it_goes_part_of_the_way_and_tells_what_that_is_worth():
    steps = decided(4.0, 50)
    settings = CalibrationSettings(least=50, rate=0.25)
    found = calibrate(steps, "sum", settings, 64.0)
    assert found.best == pytest.approx(4.0) and found.temperature == pytest.approx(32.0)
    assert found.decisions == 50

    said = [np.array(s.scores.totals("sum")) for s in steps]
    targets = [s.target_policy for s in steps]
    assert found.loss_before == pytest.approx(slow_loss(said, targets, 64.0))
    assert found.loss_after == pytest.approx(slow_loss(said, targets, 32.0))
    assert found.loss_after < found.loss_before < found.loss_uniform

    at_once = calibrate(steps, "sum", replace(settings, rate=1.0), 64.0)
    assert at_once.temperature == pytest.approx(4.0)
    # Means of two tokens are half of the sums.
    assert calibrate(steps, "mean", settings, 64.0).best == pytest.approx(2.0)


def test_it_needs_enough_decisions_that_tell_something():
    steps = decided(4.0, 50)
    settings = CalibrationSettings(least=51)
    nothing = step([-3.0, -3.0], [0.9, 0.1])  # the same at every temperature
    assert calibrate(steps, "sum", settings, 8.0) is None
    assert calibrate([], "sum", settings, 8.0) is None
    assert calibrate([*steps, nothing], "sum", settings, 8.0) is None
    assert calibrate([*steps, steps[0]], "sum", settings, 8.0).decisions == 51


def test_present_weights_come_before_older_ones():
    new = decided(2.0, 30, seed=1, version=3)
    old = decided(20.0, 60, seed=2, version=2)
    settings = CalibrationSettings(least=20)
    assert calibrate(new + old, "sum", settings, 8.0).best == pytest.approx(2.0)
    # Too few: filled up with the newest of the older ones.
    settings = CalibrationSettings(least=40)
    assert comparable(new + old, 40) == new + old[:10]
    assert calibrate(new + old, "sum", settings, 8.0).decisions == 40
    # In a run where phases go on beside collection versions may alternate.
    assert comparable(old[:5] + new, 2) == old[:2] + new


# ---- the policy ----------------------------------------------------------------------------------


def auto(**calibration) -> RootPriorSettings:
    calibration = dict(least=10, rate=1.0) | calibration
    return RootPriorSettings(temperature="auto", calibration=CalibrationSettings(**calibration))


def plan(policy, mode: str):
    llm = np.array([-1.0, -9.0, -4.0])
    root = Root(np.ones((1, 6), np.float32), np.array([]), np.array([4, 1, 2]), llm)
    if mode == "collect":
        return policy.collect_mode.forward([root], 1.0, 0)[0]
    return policy.eval_mode.forward([root], 0)[0]


@pytest.mark.parametrize("mode", ["collect", "eval"])
def test_every_search_has_the_temperature_of_the_moment(make_policy, mode):
    policy = make_policy()
    policy.settings.root_prior = auto(start=5.0)
    told = [plan(policy, mode).prior]
    before = policy.snapshot()

    metrics = policy.calibrate(decided(2.0, 30))
    assert (metrics["temperature"], metrics["calibration_decisions"]) == (5.0, 30.0)
    told.append(plan(policy, mode).prior)
    assert policy.calibrate(decided(3.0, 9)) == {"temperature": pytest.approx(2.0)}
    told.append(plan(policy, mode).prior)

    llm = np.array([-1.0, -9.0, -4.0])
    for prior, temperature in zip(told, (5.0, 2.0, 2.0), strict=True):
        assert prior.temperature == pytest.approx(temperature)
        np.testing.assert_allclose(np.exp(prior.log_llm), softmax(llm / temperature), atol=1e-9)
    # An evaluation beside the training plays with what was known when it began.
    assert plan(before, "eval").prior.temperature == 5.0


def test_it_is_saved_with_the_policy_and_given_back(make_policy):
    policy, other = make_policy(), make_policy(seed=1)
    for one in (policy, other):
        one.settings.root_prior = auto()
    policy.calibrate(decided(3.0, 30))
    other.learn_mode.load_state_dict(policy.learn_mode.state_dict())
    assert other.prior_temperature == policy.prior_temperature == pytest.approx(3.0)

    # A run that had a number so far begins at the start; one that takes a number has it.
    fixed = make_policy(seed=2)
    assert "prior_temperature" not in fixed.learn_mode.state_dict()
    other.learn_mode.load_state_dict(fixed.learn_mode.state_dict())
    assert other.prior_temperature == 8.0
    fixed.learn_mode.load_state_dict(policy.learn_mode.state_dict())
    assert fixed.prior_temperature == 1.0


def test_a_policy_in_another_process_is_handed_it_with_the_weights(make_policy):
    policy, worker, fixed = make_policy(), make_policy(seed=1).snapshot(), make_policy(seed=2)
    for one in (policy, worker):
        one.settings.root_prior = auto()
    policy.calibrate(decided(3.0, 30))
    assert worker.prior_temperature == 8.0

    worker.take_weights(policy.acting_weights())
    assert worker.prior_temperature == policy.prior_temperature == pytest.approx(3.0)
    np.testing.assert_array_equal(
        plan(worker, "eval").prior.log_wm, plan(policy, "eval").prior.log_wm
    )

    names = {name for name, _ in fixed.network.named_parameters()}
    assert fixed.acting_weights().keys() == names
