"""A policy that plays beside its own training: the copy collection acts with, and snapshots."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

from priorzero.search.roots import Root

SECONDS = 30


def observation(state: int) -> np.ndarray:
    return np.random.default_rng(50 + state).normal(size=6).astype(np.float32)


def start() -> Root:
    return Root(np.stack([observation(0), observation(1)]), np.array([2]), np.array([0, 2, 5]))


@pytest.fixture
def policy(make_policy, randomise):
    """Untrained, with weights that tell roots apart and no noise in collection."""
    made = make_policy(
        root_prior=dict(mode="wm_logits"),
        root_policy="puct",
        root_noise_weight=0.0,
        num_simulations=12,
    )
    randomise(made.network, seed=3)
    return made


def change(policy, seed: int) -> None:
    """As an update does: the network's weights, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def collected(policy) -> tuple:
    (output,) = policy.collect_mode.forward([start()], 1.0, 0)
    return output.visit_counts.tolist(), output.root_value


def evaluated(policy) -> tuple:
    (output,) = policy.eval_mode.forward([start()], 0)
    return output.visit_counts.tolist(), output.root_value


def test_without_a_copy_collection_sees_every_update(policy):
    before = collected(policy)
    change(policy, 1)
    assert collected(policy) != before and policy.acting_version == 0


def test_collection_plays_with_what_was_offered_last(policy):
    untouched = evaluated(policy)
    policy.act_apart(7)
    assert collected(policy) == untouched and policy.acting_version == 7
    change(policy, 1)
    assert collected(policy) == untouched, "training moved the copy"

    policy.offer_weights(8)
    first = evaluated(policy)
    change(policy, 2)
    policy.offer_weights(9)
    second = evaluated(policy)
    change(policy, 3)
    assert policy.acting_version == 7, "they are taken over by a search, not before"
    assert collected(policy) == second and policy.acting_version == 9
    assert len({str(x) for x in (untouched, first, second, evaluated(policy))}) == 4


def test_weights_offered_during_a_search_wait_for_its_end(policy, monkeypatch):
    """The search is stopped in the middle, and meanwhile weights change and are offered."""
    policy.act_apart(0)
    before = evaluated(policy)
    inside, go = threading.Event(), threading.Event()
    network = type(policy.network)
    encode = network.encode

    def stopping(self, observations):
        found = encode(self, observations)
        inside.set()
        assert go.wait(SECONDS)
        return found

    monkeypatch.setattr(network, "encode", stopping)
    found: list = []
    search = threading.Thread(target=lambda: found.append(collected(policy)))
    search.start()
    assert inside.wait(SECONDS)
    change(policy, 1)
    policy.offer_weights(1)
    go.set()
    search.join()
    assert found == [before] and policy.acting_version == 0
    assert collected(policy) == evaluated(policy) and policy.acting_version == 1


def test_new_actions_are_named_in_the_copy_and_stay_named(policy, encoder):
    policy.act_apart(0)
    policy.offer_weights(1)
    (new,) = policy.register_actions(["sing"])  # after the weights were taken, before they arrive
    root = Root(observation(0)[None], np.array([]), np.array([0, new]))
    (acting,) = policy.collect_mode.forward([root], 1.0, 0)
    (own,) = policy.eval_mode.forward([root], 0)
    assert acting.root_value == own.root_value
    assert acting.visit_counts.tolist() == own.visit_counts.tolist()
    texts = {id(n): n.world_model.act_embedding_table.text[new].numpy() for n in policy._named}
    assert len(texts) == 3
    for text in texts.values():
        np.testing.assert_array_equal(text, encoder.encode(["sing"])[0])


def test_clamped_positions_of_both_are_counted(make_policy, randomise):
    deep = make_policy(root_prior=dict(mode="wm_logits"), num_simulations=60, num_unroll_steps=3)
    root = Root(observation(0)[None], np.array([]), np.array([0]))
    deep.eval_mode.forward([root], 0)
    once = deep.positions_clamped
    assert once > 0
    deep.act_apart(0)
    deep.collect_mode.forward([root], 1.0, 0)
    assert deep.positions_clamped == 2 * once


def test_a_snapshot_plays_as_the_policy_did_then(policy):
    expected = evaluated(policy)
    taken = policy.snapshot()
    state = copy.deepcopy(policy.learn_mode.state_dict())
    change(policy, 1)
    known = policy.vocabulary.size
    policy.register_actions(["a late command"])
    assert evaluated(taken) == expected != evaluated(policy)
    assert taken.vocabulary.size == known == policy.vocabulary.size - 1

    # And the other way round: what it meets stays with it.
    change(policy, 2)
    now = copy.deepcopy(policy.learn_mode.state_dict())
    with taken.guests():
        guest = taken.register_actions(["of the evaluation alone"])[0]
        assert guest == known
        taken.eval_mode.forward([Root(observation(0)[None], np.array([]), np.array([guest]))], 0)
    after = policy.learn_mode.state_dict()
    assert after["vocabulary"] == now["vocabulary"] != state["vocabulary"]
    for name in ("model", "target_model"):
        for key, value in now[name].items():
            assert torch.equal(after[name][key], value), (name, key)
    assert policy.vocabulary.id_of("of the evaluation alone") is None


def test_taking_a_snapshot_or_a_copy_draws_nothing(policy):
    before, own = torch.get_rng_state(), policy.learn_mode.state_dict()["rng"]
    policy.snapshot()
    policy.act_apart(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.learn_mode.state_dict()["rng"] == own


def test_nobody_sees_an_id_before_its_text(policy, encoder, monkeypatch):
    """A search asks which ids are in use while collection is in the middle of naming one."""
    inside, go, planned, seen = threading.Event(), threading.Event(), threading.Event(), []

    def slow(texts):
        inside.set()
        assert go.wait(SECONDS)
        return encoder.encode(texts)

    def plan(self, roots, inner_actions, *others):
        text = policy.network.world_model.act_embedding_table.text[inner_actions - 1]
        seen.append((inner_actions, bool(text.abs().sum() > 0)))
        planned.set()
        return []

    monkeypatch.setattr(type(policy._planner), "plan", plan)
    policy.attach_encoder(slow)
    naming = threading.Thread(target=lambda: policy.register_actions(["sing"]))
    naming.start()
    assert inside.wait(SECONDS)
    searching = threading.Thread(target=lambda: policy.eval_mode.forward([start()], 0))
    searching.start()
    planned.wait(0.5)
    go.set()
    naming.join()
    searching.join()
    assert seen == [(9, True)]
