"""Gumbel root policy: against mctx's own searches, and what it promises for few simulations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from priorzero.search.fused.cpu import CompiledTree
from priorzero.search.root_policies import gumbel
from priorzero.search.root_prior import RootPrior
from priorzero.search.roots import Root
from priorzero.settings.policy import GumbelSettings, PolicySettings

RECORDED = json.loads(Path(__file__).with_name("gumbel_cases.json").read_text(encoding="utf-8"))
K, STATES, DISCOUNT = RECORDED["actions"], RECORDED["states"], RECORDED["discount"]


class GivenNoise:
    """In place of a generator: hands out recorded Gumbel noise, root after root."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self._left = np.concatenate(rows)

    def gumbel(self, size: int) -> np.ndarray:
        assert size <= len(self._left)
        given, self._left = self._left[:size], self._left[size:]
        return given


def roots_of(log_priors: list[np.ndarray], ids: list[np.ndarray]) -> tuple[list, list]:
    roots = [Root(np.zeros((1, 2), np.float32), np.zeros(0, np.int64), i) for i in ids]
    return roots, [RootPrior(p, p, None, 0.0) for p in log_priors]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def settings_for(simulations: int, considered: int, smallest_range: float = 1e-8):
    method = GumbelSettings(max_considered_actions=considered, smallest_range=smallest_range)
    return PolicySettings(num_simulations=simulations, discount_factor=DISCOUNT, gumbel=method)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda c: f"{c['simulations']}-{c['considered']}"
)
def test_it_searches_as_mctx_does(case, compiled):
    rewards, values, logits = (np.asarray(case[x]) for x in ("rewards", "values", "logits"))
    valid = ~np.asarray(case["invalid"], dtype=bool)
    ids = [np.flatnonzero(v) for v in valid]
    states = [[s] for s in case["roots"]]  # per root: the state of each node
    roots, priors = roots_of(
        [log_softmax(logits[s[0], i]) for s, i in zip(states, ids, strict=True)], ids
    )
    noise = GivenNoise([np.asarray(g)[i] for g, i in zip(case["gumbel"], ids, strict=True)])
    search = gumbel.begin(
        roots,
        priors,
        values[case["roots"]],
        K,
        settings_for(case["simulations"], case["considered"]),
        noise,
    )
    if compiled:
        search = CompiledTree(search, gumbel.fused(search))

    for _ in range(case["simulations"]):
        parents, actions = search.select()
        here = [nodes[p] for nodes, p in zip(states, parents, strict=True)]
        following = [(s * K + a + 1) % STATES for s, a in zip(here, actions, strict=True)]
        for nodes, state in zip(states, following, strict=True):
            nodes.append(int(state))
        search.expand(rewards[here, actions], values[following], logits[following])

    for row, result in enumerate(search.results()):
        np.testing.assert_array_equal(
            result.visit_counts, np.asarray(case["visits"])[row, ids[row]]
        )
        np.testing.assert_allclose(
            result.target_policy, np.asarray(case["improved"])[row, ids[row]], atol=2e-4
        )
        assert ids[row][result.choice] == case["action"][row]
        assert result.value == pytest.approx(case["root_value"][row], abs=1e-4)


@pytest.mark.parametrize("actions, simulations", [(10, 16), (60, 16), (60, 50)])
def test_without_a_value_signal_the_target_is_the_prior(actions, simulations):
    """Eight generations, each policy the mean target of the one before: nothing is lost, where
    visit counts of 60 actions and 16 simulations lose 53 of them."""
    rng = np.random.default_rng(0)
    settings = settings_for(simulations, 16, smallest_range=0.01)
    policy = log_softmax(rng.normal(scale=0.3, size=actions))
    first = np.exp(policy)
    for _ in range(8):
        roots, priors = roots_of([policy] * 8, [np.arange(actions)] * 8)
        search = gumbel.begin(roots, priors, np.zeros(8), actions, settings, rng)
        for _ in range(simulations):
            search.select()
            search.expand(np.zeros(8), np.zeros(8), np.zeros((8, actions)))
        policy = np.log(np.mean([r.target_policy for r in search.results()], axis=0))
    np.testing.assert_allclose(np.exp(policy), first, rtol=1e-9)


def test_the_target_prefers_what_pays_and_the_choice_follows_it():
    rng = np.random.default_rng(1)
    roots, priors = roots_of([log_softmax(np.zeros(8))] * 50, [np.arange(8)] * 50)
    search = gumbel.begin(roots, priors, np.zeros(50), 8, settings_for(16, 16, 0.01), rng)
    for _ in range(16):
        parents, actions = search.select()
        pays = (parents == 0) & (actions == 3)
        search.expand(pays.astype(float), np.zeros(50), np.zeros((50, 8)))
    results = search.results()
    assert all(r.target_policy.argmax() == 3 for r in results)
    assert np.mean([r.choice == 3 for r in results]) > 0.9


@pytest.mark.parametrize("considered, simulations", [(1, 5), (4, 16), (16, 16), (16, 50), (3, 7)])
def test_halving_visits_each_round_equally(considered, simulations):
    schedule = gumbel.considered_visits(considered, simulations)
    assert len(schedule) == simulations
    # Replayed on actions whose order never changes, the counts differ by whole rounds only.
    visits = np.zeros(considered, dtype=int)
    for wanted in schedule:
        action = int(np.flatnonzero(visits == wanted)[0])
        visits[action] += 1
    assert (np.diff(visits) <= 0).all() and visits.sum() == simulations
