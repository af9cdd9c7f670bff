"""Reanalysis: fresh targets are the planner's own on the same roots, for a share of the rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from priorzero.data.batch import Revisit
from priorzero.data.segment import Segment, StepRecord
from priorzero.search.reanalyse import reanalyse
from priorzero.search.roots import Root
from priorzero.settings.policy import RootPriorSettings
from priorzero.types import ActionScores, TextState

EPISODES, STEPS, CONTEXT = 3, 9, 3
IDS = np.array([5, 0, 3])


def vector(episode: int, t: int) -> np.ndarray:
    return np.random.default_rng([episode, t]).normal(size=6).astype(np.float32)


def taken(t: int) -> int:
    return t % 3


def logprobs(episode: int, t: int) -> tuple[tuple[float, ...], ...]:
    """Of three actions of two tokens; every fourth step has no answer of the LLM."""
    drawn = np.random.default_rng([7, episode, t]).uniform(-3, 0, size=(3, 2))
    return tuple(map(tuple, drawn.tolist()))


def answered(t: int) -> bool:
    return t % 4 != 3


def segments(episode: int, target=lambda episode, t: (np.array([0.5, 0.25, 0.25]), -1.0)):
    """An episode in segments of 4, 4 and 1; `target` gives stored target policy and root value."""
    found: list[Segment] = []
    for t in range(STEPS):
        if t % 4 == 0:
            last = found[-1] if found else None
            before = last.history(len(last), CONTEXT - 1) if last else ()
            found.append(Segment(0, episode, 4, before))
        policy, value = target(episode, t)
        step = StepRecord(
            state=TextState("", ("a", "b", "c")),
            observation=vector(episode, t),
            valid_actions=("a", "b", "c"),
            valid_ids=IDS,
            action_index=taken(t),
            visit_counts=np.array([2.0, 1.0, 1.0]),
            behaviour=np.full(3, 1 / 3),
            target_policy=policy,
            root_value=value,
            predicted_value=0.0,
            reward=0.1 * t,
            done_kind="truncated" if t == STEPS - 1 else "running",
            timestep=t,
            scores=ActionScores(logprobs(episode, t)) if answered(t) else None,
        )
        found[-1].record(step, vector(episode, t + 1))
    return found


def root(episode: int, t: int) -> Root:
    """From the whole episode, not from segments."""
    states = range(max(0, t - CONTEXT + 1), t + 1)
    llm = np.array([sum(tokens) for tokens in logprobs(episode, t)]) if answered(t) else None
    actions = np.array([IDS[taken(s)] for s in states][:-1], dtype=np.int64)
    return Root(np.stack([vector(episode, s) for s in states]), actions, IDS, llm)


@pytest.fixture
def made(make_policy, make_buffer, randomise):
    """(policy with drawn weights, buffer with `EPISODES` episodes, what the planner finds at each
    of their steps, one root at a time).
    """

    def make(stored=None, target_prior="mixture", **settings):
        sizes = dict(num_unroll_steps=4, context_steps=CONTEXT, td_steps=2, num_simulations=12)
        policy = make_policy(**sizes | settings)
        policy.settings.root_prior = RootPriorSettings(weighting="adaptive", anneal_env_steps=100)
        policy.settings.target_prior = target_prior
        randomise(policy.network, seed=6)
        # Another target network: fresh targets are to come from the present one.
        randomise(policy.target_network, seed=7)
        planned = {
            (e, t): policy.eval_mode.forward([root(e, t)], 40)[0]
            for e in range(EPISODES)
            for t in range(STEPS)
        }
        buffer = make_buffer(policy)
        for e in range(EPISODES):
            given = {} if stored is None else dict(target=lambda e, t: stored(planned[e, t]))
            buffer.push_game_segments(segments(e, **given))
        return policy, buffer, planned

    return make


def dense(target: np.ndarray, capacity: int = 12) -> np.ndarray:
    row = np.zeros(capacity)
    row[IDS] = target
    return row


@pytest.mark.parametrize("root_policy", ["puct", "gumbel"])
@pytest.mark.parametrize("bootstrap", ["target_network", "search"])
def test_fresh_targets_are_the_planners_on_the_same_roots(made, root_policy, bootstrap):
    policy, buffer, planned = made(
        reanalyse_ratio=1.0, root_policy=root_policy, value_bootstrap=bootstrap
    )
    stored = buffer.batch_of(np.arange(EPISODES * STEPS), np.ones(EPISODES * STEPS, np.float32))
    fresh, metrics = policy.reanalyse(stored, 40)

    assert metrics["reanalyse_share"] == 1.0
    moved = 0.0
    for row in range(EPISODES * STEPS):
        episode, start = divmod(row, STEPS)
        for k in range(4):
            t = start + k
            if t >= STEPS:
                assert fresh.policies[row, k].sum() == 0 and np.isnan(fresh.search_values[row, k])
                continue
            want = planned[episode, t]
            np.testing.assert_allclose(fresh.policies[row, k], dense(want.target_policy), atol=1e-4)
            moved += np.abs(fresh.policies[row, k] - stored.policies[row, k]).sum()

            value = -1.0 if bootstrap == "target_network" else None
            if t + 2 < STEPS:
                value = planned[episode, t + 2].root_value if value is None else value
                assert fresh.search_values[row, k] == pytest.approx(value, abs=1e-4)
            else:  # the state after the last step was never a root
                assert np.isnan(fresh.search_values[row, k])
    assert moved > 1.0

    # The rest of the batch is as it was, and so are the data.
    for name in ("observations", "actions", "rewards", "returns", "mask_step", "bootstrap_index"):
        assert getattr(fresh, name) is getattr(stored, name)
    again = buffer.batch_of(np.arange(3), np.ones(3, np.float32))
    np.testing.assert_array_equal(again.policies, stored.policies[:3])


@pytest.mark.parametrize("root_policy", ["puct", "gumbel"])
def test_fresh_targets_have_the_prior_of_the_stored_ones(made, root_policy):
    policy, buffer, planned = made(
        stored=lambda output: (output.world_model_target, output.root_value),
        reanalyse_ratio=1.0,
        root_policy=root_policy,
        target_prior="world_model",
    )
    batch = buffer.batch_of(np.arange(EPISODES * STEPS), np.ones(EPISODES * STEPS, np.float32))
    fresh, metrics = policy.reanalyse(batch, 40)
    np.testing.assert_allclose(fresh.policies, batch.policies, atol=1e-4)
    assert metrics["reanalyse_kl"] == pytest.approx(0.0, abs=1e-6)
    apart = [np.abs(p.world_model_target - p.target_policy).max() for p in planned.values()]
    assert max(apart) > 0.05


def test_what_the_present_network_found_itself_stays(made):
    policy, buffer, _ = made(
        stored=lambda output: (output.target_policy, output.root_value),
        reanalyse_ratio=1.0,
        value_bootstrap="search",
    )
    batch = buffer.sample(8)
    fresh, metrics = policy.reanalyse(batch, 40)
    np.testing.assert_allclose(fresh.policies, batch.policies, atol=1e-4)
    np.testing.assert_allclose(fresh.search_values, batch.search_values, atol=1e-4)
    assert metrics["reanalyse_kl"] == pytest.approx(0.0, abs=1e-6)
    # Later in training the mixture's schedule says otherwise.
    assert policy.reanalyse(batch, 100)[1]["reanalyse_kl"] > 1e-5


def test_the_share_of_rows_is_drawn_for_each_batch(made):
    policy, buffer, _ = made(reanalyse_ratio=0.25)
    drawn = np.zeros(8)
    for _ in range(40):
        batch = buffer.sample(8)
        rows = {row for revisit in batch.revisits for row, _ in revisit.policy_of}
        assert len(rows) == 2
        drawn[list(rows)] += 1
    assert (drawn > 2).all()

    fresh, metrics = policy.reanalyse(batch, 0)
    changed = np.abs(fresh.policies - batch.policies).sum(axis=(1, 2)) > 0
    assert set(np.flatnonzero(changed)) == rows
    steps = batch.mask_step[list(rows)].sum() / batch.mask_step.sum()
    assert metrics["reanalyse_share"] == pytest.approx(steps)
    # However small the ratio, something is searched, so that every update has the same metrics.
    tiny = made(reanalyse_ratio=0.01)[1].sample(8)
    assert len({row for revisit in tiny.revisits for row, _ in revisit.policy_of}) == 1


def test_without_it_no_random_number_is_drawn(made):
    _, buffer, _ = made()
    rng, total = np.random.default_rng(0), EPISODES * STEPS
    for _ in range(3):
        batch = buffer.sample(8)
        assert batch.revisits == []
        assert batch.indices.tolist() == rng.integers(total, size=8).tolist()
        for _ in range(8):
            rng.choice(IDS)  # the filler action of each row


def test_each_step_is_searched_once_and_all_in_one_call(made):
    _, buffer, _ = made(reanalyse_ratio=1.0)
    batch = buffer.batch_of(np.array([0, 1, 1, 2]), np.ones(4, np.float32))
    assert sorted(r.step.timestep for r in batch.revisits) == [0, 1, 2, 3, 4, 5]
    calls = []

    def plan(roots):
        calls.append(len(roots))
        result = SimpleNamespace(target_policy=np.full(3, 1 / 3), value=2.0)
        return [SimpleNamespace(result=result, taught=result.target_policy)] * len(roots)

    fresh, _ = reanalyse(batch, plan, "sum")
    assert calls == [6]
    np.testing.assert_allclose(fresh.policies[..., IDS], 1 / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "kl"),
    [
        ([0.9, 0.1, 0.0], 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)),
        ([1.0, 0.0, 0.0], 0.5 * np.log(0.5 / 1.0) + 0.5 * np.log(0.5 / 1e-6)),
    ],
)
def test_the_divergence_by_hand(made, stored, kl):
    _, buffer, _ = made(
        stored=lambda output: (np.array(stored), 0.0), reanalyse_ratio=1.0, num_simulations=1
    )
    batch = buffer.sample(2)
    assert all(isinstance(revisit, Revisit) for revisit in batch.revisits)
    result = SimpleNamespace(target_policy=np.array([0.5, 0.5, 0.0]), value=0.0)
    plan = SimpleNamespace(result=result, taught=result.target_policy)
    plans = [plan] * len(batch.revisits)
    assert reanalyse(batch, lambda roots: plans, "sum")[1]["reanalyse_kl"] == pytest.approx(kl)
