"""PriorZeroPolicy: learning on a game with known values, planning contexts, targets, saving."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.data.segment import Segment, StepRecord
from priorzero.search.roots import Root
from priorzero.types import PriorZeroError, TextState
from priorzero.world_model.model import Unrolled
from priorzero.world_model.trainer import value_targets
from priorzero_policy import tempered

GAMMA = 0.9
# States 0..3; "action 0" leads on and earns 1 in state 3, which ends the game; "action 1" stays.
LENGTH = 4


def observation(state: int) -> np.ndarray:
    return np.random.default_rng(50 + state).normal(size=6).astype(np.float32)


def corridor_episode(number: int, rng) -> Segment:
    """A few steps on the spot, then through; the search's visits are right in every state: always
    "action 0".
    """
    segment, state, t = Segment(0, number, 100), 0, 0
    while state < LENGTH:
        forward = t >= 20 or rng.random() < 0.6
        reward = float(forward and state == LENGTH - 1)
        step = StepRecord(
            state=TextState(f"room {state}", ("action 0", "action 1")),
            observation=observation(state),
            valid_actions=("action 0", "action 1"),
            valid_ids=np.array([0, 1]),
            action_index=int(not forward),
            visit_counts=np.array([9.0, 1.0]),
            behaviour=np.array([0.6, 0.4]),
            target_policy=np.array([0.9, 0.1]),
            root_value=0.0,
            predicted_value=0.0,
            reward=reward,
            done_kind="terminated" if reward else "running",
            timestep=t,
        )
        state, t = state + forward, t + 1
        segment.record(
            step, observation(min(state, LENGTH)) if state < LENGTH else np.zeros(6, np.float32)
        )
    return segment


@pytest.fixture
def corridor(make_policy, make_buffer):
    """(policy, buffer) of a corridor; td_steps spans whole episodes, so every target is an exact
    return.
    """
    policy = make_policy(
        learning_rate=1e-3,
        batch_size=32,
        td_steps=30,
        discount_factor=GAMMA,
        weight_decay=0.0,
        target_update_theta=0.05,
        loss_weights=dict(entropy=0.0),
    )
    buffer, rng = make_buffer(policy), np.random.default_rng(0)
    buffer.push_game_segments([corridor_episode(n, rng) for n in range(30)])
    return policy, buffer


def learn(policy, buffer, updates: int) -> list[dict[str, float]]:
    log = []
    for _ in range(updates):
        batch = buffer.sample(policy.settings.batch_size)
        log.append(policy.learn_mode.forward(batch).metrics)
    return log


def mean(log, name: str) -> float:
    return float(np.mean([row[name] for row in log]))


def test_it_learns_a_game_whose_values_are_known(corridor, scalar_of):
    """From state s straight on, the return is 0.9 ** (3 - s); reward 1 for action 0 in state 3,
    else 0.
    """
    policy, buffer = corridor
    log = learn(policy, buffer, 500)
    first, last = log[:10], log[-10:]
    for name in ("policy_loss", "reward_loss", "value_loss", "value_error"):
        assert mean(last, name) < 0.6 * mean(first, name), name
    # The heads' and encoder's last layers start at zero, so there is no latent to predict at first:
    # it rises, then falls.
    assert mean(last, "latent_loss") < 0.5 * max(
        mean(log[i : i + 10], "latent_loss") for i in range(0, 290, 10)
    )
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert mean(last, "policy_loss") == pytest.approx(
        entropy, abs=0.05
    )  # it cannot go below the target's entropy
    assert mean(last, "target_policy_entropy") == pytest.approx(entropy, abs=1e-3)
    model = policy.network.eval()
    with torch.no_grad():
        path = torch.from_numpy(np.stack([observation(s) for s in range(LENGTH)]))[None]
        seen = model.unroll(model.encode(path), torch.zeros(1, LENGTH, dtype=torch.long))
        rewards, values = (scalar_of(x[0]).view(-1).numpy() for x in (seen.reward, seen.value))
        staying = model.unroll(model.encode(path), torch.ones(1, LENGTH, dtype=torch.long))
        stay = scalar_of(staying.reward[0])
    np.testing.assert_allclose(rewards, [0, 0, 0, 1], atol=0.25)
    np.testing.assert_allclose(stay.view(-1).numpy(), 0.0, atol=0.25)
    # The walks in the data dawdle, so a state's mean return is that of 1 / 0.6 steps per room.
    assert (np.diff(values) > 0).all()
    per_room = 0.6 * GAMMA / (1 - 0.4 * GAMMA)
    np.testing.assert_allclose(
        values, [per_room ** (LENGTH - s) / GAMMA for s in range(LENGTH)], atol=0.15
    )
    np.testing.assert_allclose(
        torch.softmax(seen.policy[0, :, :2], -1).numpy()[:, 0], 0.9, atol=0.06
    )


def test_priorities_are_the_value_errors_of_the_first_step(corridor, scalar_of):
    policy, buffer = corridor
    batch = buffer.sample(8)
    values = policy.target_network.values
    target = value_targets(batch, values, scalar_of, "target_network")[:, 0].numpy()
    priorities = policy.learn_mode.forward(batch).priorities
    # The value head starts at zero: it predicts 0 for every state whatever dropout does.
    np.testing.assert_allclose(priorities, np.abs(target), atol=1e-4)
    assert priorities.max() > 0.1


def test_the_loss_gets_the_targets_of_the_batch(corridor, monkeypatch, scalar_of):
    """Latent t is compared with the target encoder's latent of observation t + 1; masks and weights
    reach their terms.
    """
    from priorzero.world_model import trainer

    policy, buffer = corridor
    learn(policy, buffer, 2)
    batch, given = buffer.sample(8), {}
    real = trainer.world_model_loss

    def spy(outputs, targets, weights, group_size, loss_weights, *others):
        given.update(
            targets=targets, weights=weights, group_size=group_size, loss_weights=loss_weights
        )
        return real(outputs, targets, weights, group_size, loss_weights, *others)

    monkeypatch.setattr(trainer, "world_model_loss", spy)
    encoder = copy.deepcopy(policy.target_network.eval())
    batch = replace(batch, weights=np.linspace(0.1, 1.0, 8).astype(np.float32))
    policy.learn_mode.forward(batch)
    targets = given["targets"]
    for k in range(5):
        torch.testing.assert_close(
            targets.latent[:, k], encoder.encode(torch.from_numpy(batch.observations[:, k + 1]))
        )
    assert targets.latent.std() > 0
    for mask, name in (
        (targets.mask_latent, "mask_step"),
        (targets.mask_policy, "mask_step"),
        (targets.mask_reward, "mask_reward"),
        (targets.mask_value, "mask_value"),
    ):
        np.testing.assert_array_equal(mask.numpy(), getattr(batch, name))
    np.testing.assert_array_equal(targets.policy.numpy(), batch.policies)
    np.testing.assert_array_equal(given["weights"].numpy(), batch.weights)
    rewards = scalar_of(torch.log(targets.reward.flatten(0, 1) + 1e-12)).view(8, 5)
    np.testing.assert_allclose(rewards.numpy(), batch.rewards, atol=2e-3)
    assert given["loss_weights"].latent == 10.0 and given["group_size"] == 8
    assert targets.used_actions.tolist() == [i < 8 for i in range(12)]


def test_importance_weights_change_the_update(corridor):
    policy, buffer = corridor
    batch, start = buffer.sample(8), copy.deepcopy(policy.learn_mode.state_dict())
    moved = []
    for weights in (np.ones(8), np.linspace(0.05, 1.0, 8)):
        policy.learn_mode.load_state_dict(copy.deepcopy(start))
        torch.manual_seed(0)  # dropout
        batch = replace(batch, weights=weights.astype(np.float32))
        metrics = policy.learn_mode.forward(batch).metrics
        moved.append(
            (
                metrics["wm_loss"],
                policy.network.world_model.head_value.head_module[-1].weight.detach().clone(),
            )
        )
    assert moved[1][0] < 0.9 * moved[0][0]
    assert not torch.equal(moved[0][1], moved[1][1])


# ---- targets -------------------------------------------------------------------------------------


def state_index_values(observations, actions):
    """A target network whose value of a state is ten times the index in its observation."""
    assert actions.shape == observations.shape[:2]
    return 10.0 * observations[..., :1]


def indexed_buffer(buffer: PriorZeroGameBuffer, end: str) -> PriorZeroGameBuffer:
    """Five steps with rewards 1 2 3 4 5; observation i is [i, 0, …]; the search's own root values
    are 100 + i.
    """
    vectors = np.zeros((6, 6), dtype=np.float32)
    vectors[:, 0] = np.arange(6)
    segment = Segment(0, 0, 5)
    for t in range(5):
        segment.record(
            StepRecord(
                state=TextState("", ("action 0",)),
                observation=vectors[t],
                valid_actions=("action 0",),
                valid_ids=np.array([0]),
                action_index=0,
                visit_counts=np.array([1.0]),
                behaviour=np.array([1.0]),
                target_policy=np.array([1.0]),
                root_value=100.0 + t,
                predicted_value=0.0,
                reward=t + 1.0,
                done_kind=end if t == 4 else "running",
                timestep=t,
            ),
            vectors[t + 1],
        )
    buffer.push_game_segments([segment])
    return buffer


@pytest.mark.parametrize("end", ["terminated", "truncated"])
@pytest.mark.parametrize("bootstrap", ["target_network", "search"])
def test_value_targets_by_hand(make_policy, make_buffer, end, bootstrap):
    """Window from step 1, T = 5 steps, n = 2, gamma = 0.5."""
    policy = make_policy(td_steps=2, discount_factor=0.5)
    batch = indexed_buffer(make_buffer(policy), end).batch_of(
        np.array([1]), np.ones(1, dtype=np.float32)
    )
    v = (
        {i: 10.0 * i for i in range(6)}
        if bootstrap == "target_network"
        else {i: 100.0 + i for i in range(5)} | {5: 50.0}
    )
    over = end == "terminated"
    by_hand = [
        2 + 0.5 * 3 + 0.25 * v[3],
        3 + 0.5 * 4 + 0.25 * v[4],
        4 + 0.5 * 5 + (0 if over else 0.25 * v[5]),
        5 + (0 if over else 0.5 * v[5]),
        0.0,
    ]
    targets = value_targets(batch, state_index_values, lambda x: x, bootstrap)
    assert targets[0].tolist() == pytest.approx(by_hand)


def remembering_values(observations, actions):
    """Its value of state i, seen from state j on, is 10 i + 1000 j."""
    return state_index_values(observations, actions) + 1000.0 * observations[:, :1, :1]


@pytest.mark.parametrize(
    ("start", "by_hand"),
    [
        # T = 2, n = 2, one step of context, so sequences of 3 states; gamma = 0.5.
        # From s0 it holds s0 s1 s2, and s2 is seen from s0 on; s3 follows s1 s2.
        (0, [1 + 0.5 * 2 + 0.25 * 20.0, 2 + 0.5 * 3 + 0.25 * 1030.0]),
        # From s1 it holds s0 s1 s2: neither s3 nor s4 is there, they follow s2.
        (1, [2 + 0.5 * 3 + 0.25 * 2030.0, 3 + 0.5 * 4 + 0.25 * 2040.0]),
        # From s3 it holds s2 s3 s4; the last state s5, after a cut, follows s4.
        (3, [4 + 0.5 * 5 + 0.25 * 4050.0, 5 + 0.5 * 4050.0]),
    ],
)
def test_value_targets_with_burn_in_by_hand(make_policy, make_buffer, start, by_hand):
    policy = make_policy(
        num_unroll_steps=2, td_steps=2, context_steps=2, burn_in=1, discount_factor=0.5
    )
    buffer = indexed_buffer(make_buffer(policy), "truncated")
    batch = buffer.batch_of(np.array([start]), np.ones(1, dtype=np.float32))
    targets = value_targets(batch, remembering_values, lambda x: x, "target_network")
    assert targets[0].tolist() == pytest.approx(by_hand)


def walk(number: int, vectors: np.ndarray, lengths: list[int], reach: int, reward: float):
    """Segments of one episode through these states `[n + 1, 6]`, always by "action 0" of two, with
    one reward, at its end.
    """
    segments, t = [], 0
    for length in lengths:
        before = segments[-1].history(len(segments[-1]), reach) if segments else ()
        segments.append(Segment(0, number, length, before))
        for _ in range(length):
            over = t == sum(lengths) - 1
            step = StepRecord(
                state=TextState("", ("action 0", "action 1")),
                observation=vectors[t],
                valid_actions=("action 0", "action 1"),
                valid_ids=np.array([0, 1]),
                action_index=0,
                visit_counts=np.array([3.0, 1.0]),
                behaviour=np.array([0.75, 0.25]),
                target_policy=np.array([0.75, 0.25]),
                root_value=0.0,
                predicted_value=0.0,
                reward=reward if over else 0.0,
                done_kind="terminated" if over else "running",
                timestep=t,
            )
            segments[-1].record(step, vectors[t + 1])
            t += 1
    return segments


def test_what_is_trained_is_what_a_root_sees(make_policy, make_buffer, randomise, monkeypatch):
    """With burn_in = context_steps - 1 a window's first prediction is the search's own at the root
    of that state; the others are LightZero's forward over context and window.
    """
    from priorzero.world_model import trainer

    policy = make_policy(
        burn_in=2, td_steps=2, num_simulations=1, root_prior=dict(mode="wm_logits")
    )
    assert policy.network.world_model.pos_emb.weight.shape[0] == 2 * (5 + 2)
    network = randomise(policy.network, seed=4)
    monkeypatch.setattr(network, "train", lambda mode=True: network)  # no dropout to compare with

    vectors, buffer = np.stack([observation(t) for t in range(10)]), make_buffer(policy)
    segments = walk(0, vectors, [4, 5], 2, reward=1.0)
    buffer.push_game_segments(segments)
    batch, given = buffer.batch_of(np.arange(9), np.ones(9, dtype=np.float32)), {}
    real = trainer.world_model_loss

    def spy(outputs, targets, *others):
        given.update(outputs=Unrolled(*(x.detach() for x in outputs)), targets=targets)
        return real(outputs, targets, *others)

    def look(start, stop):
        """The last states' predictions, from s_start on."""
        with torch.no_grad():
            latents = network.encode(torch.from_numpy(vectors[start:stop])[None])
            return network.unroll(latents, torch.zeros(1, stop - start, dtype=torch.long))

    firsts = [max(0, t - 2) for t in range(9)]
    roots = [
        Root(vectors[first : t + 1], np.zeros(t - first, dtype=np.int64), np.array([0, 1]))
        for t, first in enumerate(firsts)
    ]
    planned = policy.eval_mode.forward(roots, 0)
    slow = [look(first, min(t + 5, 10)) for t, first in enumerate(firsts)]

    monkeypatch.setattr(trainer, "world_model_loss", spy)
    encoder = copy.deepcopy(policy.target_network)
    policy.learn_mode.forward(batch)
    outputs, targets = given["outputs"], given["targets"]
    for t, first in enumerate(firsts):
        known = min(5, 9 - t)
        for ours, full in zip(outputs, slow[t], strict=True):
            torch.testing.assert_close(
                ours[t, :known], full[0, t - first :][:known], atol=1e-5, rtol=0
            )
        log_wm = torch.log_softmax(outputs.policy[t, 0, :2], 0)
        np.testing.assert_allclose(planned[t].prior.log_wm, log_wm.numpy(), atol=1e-4)
        following = torch.from_numpy(vectors[t + 1 : t + 1 + known])
        torch.testing.assert_close(targets.latent[t, :known], encoder.encode(following))
    assert outputs.value.std() > 0.01


@pytest.mark.parametrize("burn_in", [0, 3])
def test_targets_that_remember(make_policy, make_buffer, burn_in):
    """Start A or B, then eight observations that are the same after both; reward 1 at the end
    after A only.

    A root with a context of 4 sees the start in s1, s2 and s3. Cold windows do not, but for those
    that begin there, and what they bootstrap from never does: the value head says the mean of both.
    With burn-in it tells them apart.
    """
    policy = make_policy(
        burn_in=burn_in,
        context_steps=4,
        num_unroll_steps=8,
        td_steps=3,
        discount_factor=0.95,
        learning_rate=3e-3,
        loss_weights=dict(latent=1.0, policy=0.0, value=5.0),
        batch_size=32,
        num_simulations=1,
        root_prior=dict(mode="wm_logits"),
    )
    buffer = make_buffer(policy)
    same = [observation(t) for t in range(1, 10)]
    starts = {"A": observation(40), "B": -observation(40)}
    for number, (name, start) in enumerate(starts.items()):
        states = np.stack([start, *same])
        buffer.push_game_segments(walk(number, states, [5, 4], 3, reward=float(name == "A")))
    learn(policy, buffer, 500)

    values = {}
    for name, start in starts.items():
        states = np.stack([start, *same])
        roots = [
            Root(states[: t + 1], np.zeros(t, dtype=np.int64), np.array([0, 1])) for t in (1, 2, 3)
        ]
        planned = policy.eval_mode.forward(roots, 0)
        values[name] = np.array([output.predicted_value for output in planned])

    if burn_in:
        # True values: 0.70, 0.74, 0.77 and 0.
        assert values["A"].min() > 0.45 and np.abs(values["B"]).max() < 0.15
    else:
        assert values["A"].max() < 0.6 and np.abs(values["A"] - values["B"]).max() < 0.2


def test_soft_update(corridor):
    policy, buffer = corridor
    learn(policy, buffer, 2)
    old = [p.detach().clone() for p in policy.target_network.parameters()]
    policy.learn_mode.forward(buffer.sample(8))
    theta, moved = policy.settings.target_update_theta, 0.0
    for before, online, now in zip(
        old, policy.network.parameters(), policy.target_network.parameters(), strict=True
    ):
        torch.testing.assert_close(
            now, (1 - theta) * before + theta * online.detach(), atol=1e-6, rtol=1e-5
        )
        moved += (now - before).abs().sum().item()
    assert moved > 0
    assert not any(p.requires_grad for p in policy.target_network.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(corridor):
    policy, buffer = corridor
    batch = buffer.sample(4)
    batch.observations[0, 0] = np.nan
    with pytest.raises(PriorZeroError, match="loss is nan.*learning_rate"):
        policy.learn_mode.forward(batch)


# ---- planning ------------------------------------------------------------------------------------


@pytest.fixture
def planner(make_policy, randomise):
    """A policy with drawn weights."""
    policy = make_policy(num_simulations=3, root_prior=dict(mode="wm_logits"))
    randomise(policy.network, seed=3)
    return policy


def root(*states: int, ids=(2, 5), action: int = 2) -> Root:
    """The last of these states, the others before it, always with the same action between them."""
    vectors = np.stack([observation(s) for s in states])
    return Root(vectors, np.full(len(states) - 1, action), np.array(ids))


def seen(output) -> list[float]:
    return [output.predicted_value, *output.prior.log_wm]


def test_outputs_follow_the_roots_and_do_not_depend_on_their_neighbours(planner):
    roots = [root(0, 1, 2), root(10, 11), root(12)]
    alone = [seen(planner.eval_mode.forward([r], 0)[0]) for r in roots]
    for order in ([0, 1, 2], [2, 0, 1]):
        together = planner.eval_mode.forward([roots[i] for i in order], 0)
        for output, i in zip(together, order, strict=True):
            np.testing.assert_allclose(seen(output), alone[i], atol=1e-5)
    assert not np.allclose(alone[0], seen(planner.eval_mode.forward([root(2)], 0)[0]), atol=1e-5)
    assert not np.allclose(
        alone[0], seen(planner.eval_mode.forward([root(0, 1, 2, action=5)], 0)[0]), atol=1e-5
    )


def test_planning_leaves_nothing_behind(planner):
    """The same root again, after others were planned from in both modes, and after a reset."""
    first = planner.eval_mode.forward([root(0, 1)], 0)[0]
    planner.collect_mode.forward([root(20, 21, 22)], 1.0, 0)
    planner.eval_mode.forward([root(30)], 0)
    planner.collect_mode.reset([0])
    planner.eval_mode.reset()
    again = planner.eval_mode.forward([root(0, 1)], 0)[0]
    assert seen(first) == seen(again) and first.root_value == again.root_value
    np.testing.assert_array_equal(first.visit_counts, again.visit_counts)


def test_a_root_never_remembers_old_weights(planner, randomise, scalar_of):
    """After a change of weights mid-episode, the root equals LightZero's full forward with the new
    weights.
    """
    planner.collect_mode.forward([root(0, 1)], 1.0, 0)
    model = randomise(planner.network, seed=77)
    value, *log_wm = seen(planner.collect_mode.forward([root(0, 1, 2)], 1.0, 0)[0])
    with torch.no_grad():
        path = torch.from_numpy(np.stack([observation(t) for t in range(3)]))[None]
        out = model.unroll(model.encode(path), torch.tensor([[2, 2, 0]]))
        expected = scalar_of(out.value[:, 2]).item()
        logits = torch.log_softmax(out.policy[0, 2, [2, 5]], 0)
    assert value == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(log_wm, logits.numpy(), atol=1e-4)


def test_collect_draws_from_the_tempered_visits_and_eval_takes_the_best(make_policy, randomise):
    policy = make_policy(num_simulations=12, root_prior=dict(mode="wm_logits"), root_policy="puct")
    randomise(policy.network, seed=3)
    start = root(0, ids=(5, 1, 3))
    for _ in range(5):
        out = policy.collect_mode.forward([start], 0.5, 0)[0]
        np.testing.assert_allclose(out.behaviour, out.visit_counts**2 / (out.visit_counts**2).sum())
        assert out.visit_counts.sum() == 12 and out.visit_counts[out.action_index] > 0
        assert out.target_policy.sum() == pytest.approx(1.0)
        best = policy.eval_mode.forward([start], 0)[0]
        assert best.visit_counts[best.action_index] == best.visit_counts.max()
        assert best.behaviour.tolist() == [float(i == best.action_index) for i in range(3)]
    drawn = set()
    rng = np.random.default_rng(0)
    for _ in range(40):
        out = policy.eval_mode.forward([start], 0, temperature=2.0, rng=rng)[0]
        np.testing.assert_allclose(
            out.behaviour, out.visit_counts**0.5 / (out.visit_counts**0.5).sum()
        )
        drawn.add(out.action_index)
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("counts", "temperature", "expected"),
    [
        ([4, 2, 2], 1.0, [0.5, 0.25, 0.25]),
        ([4, 2, 0], 0.5, [0.8, 0.2, 0.0]),
        ([4, 1, 1], 2.0, [0.5, 0.25, 0.25]),
        ([50, 49, 0], 1e-3, [1.0, 0.0, 0.0]),
    ],
)
def test_tempered_visits_by_hand(counts, temperature, expected):
    np.testing.assert_allclose(
        tempered(np.array(counts, dtype=float), temperature), expected, atol=1e-6
    )


# ---- vocabulary and saving -----------------------------------------------------------------------


def test_new_actions_are_named_in_both_networks(make_policy, encoder):
    policy = make_policy(actions=3)
    assert policy.register_actions(["open door", "action 1", "go north"]) == [3, 1, 4]
    texts = ["action 0", "action 1", "action 2", "open door", "go north"]
    for model in (policy.network, policy.target_network):
        np.testing.assert_array_equal(
            model.world_model.act_embedding_table.text[:5].numpy(), encoder.encode(texts)
        )
        assert model.world_model.act_embedding_table.text[5:].abs().sum() == 0
    table = policy.network.world_model.act_embedding_table
    expected = encoder.encode(["go north"])[0] @ table.projection.weight.detach().numpy().T
    np.testing.assert_allclose(
        table(torch.tensor([4]))[0].detach().numpy(), expected, atol=1e-6
    )  # residual: zero at first


@pytest.mark.parametrize("kind", ["stable", "positional"])
def test_guests_leave_vocabulary_and_networks_as_they_were(make_policy, kind):
    """Evaluation met commands of its own, and with them ids of training and both networks moved."""
    overflow = 2 if kind == "stable" else 1
    policy = make_policy(
        action_vocabulary=dict(kind=kind, capacity=12, overflow=overflow), num_simulations=3
    )
    before = copy.deepcopy(policy.learn_mode.state_dict())
    seen = [f"never seen {i}" for i in range(9)]  # more than there are ids left
    with policy.guests():
        inside = policy.register_actions(seen)
        ids = np.array([i for i in inside if i is not None])
        policy.eval_mode.forward([Root(observation(0)[None], np.array([]), ids)], 0)
        assert policy.vocabulary.state_dict() != before["vocabulary"]
    after = policy.learn_mode.state_dict()
    assert after["vocabulary"] == before["vocabulary"]
    for name in ("model", "target_model"):
        assert after[name].keys() == before[name].keys()
        for key, value in before[name].items():
            assert torch.equal(after[name][key], value), (name, key)
    # An error inside changes nothing about that, and afterwards actions are taken in as usual.
    with pytest.raises(RuntimeError), policy.guests():
        policy.register_actions(seen)
        raise RuntimeError
    assert policy.vocabulary.state_dict() == before["vocabulary"]
    assert policy.register_actions(seen) == inside


def test_guests_are_planned_with_as_if_they_had_been_registered(make_policy, randomise):
    outputs, commands = [], ["open door", "action 1", "sing"]
    for guests in (True, False):
        policy = make_policy(root_prior=dict(mode="wm_logits"))
        randomise(policy.network, seed=3)
        with policy.guests() if guests else nullcontext():
            ids = np.array(policy.register_actions(commands))
            start = Root(np.stack([observation(0), observation(1)]), ids[:1], ids)
            outputs.append(policy.eval_mode.forward([start], 0)[0])
    as_guests, registered = outputs
    np.testing.assert_array_equal(as_guests.visit_counts, registered.visit_counts)
    assert as_guests.root_value == registered.root_value
    assert as_guests.predicted_value == registered.predicted_value


def test_an_action_cannot_be_named_without_an_encoder(make_policy):
    policy = make_policy()
    policy.attach_encoder(None)
    with pytest.raises(AssertionError, match="attach_encoder"):
        policy.register_actions(["sing"])


def test_state_dict_round_trip(corridor, make_policy):
    policy, buffer = corridor
    learn(policy, buffer, 3)
    policy.register_actions(["a late command"])
    state = copy.deepcopy(policy.learn_mode.state_dict())
    other = make_policy(
        seed=5,
        actions=0,
        learning_rate=1e-3,
        batch_size=32,
        td_steps=30,
        discount_factor=GAMMA,
        weight_decay=0.0,
        loss_weights=dict(entropy=0.0),
    )
    inputs = torch.from_numpy(observation(1))[None, None], torch.tensor([[1]])

    def outputs(p):
        with torch.no_grad():
            return [
                model.eval().unroll(model.encode(inputs[0]), inputs[1])
                for model in (p.network, p.target_network)
            ]

    assert not torch.equal(outputs(policy)[0][0], outputs(other)[0][0])
    other.learn_mode.load_state_dict(state)
    for mine, theirs in zip(outputs(policy), outputs(other), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert other.vocabulary.ids(["a late command", "action 3"]) == policy.vocabulary.ids(
        ["a late command", "action 3"]
    )
    # The optimiser too: one more update from the same batch and dropout leaves the same weights.
    batch = buffer.sample(8)
    for p in (policy, other):
        torch.manual_seed(1)
        p.learn_mode.forward(batch)
    for a, b in zip(policy.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_learning_changes_only_ids_that_name_an_action(corridor):
    policy, buffer = corridor
    last = policy.network.world_model.head_policy.head_module[-1]
    learn(policy, buffer, 3)
    assert (
        last.weight[8:].abs().sum() == 0 and last.bias[8:].abs().sum() == 0
    )  # 8 actions registered, zero at the start
    assert last.weight[:8].abs().sum() > 0
