"""The faults of LightZero 0.2.0 that made us write our own parts: each shown on the stock class,
and absent in ours.

A test whose stock half stops failing after an upgrade of LightZero says that our replacement may no
longer be needed.
"""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ding.envs import BaseEnvTimestep
from easydict import EasyDict

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.data.segment import Segment, StepRecord
from priorzero.quiet import quiet_base
from priorzero.search.roots import Root
from priorzero.types import TextState

with quiet_base():
    from lzero.mcts.buffer.game_buffer_unizero import UniZeroGameBuffer
    from lzero.mcts.buffer.game_segment import GameSegment
    from lzero.model.unizero_model import UniZeroModel
    from lzero.policy import DiscreteSupport, phi_transform, scalar_transform
    from lzero.policy.unizero import UniZeroPolicy
    from lzero.worker.muzero_segment_collector import MuZeroSegmentCollector

V, UNROLL, TD, LENGTH = 12, 5, 2, 4


@pytest.fixture
def cfg(compiled_cfg, one_thread):
    """Our compiled settings, which the stock classes understand too; observations are
    6-dimensional.
    """
    policy = copy.deepcopy(
        compiled_cfg(
            num_unroll_steps=UNROLL,
            td_steps=TD,
            game_segment_length=LENGTH,
            num_segments=1,
            discount_factor=0.5,
            batch_size=4,
            env=dict(collector_env_num=2),
        ).policy
    )
    policy.update(
        reanalyze_ratio=0.0, use_root_value=False, mini_infer_size=100, reanalyze_outdated=False
    )
    return policy


def vector(index: float) -> np.ndarray:
    return np.full(6, index, dtype=np.float32)


def stock_segments(cfg, masks: list[list[int]]) -> list[GameSegment]:
    """One episode in segments of LENGTH, padded as `MuZeroSegmentCollector` pads them; state t has
    valid ids masks[t].
    """
    segments = []
    for start in range(0, len(masks), LENGTH):
        segment = GameSegment(None, game_segment_length=LENGTH, config=cfg)
        segment.reset([vector(start)])
        for t in range(start, min(start + LENGTH, len(masks))):
            mask = np.zeros(V, dtype=np.int8)
            mask[masks[t]] = 1
            segment.append(masks[t][0], vector(t + 1), float(t + 1), mask, -1, t)
            segment.store_search_stats([1] * len(masks[t]), 0.0)
        segments.append(segment)
    both = UNROLL + TD
    for last, following in zip(segments, segments[1:], strict=False):
        last.pad_over(
            following.obs_segment[1 : 1 + both],
            following.reward_segment[: both - 1],
            following.action_segment[:both],
            following.root_value_segment[:both],
            following.child_visit_segment[:both],
        )
    for segment in segments:
        segment.game_segment_to_array()
    return segments


def our_buffer(cfg, masks: list[list[int]], end: str) -> PriorZeroGameBuffer:
    """The same episode in our buffer."""
    buffer = PriorZeroGameBuffer(cfg.settings, 6, seed=0)
    for start in range(0, len(masks), LENGTH):
        segment = Segment(0, 0, LENGTH)
        for t in range(start, min(start + LENGTH, len(masks))):
            ids = np.asarray(masks[t])
            actions = tuple(f"a{i}" for i in ids)
            segment.record(
                StepRecord(
                    state=TextState("", actions),
                    observation=vector(t),
                    valid_actions=actions,
                    valid_ids=ids,
                    action_index=0,
                    visit_counts=np.ones(len(ids)),
                    behaviour=np.full(len(ids), 1 / len(ids)),
                    target_policy=np.full(len(ids), 1 / len(ids)),
                    root_value=0.0,
                    predicted_value=0.0,
                    reward=float(t + 1),
                    done_kind=end if t == len(masks) - 1 else "running",
                    timestep=t,
                ),
                vector(t + 1),
            )
        buffer.push_game_segments([segment])
    return buffer


def at(buffer, indices):
    return buffer.batch_of(np.asarray(indices), np.ones(len(indices), dtype=np.float32))


# ---- (a) windows over a segment's end ------------------------------------------------------------

VARIED = [[0, 1], [2], [0, 3, 4], [5, 6], [7], [1, 2, 3, 8], [9], [4, 5]]


def test_window_over_a_segments_end(cfg):
    """Stock: child visits are padded with the next segment's, action masks are not; the missing
    ones count as all ones.
    """
    stock = UniZeroGameBuffer(cfg)
    fixed = stock_segments(cfg, [list(range(V))] * 8)[0]
    context = stock._prepare_policy_non_reanalyzed_context([2], [fixed], [2])
    np.testing.assert_allclose(
        stock._compute_target_policy_non_reanalyzed(context, V), 1 / V
    )  # what it was made for
    segment = stock_segments(cfg, VARIED)[0]
    crossing = stock._prepare_policy_non_reanalyzed_context([2], [segment], [2])
    with pytest.raises(IndexError):
        stock._compute_target_policy_non_reanalyzed(crossing, V)

    batch = at(our_buffer(cfg, VARIED, "terminated"), [2, 3])
    for row, start in enumerate((2, 3)):
        for k in range(UNROLL):
            ids = VARIED[start + k]
            assert np.flatnonzero(batch.policies[row, k]).tolist() == ids
            assert batch.policies[row, k, ids].tolist() == pytest.approx([1 / len(ids)] * len(ids))
    assert batch.mask_step.min() == 1.0


def test_steps_of_a_window_beyond_its_segment_do_not_train_in_the_stock_buffer(cfg, monkeypatch):
    """With equal masks it does not crash, but masks out what it padded; after a true end it trains
    nothing.
    """
    same = [[0, 1]] * 8
    stock, segments = UniZeroGameBuffer(cfg), stock_segments(cfg, same)
    monkeypatch.setattr(
        stock, "_sample_orig_data", lambda n: (segments[:1], [3], [3], [1.0], [0.0])
    )
    monkeypatch.setattr(stock, "get_num_of_transitions", lambda: 8)
    *_, current = stock._make_batch(1, 0.0)
    assert current[3][0].tolist() == [1, 0, 0, 0, 0, 0]
    batch = at(our_buffer(cfg, same, "terminated"), [3, 7])
    assert batch.mask_step[0].tolist() == [1, 1, 1, 1, 1]
    assert batch.mask_value[1].tolist() == [1, 1, 1, 1, 1] and batch.mask_step[1].tolist() == [
        1,
        0,
        0,
        0,
        0,
    ]


# ---- (b) bootstrap of values and targets of latents ----------------------------------------------


class ReadsTheIndex:
    """A stock `UniZeroModel` whose value of a state is the index written in its observation."""

    def __init__(self, cfg) -> None:
        with quiet_base():
            self.model = UniZeroModel(
                6, V, world_model_cfg=cfg.model.world_model_cfg, norm_type="LN"
            )
        support, wm = DiscreteSupport(-10, 10, delta=1), self.model.world_model
        wm.obs_per_embdding_dim = 6
        wm.tokenizer.encode_to_obs_embeddings = lambda x: x.reshape(-1, 1, 6).float()

        def forward(inputs, start_pos=0):
            latents, actions = inputs["obs_embeddings_and_act_tokens"]
            index = latents.reshape(latents.shape[0], -1, 6)[..., 0]
            value = torch.log(phi_transform(support, scalar_transform(index.clone())) + 1e-12)
            return EasyDict(
                output_sequence=None,
                logits_observations=None,
                logits_rewards=None,
                logits_policy=torch.zeros(*index.shape, V),
                logits_value=value,
            )

        wm.forward = forward


def stock_value_targets(cfg, segment, position):
    stock = UniZeroGameBuffer(cfg)
    context = stock._prepare_reward_value_context([0], [segment], [position], 8)
    actions = segment.action_segment[position + TD : position + TD + UNROLL].tolist()
    actions += [0] * (UNROLL - len(actions))
    _, values = stock._compute_target_reward_value(
        context, ReadsTheIndex(cfg).model, np.array([actions]), np.zeros((1, UNROLL))
    )
    return values[0]


def n_step(t: int) -> float:
    """Reward of step t is t + 1, discount 0.5, two steps, and a state's value is its index."""
    return (t + 1) + 0.5 * (t + 2) + 0.25 * (t + 2)


def test_the_stock_bootstrap_is_aligned_except_for_a_last_value_that_is_a_copy(cfg):
    """Upstream later mended a bootstrap that is off by one. In 0.2.0 the T values the learner uses
    are aligned.

    What is off by one is target T + 1: its bootstrap is that of target T once more. The learner
    drops it.
    """
    segment = stock_segments(cfg, [[0, 1]] * 12)[0]
    values = stock_value_targets(cfg, segment, 0)
    assert values[:UNROLL] == pytest.approx([n_step(t) for t in range(UNROLL)], abs=0.02)
    off_by_one = n_step(UNROLL) - 0.25
    assert values[UNROLL] == pytest.approx(off_by_one, abs=0.02)

    batch = at(our_buffer(cfg, [[0, 1]] * 12, "terminated"), [0])
    bootstrap = batch.bootstrap_observations[0, batch.bootstrap_index[0], 0]
    assert (batch.returns + batch.discounts * bootstrap)[0] == pytest.approx(
        [n_step(t) for t in range(UNROLL)]
    )


def test_the_stock_buffer_takes_a_truncation_for_the_end_of_the_game(cfg):
    """Last segment of an episode cut at step 8: the state after it exists, but its value counts as
    zero.
    """
    last = stock_segments(cfg, [[0, 1]] * 8)[1]
    values = stock_value_targets(
        cfg, last, 2
    )  # steps 6 and 7; step 6 should bootstrap from state 8
    assert values[0] == pytest.approx(7 + 0.5 * 8, abs=0.02)
    for end, expected in (("truncated", 7 + 0.5 * 8 + 0.25 * 8), ("terminated", 7 + 0.5 * 8)):
        batch = at(our_buffer(cfg, [[0, 1]] * 8, end), [6])
        bootstrap = batch.bootstrap_observations[0, batch.bootstrap_index[0], 0]
        assert (batch.returns + batch.discounts * bootstrap)[0, 0] == pytest.approx(expected)


# ---- (c) importance weights and priorities -------------------------------------------------------


@pytest.fixture
def stock_policy(cfg, randomise):
    """LightZero's own UniZero policy on the same settings."""
    settings = copy.deepcopy(cfg)
    settings.update(
        num_simulations=3,
        use_augmentation=False,
        accumulation_steps=1,
        multi_gpu=False,
        analysis_sim_norm=False,
        cos_lr_scheduler=False,
        piecewise_decay_lr_scheduler=False,
        mcts_ctree=True,
    )
    settings.model.world_model_cfg.num_simulations = 3
    settings.model.update(
        type="UniZeroModel",
        import_names=["lzero.model.unizero_model"],
        self_supervised_learning_loss=True,
    )
    with quiet_base():
        torch.manual_seed(0)
        model = UniZeroModel(6, V, world_model_cfg=settings.model.world_model_cfg, norm_type="LN")
        randomise(model, seed=1)
        model.world_model.precompute_pos_emb_diff_kv()
        return UniZeroPolicy(settings, model=model)


def stock_batch(weights):
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(V), size=(4, UNROLL + 1))
    current = [
        rng.normal(size=(4, 6 * (UNROLL + 1))).astype(np.float32),
        rng.integers(V, size=(4, UNROLL)),
        rng.integers(V, size=(4, UNROLL)),
        np.ones((4, UNROLL + 1)),
        np.arange(4),
        np.asarray(weights),
        np.zeros(4),
        np.zeros((4, UNROLL), dtype=np.int64),
    ]
    return [
        current,
        [rng.normal(size=(4, UNROLL + 1)), rng.normal(size=(4, UNROLL + 1)), policy],
        0,
    ]


def test_stock_importance_weights_have_no_effect(stock_policy):
    """Ours: tests/test_policy.py and tests/world_model/test_loss.py show that they have one."""
    start = copy.deepcopy(stock_policy._state_dict_learn())
    losses, weights = [], []
    for sample_weights in ([1.0, 1.0, 1.0, 1.0], [1.0, 0.01, 0.01, 0.01]):
        stock_policy._load_state_dict_learn(copy.deepcopy(start))
        torch.manual_seed(0)  # dropout
        with quiet_base():
            log = stock_policy._forward_learn(stock_batch(sample_weights))
        losses.append(log["weighted_total_loss"])
        weights.append(
            torch.cat([p.detach().flatten() for p in stock_policy._learn_model.parameters()])
        )
    assert losses[0] == losses[1] and torch.equal(weights[0], weights[1])
    # Its training loop would now read the new priorities from here.
    assert "value_priority_orig" not in log


def test_stock_priorities_are_never_updated(cfg):
    """The stock buffer looks for indices where UniZero's batch has weights, and for times where it
    has time steps.
    """
    stock = UniZeroGameBuffer(cfg)
    stock.game_pos_priorities = np.ones(6)
    batch = stock_batch([0.3, 0.4, 0.5, 1.0])
    batch[0][-1] += (
        1  # time steps: the check against the buffer's clearing time compares with these
    )
    with pytest.raises((IndexError, ValueError, TypeError)):
        stock.update_priority(batch, np.array([9.0, 9.0, 9.0, 9.0]))
    assert stock.game_pos_priorities.tolist() == [1.0] * 6

    cfg.settings = dataclasses.replace(cfg.settings, use_priority=True, priority_prob_alpha=1.0)
    ours = our_buffer(cfg, [[0, 1]] * 8, "terminated")
    ours.update_priority(np.array([1, 6]), np.array([900.0, 500.0], dtype=np.float32))
    seen = np.bincount(ours.draw(20_000)[0], minlength=8) / 20_000
    assert seen[[1, 6]] == pytest.approx([900 / 1406, 500 / 1406], abs=0.02)


# ---- (d) caches per environment, and apart for evaluation ----------------------------------------


def stock_step(policy, mode: str, seen: dict[int, float]) -> dict[int, float]:
    """Predicted value per environment; the only valid action is id 2, so the path is certain."""
    mask = np.zeros((len(seen), V), dtype=np.int8)
    mask[:, 2] = 1
    data = torch.from_numpy(np.stack([observation(i) for i in seen.values()]))
    arguments = dict(
        action_mask=mask,
        to_play=[-1] * len(seen),
        ready_env_id=list(seen),
        timestep=np.zeros((len(seen), 1)),
    )
    with quiet_base():
        forward = policy._forward_eval if mode == "eval" else policy._forward_collect
        out = forward(data, **arguments)
    return {env: float(out[env]["predicted_value"][0]) for env in seen}


def observation(index: float) -> np.ndarray:
    return np.random.default_rng(int(index)).normal(size=6).astype(np.float32)


def fresh(policy) -> None:
    with quiet_base():
        policy._reset_collect(reset_init_data=True)
        policy._collect_model.world_model.clear_caches()


def our_values(mode: str, policy, roots: list[Root]) -> list[float]:
    if mode == "eval":
        return [out.predicted_value for out in policy.eval_mode.forward(roots, 0)]
    return [out.predicted_value for out in policy.collect_mode.forward(roots, 1.0, 0)]


def our_root(*past: float) -> Root:
    """The last of these states, action 2 taken between them."""
    vectors = np.stack([observation(i) for i in past])
    return Root(vectors, np.full(len(past) - 1, 2), np.array([2]))


def test_stock_caches_go_by_row_not_by_environment(stock_policy, make_policy, randomise):
    """Environments 0 and 1 play a step; then only 1 is ready. Its root must not depend on what 0
    saw before.
    """
    answers = []
    for others_past in (10, 20):
        fresh(stock_policy)
        stock_step(stock_policy, "collect", {0: others_past, 1: 30})
        answers.append(stock_step(stock_policy, "collect", {1: 31})[1])
    assert abs(answers[0] - answers[1]) > 1e-4

    policy = make_policy(root_prior=dict(mode="wm_logits"))
    randomise(policy.network, seed=1)
    ours = []
    for others_past in (10, 20):
        our_values("collect", policy, [our_root(others_past), our_root(30)])
        ours += our_values("collect", policy, [our_root(30, 31)])
    beside = our_values("collect", policy, [our_root(10, 11), our_root(30, 31)])[1]
    assert ours == pytest.approx([beside, beside], abs=1e-6)


def test_stock_evaluation_disturbs_collection(stock_policy, make_policy, randomise):
    """The same two steps of collection, with and without an evaluation step in between."""
    answers = []
    for evaluate in (False, True):
        fresh(stock_policy)
        stock_step(stock_policy, "collect", {0: 10, 1: 30})
        if evaluate:
            stock_step(stock_policy, "eval", {0: 40, 1: 50})
        answers.append(stock_step(stock_policy, "collect", {0: 11, 1: 31}))
    assert max(abs(answers[0][e] - answers[1][e]) for e in (0, 1)) > 1e-4

    policy = make_policy(root_prior=dict(mode="wm_logits"))
    randomise(policy.network, seed=1)
    roots, ours = [our_root(10, 11), our_root(30, 31)], []
    for evaluate in (False, True):
        if evaluate:
            our_values("eval", policy, [our_root(40), our_root(50)])
        ours.append(our_values("collect", policy, roots))
    assert ours[0] == pytest.approx(ours[1], abs=1e-6)


# ---- (e) the sliding window ----------------------------------------------------------------------


@torch.no_grad()
def test_stock_cached_inference_drifts_once_the_window_slides(
    compiled_cfg, randomise, make_policy, scalar_of
):
    """One environment, eight steps, a context of 3 steps: against a full forward over the steps
    still in the window.

    The stock cache subtracts position embeddings from keys and values, but those went through
    LayerNorm first, and the second layer's keys have seen steps that are no longer in the window.
    Ours recomputes the window.
    """
    policy = make_policy(root_prior=dict(mode="wm_logits"))
    ours = randomise(policy.network, seed=1)
    cfg = copy.deepcopy(compiled_cfg().policy.model.world_model_cfg)
    cfg.env_num = 1
    with quiet_base():
        stock = UniZeroModel(6, V, world_model_cfg=cfg, norm_type="LN")
        randomise(stock, seed=1)
        stock.world_model.precompute_pos_emb_diff_kv()
    wm, drift, own_drift = stock.world_model, [], []
    seen = [torch.from_numpy(observation(60 + t)) for t in range(8)]
    taken = [3, 1, 4, 1, 5, 2, 6, 5]
    for t in range(8):
        out = stock.initial_inference(
            seen[t - 1][None] if t else seen[0][None] * 0,
            [taken[t - 1]] if t else [-1],
            seen[t][None],
            np.zeros((1, 1)),
        )
        errors = []
        for steps in range(1, t + 2):  # whatever window it may stand for, the best match counts
            latents = wm.tokenizer.encode_to_obs_embeddings(
                torch.stack(seen[t - steps + 1 : t + 1])[None]
            )
            if 2 * steps > cfg.max_tokens:
                break
            actions = torch.tensor([taken[t - steps + 1 : t] + [0]])[..., None]
            full = wm.forward(
                {"obs_embeddings_and_act_tokens": (latents.view(1, steps, 1, -1), actions)},
                start_pos=torch.zeros(1, 1, dtype=torch.long),
            )
            errors.append((out.value[0] - full.logits_value[0, -1]).abs().max().item())
        drift.append(min(errors))

        window = range(max(t - 2, 0), t + 1)
        path = torch.stack([seen[i] for i in window])
        acted = np.array([taken[i] for i in window])
        root = Root(path.numpy(), acted[:-1], acted[-1:])
        mine = policy.collect_mode.forward([root], 1.0, 0)[0].predicted_value
        full = ours.unroll(ours.encode(path[None]), torch.from_numpy(acted)[None])
        own_drift.append(abs(mine - scalar_of(full.value[:, -1]).item()))
    assert max(drift[:2]) < 1e-4  # while nothing has been dropped the cache is exact
    assert max(drift[4:]) > 1e-3  # afterwards it equals no window at all
    assert max(own_drift) < 1e-4


# ---- (f) the segment collector -------------------------------------------------------------------


class CountingEnvs:
    """One environment; at step t only action t is valid."""

    env_num, action_space = 1, SimpleNamespace(n=V)

    def __init__(self) -> None:
        self.t = 0

    def launch(self):
        pass

    reset = close = launch

    def _observation(self):
        mask = np.zeros(V, dtype=np.int8)
        mask[self.t % V] = 1
        return {
            "observation": vector(self.t),
            "action_mask": mask,
            "to_play": -1,
            "timestep": self.t,
        }

    @property
    def ready_obs(self):
        return {0: self._observation()}

    def step(self, actions):
        self.t += 1
        return {0: BaseEnvTimestep(self._observation(), 0.0, False, {})}


def test_the_stock_collector_plans_every_step_with_the_first_steps_mask(cfg, tmp_path, monkeypatch):
    """Ours: tests/test_collector.py asserts mask, actions and time step of every decision."""
    monkeypatch.chdir(tmp_path)  # it writes a log folder
    settings = copy.deepcopy(cfg)
    settings.update(
        collect_with_pure_policy=False,
        gumbel_algo=False,
        sampled_algo=False,
        ignore_done=False,
        type="fake",
        use_ture_chance_label_in_chance_encoder=False,
    )
    planned = []

    class Policy:
        def get_attribute(self, name):
            return settings

        def reset(self, *args, **kwargs):
            pass

        def forward(
            self, observations, action_mask, temperature, to_play, epsilon, ready_env_id, timestep
        ):
            planned.append(
                (float(observations.flatten()[0]), int(np.argmax(action_mask[0])), int(timestep[0]))
            )
            return {
                0: dict(
                    action=int(np.argmax(action_mask[0])),
                    searched_value=0.0,
                    predicted_value=0.0,
                    visit_count_distributions=[1],
                    visit_count_distribution_entropy=0.0,
                    timestep=timestep[0],
                )
            }

    with quiet_base():
        log = SimpleNamespace(flush=lambda: None, close=lambda: None)
        collector = MuZeroSegmentCollector(
            env=CountingEnvs(),
            policy=Policy(),
            tb_logger=log,
            exp_name="exp",
            policy_config=settings,
        )
        # A segment is handed out when the next one is full, so two of them are played.
        collector.collect(
            num_segments=1, train_iter=0, policy_kwargs=dict(temperature=1.0, epsilon=0.0)
        )
    states, masks, timesteps = zip(*planned, strict=True)
    assert list(states) == [float(t) for t in range(len(planned))] and len(planned) >= 2 * LENGTH
    assert set(masks) == {0} and set(timesteps) == {
        0
    }  # every state, planned with the mask and time of state 0


# ---- (g) the tree ignores the prior on a node's first visit --------------------------------------


def test_stock_tree_ignores_the_prior_at_first_and_no_seed_reproduces_it():
    """One simulation from one root whose prior gives 97 % to action 5: LightZero's tree takes any
    of the 12.
    """
    from priorzero.search.rules import puct
    from priorzero.search.tree import Tree

    with quiet_base():
        from lzero.mcts.ctree.ctree_muzero import mz_tree
    prior = np.full(12, 0.03 / 11)
    prior[5] = 0.97
    taken = set()
    for _ in range(60):
        roots = mz_tree.Roots(1, [list(range(12))])
        roots.prepare_no_noise([0.0], [np.log(prior).tolist()], [-1])
        stats = mz_tree.MinMaxStatsList(1)
        stats.set_delta(0.01)
        taken.add(
            mz_tree.batch_traverse(
                roots, 19652, 1.25, 0.99, stats, mz_tree.ResultsWrapper(num=1), [-1]
            )[2][0]
        )
    assert len(taken) > 3
    valid = np.ones((1, 12), dtype=bool)
    ours = {
        int(Tree(prior[None], valid, np.zeros(1), 2, 0.99).select(puct, puct)[1][0])
        for _ in range(60)
    }
    assert ours == {5}
