"""Collector: on a scripted game whose every answer is known, and on a real TextWorld game."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest

from priorzero.games.group import GameEnvGroup
from priorzero.llm.update.samples import build_sample
from priorzero.settings.policy import RootPriorSettings
from priorzero.types import HistoryItem, PriorZeroError
from priorzero_collector import PriorZeroCollector
from tests.playing import FakePrior, ScriptedEnv, logprobs, make_watched, told_actions

SIZES = dict(
    num_simulations=4,
    action_vocabulary=dict(capacity=64, overflow=4),
    game_segment_length=4,
)


@pytest.fixture
def parts(compiled_cfg, encoder, one_thread):
    """(collector, envs, prior, policy) on scripted environments."""
    groups = []

    def make(
        envs=None,
        prior: FakePrior | None | str = "fake",
        history_length=2,
        llm_target_prior="mixture",
        **settings,
    ):
        cfg = compiled_cfg(**SIZES)
        policy = make_watched(cfg, encoder, **settings)
        group = GameEnvGroup(envs or [ScriptedEnv(i) for i in range(3)], seed=0)
        groups.append(group)
        prior = FakePrior() if prior == "fake" else prior
        collector = PriorZeroCollector(
            cfg.policy.settings,
            policy,
            group,
            encoder,
            prior,
            history_length=history_length,
            seed=0,
            llm_target_prior=llm_target_prior,
        )
        return SimpleNamespace(collector=collector, envs=group.envs, prior=prior, policy=policy)

    yield make
    for group in groups:
        group.close()


def collect(parts, num_segments: int, env_steps: int = 0):
    return parts.collector.collect(num_segments, env_steps, 1.0)


async def test_segments_carry_what_was_played(parts, encoder):
    made = parts()
    result = await collect(made, 6)
    assert result.transitions == sum(len(s) for s in result.segments) and len(result.segments) >= 6

    seen = set()
    for segment in result.segments:
        env = made.envs[segment.env_id]
        mine = {s.episode_id for s in result.segments if s.env_id == segment.env_id}
        episode = sorted(mine).index(segment.episode_id)
        text = f"env {segment.env_id} episode {episode + 1} step "
        for step in segment.steps:
            t = step.timestep
            assert step.state.observation == text + str(t)
            assert step.state.goal == f"goal {segment.env_id}"
            assert step.state.valid_actions == step.valid_actions == told_actions(segment.env_id, t)
            assert step.state.score == sum(range(t + 1))
            assert step.action == env.played[episode][t] and step.reward == t + 1
            np.testing.assert_array_equal(step.observation, encoder.encode([text + str(t)])[0])
            names = [made.policy.vocabulary.action_of(i) for i in step.valid_ids]
            assert names == list(step.valid_actions)

            # The search's record.
            assert step.visit_counts.sum() == 4
            assert len(step.visit_counts) == len(step.valid_actions)
            assert step.behaviour.sum() == pytest.approx(1)
            assert step.behaviour[step.action_index] > 0
            assert step.target_policy.sum() == pytest.approx(1)
            assert np.isfinite([step.root_value, step.predicted_value]).all()

            # The LLM's answer, and what it was asked.
            told = tuple(logprobs(text + str(t), a) for a in step.valid_actions)
            assert step.scores.token_logprobs == told
            assert step.scores.weights_version == FakePrior.VERSION
            asked = made.prior.told[step.request.body_ids[0]]
            assert asked == (text + str(t), step.valid_actions)

            # The two steps before, oldest first, as they were played.
            assert step.done_kind == ("terminated" if t == 5 else "running")
            assert step.state.history == tuple(
                HistoryItem(text + str(p), env.played[episode][p], p + 1.0)
                for p in range(max(t - 2, 0), t)
            )
            seen.add((segment.env_id, episode, t))

        # Segments are cut at 4 steps or at the end, and the last state is the next step's.
        assert [s.timestep for s in segment.steps] in ([0, 1, 2, 3], [4, 5])
        after = text + str(segment.steps[-1].timestep + 1)
        np.testing.assert_array_equal(segment.final_observation, encoder.encode([after])[0])
        # The choice differs from step to step.
        assert len({len(s.valid_actions) for s in segment.steps}) > 1

    assert len(seen) == result.transitions
    # All environments in one request, every step.
    assert set(made.prior.calls) == {3}
    assert result.steps == 3 * len(made.prior.calls)


async def test_a_segment_remembers_what_its_first_root_saw(parts):
    """Three steps are planned from: the present one and the two before, across segments too."""
    made = parts(prior=None)
    result = await collect(made, 9)
    roots = [root for (given, *_), _ in made.policy.calls for root in given]
    by_last = {root.observations[-1].tobytes(): root for root in roots}

    reached = set()
    for segment in result.segments:
        for position, step in enumerate(segment.steps):
            before = segment.history(position, 2)
            root = by_last[step.observation.tobytes()]
            seen = np.stack([*(s.observation for s in before), step.observation])
            np.testing.assert_array_equal(root.observations, seen)
            assert root.actions.tolist() == [s.action_id for s in before]
            reached.add((position, len(before)))
    assert reached >= {(0, 0), (0, 2), (1, 1), (1, 2), (3, 2)}


async def test_each_text_is_encoded_once_and_each_prompt_built_once(parts, encoder, monkeypatch):
    asked: list[str] = []
    real = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: asked.extend(texts) or real(texts))
    made = parts()
    result = await collect(made, 6)
    states = [text for text in asked if text.startswith("env ")]
    assert len(states) == len(set(states)) > 12
    assert len(made.prior.told) == result.steps


async def test_unfinished_segments_go_on_in_the_next_call(parts):
    made = parts([ScriptedEnv(0, length=10), ScriptedEnv(1, length=3)])
    first, second = await collect(made, 1), await collect(made, 3)
    assert [s.env_id for s in first.segments] == [1]
    mine = [s for s in second.segments if s.env_id == 0]
    assert [s.timestep for s in mine[0].steps] == [0, 1, 2, 3]
    segments = first.segments + second.segments
    ids = {s.episode_id for s in segments}
    assert len(ids) == 1 + len([s for s in segments if s.env_id == 1])
    assert first.steps == 2 * 3


async def test_a_hang_cuts_the_segment_before_the_unknown_step(parts):
    made = parts([ScriptedEnv(0, length=3, end="hang"), ScriptedEnv(1, length=50)])
    result = await collect(made, 2)
    cut = [s for s in result.segments if s.env_id == 0]
    assert cut and all([s.timestep for s in seg.steps] == [0, 1] for seg in cut)
    assert all(seg.done_kind == "running" for seg in cut)
    # The third action was sent, and its outcome is not known.
    assert len(made.envs[0].played[0]) == 3
    assert made.collector.counters["hangs"] == len(cut) == result.collect["episodes_hang"]
    assert len({s.episode_id for s in cut}) == len(cut)


async def test_a_hang_at_the_first_step_leaves_no_segment(parts):
    made = parts([ScriptedEnv(0, length=1, end="hang"), ScriptedEnv(1, length=4)])
    result = await collect(made, 1)
    assert {s.env_id for s in result.segments} == {1} and made.collector.counters["hangs"] == 4


async def test_a_new_episode_starts_with_an_empty_context(parts, encoder):
    """The root looks back on min(time step + 1, C = 3) observations of its own episode."""
    made = parts([ScriptedEnv(0, length=5), ScriptedEnv(1, length=3, end="hang")])
    await collect(made, 6)
    starts = 0
    for (roots, *_), _ in made.policy.calls:
        for env_id, root in enumerate(roots):
            now = root.observations[-1]
            episode, t = next(
                (e, t)
                for e in range(1, 9)
                for t in range(5)
                if (now == encoder.encode([f"env {env_id} episode {e} step {t}"])[0]).all()
            )
            seen = range(max(t - 2, 0), t + 1)
            texts = [f"env {env_id} episode {episode} step {p}" for p in seen]
            np.testing.assert_array_equal(root.observations, encoder.encode(texts))
            played = made.envs[env_id].played[episode - 1]
            names = [made.policy.vocabulary.action_of(i) for i in root.actions]
            assert names == [played[p] for p in seen[:-1]]
            starts += t == 0
    assert starts >= 5


async def test_truncation_is_not_termination(parts):
    made = parts([ScriptedEnv(0, length=3, end="truncated")])
    result = await collect(made, 2)
    assert [s.done_kind for s in result.segments] == ["truncated", "truncated"]
    assert result.collect["episodes_truncated"] == 2 and result.collect["episodes_terminated"] == 0


async def test_metrics_by_hand(parts):
    made = parts([ScriptedEnv(0, length=4), ScriptedEnv(1, length=4)])
    collected = (result := await collect(made, 2)).collect
    assert collected["episode_return_mean"] == collected["episode_return_max"] == 1 + 2 + 3 + 4
    assert collected["reward_per_step"] == 2.5 and collected["episode_length"] == 4
    counts = [len(told_actions(e, t)) for e in (0, 1) for t in range(4)]
    assert collected["valid_actions"] == pytest.approx(np.mean(counts))
    assert set(result.prior) >= {"kl_from_wm", "entropy", "weight", "overridden"}


async def test_the_llms_numbers_enter_the_root(parts):
    """Same game, weight 1: the mixture is the softmax of the summed token log-probabilities."""
    made = parts(root_prior=RootPriorSettings(mode="llm_logits"))
    result = await collect(made, 1, env_steps=10)
    assert result.prior["weight"] == 1.0

    (roots, temperature, env_steps), plans = made.policy.calls[0]
    assert temperature == 1.0 and env_steps == 10
    assert made.policy.calls[1][0][2] == 13  # the schedule counts the steps of this call too
    for env_id, (root, plan) in enumerate(zip(roots, plans, strict=True)):
        text = f"env {env_id} episode 1 step 0"
        totals = np.array([sum(logprobs(text, a)) for a in told_actions(env_id, 0)])
        assert root.llm_logprobs == pytest.approx(totals)
        expected = np.exp(totals) / np.exp(totals).sum()
        assert np.exp(plan.prior.log_mixed) == pytest.approx(expected, abs=1e-6)


async def test_without_an_llm_the_prior_is_empty(parts):
    step = (await collect(parts(prior=None), 1)).segments[0].steps[0]
    assert step.request is None and step.scores is None and step.prior_weight == 0.0


async def test_a_state_without_an_answer_is_planned_with_the_world_model(parts):
    """What was asked is kept, so that the LLM can learn from the step all the same."""
    step = (await collect(parts(prior=FakePrior(answers=False)), 1)).segments[0].steps[0]
    assert step.scores is None and step.request is not None and step.prior_weight == 0.0


async def test_a_search_without_the_llm_does_not_ask_it(parts):
    """What it would have been asked is kept, and the next call asks again."""
    made = parts([ScriptedEnv(0, length=8)])
    first = await made.collector.collect(1, 0, 1.0, "search_alone")
    assert made.prior.calls == [] and len(made.prior.told) == 4
    assert all(root.llm_logprobs is None for (roots, *_), _ in made.policy.calls for root in roots)
    assert first.prior["weight"] == first.prior["kl_from_wm"] == 0.0
    for step in first.segments[0].steps:
        assert step.scores is None and step.prior_weight == 0.0
        assert made.prior.told[step.request.body_ids[0]] == (
            step.state.observation,
            step.valid_actions,
        )
        assert build_sample(step, 0.0).request == step.request

    second = await collect(made, 1)
    assert made.prior.calls == [1] * 4
    assert all(step.scores is not None for step in second.segments[0].steps)
    assert [step.timestep for step in second.segments[0].steps] == [4, 5, 6, 7]


async def test_each_learner_gets_the_target_with_its_own_prior(parts):
    own = dict(root_prior=RootPriorSettings(), target_prior="world_model")
    made = parts([ScriptedEnv(0, length=8)], llm_target_prior="llm", **own)
    steps = (await collect(made, 2)).segments[0].steps
    plans = [plans[0] for _, plans in made.policy.calls]
    for step, plan in zip(steps, plans, strict=False):
        np.testing.assert_array_equal(step.target_policy, plan.world_model_target)
        np.testing.assert_array_equal(step.llm_target, plan.llm_target)
        assert build_sample(step, 0.0).target_policy == tuple(plan.llm_target)
        np.testing.assert_array_equal(step.behaviour, plan.behaviour)
        assert len(step.valid_actions) < 2 or np.abs(step.target_policy - step.llm_target).max()

    # Where only one of them has its own, the other's is the mixture's.
    made = parts([ScriptedEnv(0, length=8)], **own)
    steps = (await collect(made, 2)).segments[0].steps
    for step, (_, plans) in zip(steps, made.policy.calls, strict=False):
        np.testing.assert_array_equal(step.target_policy, plans[0].world_model_target)
        np.testing.assert_array_equal(step.llm_target, plans[0].target_policy)


# ---- the LLM alone -------------------------------------------------------------------------------


def alone(parts, num_segments: int, temperature: float = 1.0, new_episodes: int | None = None):
    return parts.collector.collect(num_segments, 0, temperature, "llm", new_episodes)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
async def test_the_llm_alone_draws_from_its_own_distribution(parts, temperature):
    made = parts()
    result = await alone(made, 60, temperature)
    assert made.policy.calls == []  # nothing was searched

    expected, played, entropies = [], [], []
    for step in (step for segment in result.segments for step in segment.steps):
        totals = np.array([sum(logprobs(step.state.observation, a)) for a in step.valid_actions])
        policy = np.exp(totals / temperature) / np.exp(totals / temperature).sum()
        assert step.behaviour == pytest.approx(policy) == step.target_policy
        assert not step.searched and step.prior_weight == 1.0
        assert np.isnan([step.root_value, step.predicted_value]).all()
        assert step.scores.weights_version == FakePrior.VERSION
        expected.append(policy.max())
        played.append(step.action_index == policy.argmax())
        plain = np.exp(totals) / np.exp(totals).sum()
        entropies.append(-(plain * np.log(plain)).sum())
    # As often as it says, within three standard deviations.
    spread = np.sqrt(np.sum([p * (1 - p) for p in expected]))
    assert abs(np.sum(played) - np.sum(expected)) < 3 * spread and 0 < spread

    assert set(result.prior) == {"llm_entropy"}
    assert result.prior["llm_entropy"] == pytest.approx(np.mean(entropies), rel=0.05)
    assert not {"root_value", "visit_entropy"} & set(result.collect)
    assert np.isfinite(list(result.collect.values())).all()


async def test_a_round_begins_so_many_episodes_and_ends_with_the_last(parts):
    """Three environments, five episodes of 5, 6 and 7 steps: calls of four segments, then of what
    is left.
    """
    made = parts(lengths())
    results, left = [], 5
    while not results or results[-1].running:
        results.append(await alone(made, 4, new_episodes=left))
        left -= results[-1].begun
    assert left == 0 and sum(r.begun for r in results) == 5 and len(results) > 1
    ended = [s for r in results for s in r.segments if s.done_kind == "terminated"]
    assert sorted(s.episode_id for s in ended) == [0, 1, 2, 3, 4]
    # The two shortest were played twice.
    assert sum(r.steps for r in results) == 5 + 6 + 7 + 5 + 6
    assert [len(env.played) for env in made.envs] == [2, 2, 1]

    # The next round's.
    assert (await alone(made, 4, new_episodes=2)).begun == 2


async def test_a_round_in_which_every_episode_hangs(parts):
    made = parts([ScriptedEnv(0, length=1, end="hang")])
    result = await alone(made, 4, new_episodes=2)
    assert (result.segments, result.steps, result.running) == ([], 2, 0)
    assert result.collect["episodes_hang"] == 2 and np.isfinite(list(result.collect.values())).all()


async def test_nobody_plays_for_an_llm_that_does_not_answer(parts):
    with pytest.raises(PriorZeroError, match=r"played alone.*--resume"):
        await alone(parts(prior=FakePrior(answers=False)), 1)


async def test_the_llms_draws_go_on_after_a_resume(parts, tmp_path):
    one, two = parts(lengths()), parts(lengths())
    await alone(one, 4, new_episodes=5)
    state = through_a_file(one.collector.state_dict(), tmp_path)
    rest = await alone(one, 9, new_episodes=4)
    two.policy.learn_mode.load_state_dict(one.policy.learn_mode.state_dict())
    assert await two.collector.resume(state) == 0
    again = await alone(two, 9, new_episodes=4)
    assert actions_of(again) == actions_of(rest) and len(actions_of(rest)) > 15


def actions_of(result) -> list[tuple]:
    return [(s.episode_id, step.timestep, step.action) for s in result.segments for step in s.steps]


async def test_textworld(compiled_cfg, encoder, one_thread, tmp_path, monkeypatch):
    """tw-simple: invalid actions raise in the environment, so a finished run proves that all were
    valid.
    """
    from priorzero.games.env import TextGameEnv

    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    settings = SIZES | dict(
        action_vocabulary=dict(capacity=128, overflow=4), game_segment_length=6, root_policy="puct"
    )
    cfg = compiled_cfg(**settings)
    group = GameEnvGroup(
        [TextGameEnv(dict(env_id="tw-simple", max_steps=10)) for _ in range(2)], seed=0
    )
    try:
        collector = PriorZeroCollector(
            cfg.policy.settings,
            make_watched(cfg, encoder),
            group,
            encoder,
            FakePrior(),
            history_length=2,
            seed=0,
        )
        result = await collector.collect(4, 0, 1.0)
    finally:
        group.close()

    steps = [s for segment in result.segments for s in segment.steps]
    assert len(steps) >= 16 and all(s.action in s.state.valid_actions for s in steps)
    for segment in result.segments:
        for now, then in zip(segment.steps, segment.steps[1:], strict=False):
            assert then.state.history[-1] == HistoryItem(
                now.state.observation, now.action, now.reward
            )
            assert then.timestep == now.timestep + 1
    assert len({s.valid_actions for s in steps}) > 2  # the choice differs along the way


# ---- going on from a saved state -----------------------------------------------------------------


def through_a_file(state: dict, folder) -> dict:
    """As a checkpoint writes and reads it."""
    from priorzero.loop.saving import _on_cpu
    from priorzero.run.checkpoint import CheckpointStore

    store = CheckpointStore(folder / "ckpt")
    store.save(1, state, None, {})
    return _on_cpu(store.load()[0])


def played_on(result) -> list[tuple]:
    return [
        (s.env_id, s.episode_id, step.timestep, step.state, step.action, step.root_value)
        for s in result.segments
        for step in s.steps
    ]


def lengths() -> list[ScriptedEnv]:
    return [ScriptedEnv(i, length=5 + i) for i in range(3)]


async def test_running_episodes_go_on(parts, tmp_path):
    """Open segments, histories, contexts and counters: what follows is what would have followed."""
    one = parts(lengths())
    first = await collect(one, 4)
    state = through_a_file(one.collector.state_dict(), tmp_path)
    policy = copy.deepcopy(one.policy.learn_mode.state_dict())
    opened = {s["env_id"]: s["timestep"] for s in state["slots"]}
    assert len(set(opened.values())) > 1 and state["segments"]["segment_steps"].any(), opened
    rest = await collect(one, 6, first.steps)

    two = parts(lengths())
    two.policy.learn_mode.load_state_dict(policy)
    assert await two.collector.resume(state) == 0
    again = await collect(two, 6, first.steps)
    assert played_on(again) == played_on(rest)
    assert (again.steps, again.collect, again.prior) == (rest.steps, rest.collect, rest.prior)
    roots = [root for (roots, *_), _ in two.policy.calls for root in roots]
    assert max(len(root.observations) for root in roots[:3]) == 3, "contexts begin anew"


async def test_an_episode_that_does_not_come_back_is_cut(parts, tmp_path):
    one = parts(lengths())
    await collect(one, 4)
    state = through_a_file(one.collector.state_dict(), tmp_path)
    opened = {s["env_id"]: s["timestep"] % 4 for s in state["slots"]}
    running = {s["env_id"]: s["episode_id"] for s in state["slots"]}

    envs = lengths()[:2]  # one environment fewer than there were
    envs[0].forgets = True
    two = parts(envs)
    two.policy.learn_mode.load_state_dict(one.policy.learn_mode.state_dict())
    assert await two.collector.resume(state) == 2
    # They are not lost if the run stops before it plays.
    saved_again = through_a_file(two.collector.state_dict(), tmp_path / "again")
    assert sum(saved_again["cut"]["segment_steps"]) == opened[0] + opened[2] > 0

    result = await collect(two, 4)
    cut = [s for s in result.segments if s.episode_id in (running[0], running[2])]
    assert {s.env_id: len(s) for s in cut} == {e: opened[e] for e in (0, 2) if opened[e]}
    assert all(s.done_kind == "running" for s in cut)
    others = {s.episode_id for s in result.segments} - {running[0], running[2]}
    assert running[1] in others and min(others - {running[1]}) > max(running.values())
