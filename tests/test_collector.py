"""Collector and evaluator: on a scripted game whose every answer is known, and on a real TextWorld
game.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from ding.envs import BaseEnvTimestep

from priorzero.games.group import GameEnvGroup
from priorzero.llm.engines.base import LLMEngineError
from priorzero.llm.prior import LLMPrior
from priorzero.play.slot import HistoryWindow, Seat
from priorzero.types import ActionScores, HistoryItem, PriorZeroError
from priorzero_collector import PriorZeroCollector
from priorzero_evaluator import PriorZeroEvaluator


def told_actions(env: int, t: int) -> tuple[str, ...]:
    """Valid actions of step t: their number and names change from step to step."""
    return tuple(sorted({f"go {k} at {t}" for k in range(1 + (t + env) % 3)} | {"wait"}))


class ScriptedEnv:
    """A `TextGameEnv` that plays a script: step t earns t, and the episode ends in the way and at
    the step given.
    """

    def __init__(self, number: int, length: int = 6, end: str = "terminated") -> None:
        self.number, self.length, self.end = number, length, end
        self.game = SimpleNamespace(goal=f"goal {number}", env_id="script", max_score=40.0)
        self.played: list[list[str]] = []
        self.episode_seed = 0

    def seed(self, seed, dynamic_seed=True, env_index=None):
        self.episode_seed = seed * 100

    def _observation(self):
        return {
            "text": f"env {self.number} episode {len(self.played)} step {self.t}",
            "valid_actions": told_actions(self.number, self.t)
            if self.t < self.length or self.end != "terminated"
            else (),
            "timestep": self.t,
            "score": float(sum(range(self.t + 1))),
            "state_hash": "",
        }

    def reset(self):
        self.t, self.episode_seed = 0, self.episode_seed + 1
        self.played.append([])
        return self._observation()

    def step(self, action):
        assert action in told_actions(self.number, self.t), (
            f"{action!r} is not valid at step {self.t}"
        )
        before = self._observation()
        self.played[-1].append(action)
        self.t += 1
        done = self.t == self.length
        kind = self.end if done else "running"
        hang = kind == "hang"
        observation = {**before, "timestep": self.t} if hang else self._observation()
        info = {
            "done_kind": kind,
            "score": observation["score"],
            "max_score": 40.0,
            "steps": self.t,
            "terminated": kind == "terminated",
            "truncated": kind in ("truncated", "hang"),
        }
        if done:
            info["eval_episode_return"] = observation["score"]
        return BaseEnvTimestep(observation, 0.0 if hang else float(self.t), done, info)

    def stats(self):
        return {}

    def interrupt(self):
        pass

    def close(self):
        pass


class FakeEngine:
    """Two tokens per action, numbers from a hash of state and action; counts its calls."""

    def __init__(self, fails: bool = False) -> None:
        self.calls, self.fails = [], fails

    async def score(self, requests):
        self.calls.append(len(requests))
        if self.fails:
            raise LLMEngineError("out of order")
        return [
            ActionScores(tuple(logprobs(r.body, a) for a in r.actions), weights_version=5)
            for r in requests
        ]

    def stats(self):
        return {}


def logprobs(text: str, action: str) -> tuple[float, float]:
    digest = hashlib.blake2b(f"{text}|{action}".encode(), digest_size=2).digest()
    return -digest[0] / 100, -digest[1] / 100


def make_prior(engine, required=False) -> LLMPrior:
    return LLMPrior(engine, lambda state: ("head", state.observation, False), required=required)


@pytest.fixture
def parts(make_policy, encoder):
    """(collector, evaluator, envs, engine) on scripted environments."""
    groups = []

    def make(envs=None, engine="fake", transcripts=None, history=2, **settings):
        policy = make_policy(
            actions=0,
            num_simulations=4,
            action_vocabulary=dict(capacity=64, overflow=4),
            game_segment_length=4,
            env=dict(collector_env_num=3),
            **settings,
        )
        group = GameEnvGroup(envs or [ScriptedEnv(i) for i in range(3)], seed=0)
        groups.append(group)
        engine = FakeEngine() if engine == "fake" else engine
        prior = make_prior(engine) if engine else None
        collector = PriorZeroCollector(
            policy._cfg, policy, group, encoder, prior, HistoryWindow(history)
        )
        evaluator = PriorZeroEvaluator(
            policy, group, encoder, prior, HistoryWindow(history), transcripts=transcripts
        )
        return collector, evaluator, group, engine

    yield make
    for group in groups:
        group.close()


async def test_segments_carry_what_was_played(parts, encoder):
    collector, _, group, engine = parts()
    result = await collector.collect(6)
    assert result.transitions == sum(len(s) for s in result.segments) and len(result.segments) >= 6
    seen = {}
    for segment in result.segments:
        env = group.envs[segment.env_id]
        episode = sorted(
            {s.episode_id for s in result.segments if s.env_id == segment.env_id}
        ).index(segment.episode_id)
        for step in segment.steps:
            t = step.timestep
            text = f"env {segment.env_id} episode {episode + 1} step {t}"
            assert step.state.observation == text and step.state.goal == f"goal {segment.env_id}"
            assert step.state.valid_actions == step.valid_actions == told_actions(segment.env_id, t)
            assert step.state.score == sum(range(t + 1))
            assert step.action == env.played[episode][t] and step.reward == t + 1
            np.testing.assert_array_equal(step.observation, encoder.encode([text])[0])
            assert [collector._policy.vocabulary.action_of(i) for i in step.valid_ids] == list(
                step.valid_actions
            )
            assert step.visit_counts.sum() == 4 and len(step.visit_counts) == len(
                step.valid_actions
            )
            assert (
                step.behaviour.sum() == pytest.approx(1) and step.behaviour[step.action_index] > 0
            )
            assert step.prior_logprobs == tuple(logprobs(text, a) for a in step.valid_actions)
            assert (
                step.prior_version == 5
                and np.isfinite([step.root_value, step.predicted_value]).all()
            )
            assert step.done_kind == ("terminated" if t == 5 else "running")
            # The two steps before, oldest first, as they were played.
            past = range(max(t - 2, 0), t)
            assert step.state.history == tuple(
                HistoryItem(
                    f"env {segment.env_id} episode {episode + 1} step {p}",
                    env.played[episode][p],
                    p + 1.0,
                )
                for p in past
            )
            seen[segment.env_id, episode, t] = step
        # Segments are cut at 4 steps or at the end, and the last state is the next step's.
        assert [s.timestep for s in segment.steps] in ([0, 1, 2, 3], [4, 5])
        last = segment.steps[-1].timestep + 1
        np.testing.assert_array_equal(
            segment.final_observation,
            encoder.encode([f"env {segment.env_id} episode {episode + 1} step {last}"])[0],
        )
        assert (
            len({len(s.valid_actions) for s in segment.steps}) > 1
        )  # the choice differs from step to step
        assert (
            segment.obs_segment[0] is not None
            and len(segment.obs_segment) == len(segment.steps) + 1
        )
        assert list(segment.action_segment) == [s.action_id for s in segment.steps]
        assert list(segment.timestep_segment) == [s.timestep for s in segment.steps]
    assert len(seen) == result.transitions
    assert set(engine.calls) == {3}  # all environments in one request, every step
    assert collector.envstep == 3 * len(engine.calls)


async def test_unfinished_segments_go_on_in_the_next_call(parts):
    collector, _, _, _ = parts([ScriptedEnv(0, length=10), ScriptedEnv(1, length=3)])
    first, second = await collector.collect(1), await collector.collect(3)
    assert [s.env_id for s in first.segments] == [1]
    mine = [s for s in second.segments if s.env_id == 0]
    assert [s.timestep for s in mine[0].steps] == [0, 1, 2, 3]
    ids = {s.episode_id for r in (first, second) for s in r.segments}
    assert len(ids) == 1 + len([s for r in (first, second) for s in r.segments if s.env_id == 1])


async def test_a_hang_cuts_the_segment_before_the_unknown_step(parts):
    collector, _, group, _ = parts(
        [ScriptedEnv(0, length=3, end="hang"), ScriptedEnv(1, length=50)]
    )
    result = await collector.collect(2)
    cut = [s for s in result.segments if s.env_id == 0]
    assert cut and all([s.timestep for s in seg.steps] == [0, 1] for seg in cut)
    assert all(seg.done_kind == "running" for seg in cut)
    assert (
        len(group.envs[0].played[0]) == 3
    )  # the third action was sent, and its outcome is not known
    assert collector.counters["hangs"] == len(cut) and result.collect["episodes_hang"] == len(cut)
    assert len({s.episode_id for s in cut}) == len(cut)


async def test_a_hang_at_the_first_step_leaves_no_segment(parts):
    collector, _, _, _ = parts([ScriptedEnv(0, length=1, end="hang"), ScriptedEnv(1, length=4)])
    result = await collector.collect(1)
    assert {s.env_id for s in result.segments} == {1} and collector.counters["hangs"] == 4


@pytest.mark.parametrize("who", ["collector", "evaluator"])
async def test_a_new_episode_starts_with_an_empty_context(parts, monkeypatch, who):
    """The root looks back on min(time step + 1, C = 3) observations of its own episode."""
    collector, evaluator, group, _ = parts(
        [ScriptedEnv(0, length=5), ScriptedEnv(1, length=3, end="hang")]
    )
    policy, seen = collector._policy, []
    context = policy._collect_context if who == "collector" else policy._eval_context
    real = context.batch

    def spy(env_ids, device):
        observations, actions, lengths = real(env_ids, device)
        seen.extend((group.envs[e].t, int(n)) for e, n in zip(env_ids, lengths, strict=True))
        return observations, actions, lengths

    monkeypatch.setattr(context, "batch", spy)
    if who == "collector":
        await collector.collect(6)
    else:
        await evaluator.evaluate("world_model", 5, 0)
    assert seen.count((0, 1)) >= 5
    assert all(length == min(t + 1, 3) for t, length in seen)


async def test_truncation_is_not_termination(parts):
    collector, _, _, _ = parts([ScriptedEnv(0, length=3, end="truncated")])
    result = await collector.collect(2)
    assert [s.done_kind for s in result.segments] == ["truncated", "truncated"]
    assert result.collect["episodes_truncated"] == 2 and result.collect["episodes_terminated"] == 0


async def test_metrics_by_hand(parts):
    collector, _, _, _ = parts([ScriptedEnv(0, length=4), ScriptedEnv(1, length=4)])
    result = await collector.collect(2)
    assert (
        result.collect["episode_return_mean"]
        == result.collect["episode_return_max"]
        == 1 + 2 + 3 + 4
    )
    assert result.collect["reward_per_step"] == 2.5 and result.collect["episode_length"] == 4
    counts = [len(told_actions(e, t)) for e in (0, 1) for t in range(4)]
    assert result.collect["valid_actions"] == pytest.approx(np.mean(counts))
    assert set(result.prior) >= {"kl_from_wm", "entropy", "weight", "overridden"}


async def test_the_llms_numbers_enter_the_root(parts):
    """Same game, weight 1: the mixture is the softmax of the summed token log-probabilities."""
    collector, _, _, _ = parts()
    from priorzero.search.root_prior import RootPriorSettings

    collector._policy._prior_settings = RootPriorSettings(mode="llm_logits")
    seen = []
    forward = collector._policy.collect_mode.forward
    collector._policy = SimpleNamespace(
        collect_mode=SimpleNamespace(
            forward=lambda *a: seen.append((a, forward(*a))) or seen[-1][1],
            reset=collector._policy.collect_mode.reset,
        ),
        register_actions=collector._policy.register_actions,
        collect_temperature=collector._policy.collect_temperature,
    )
    result = await collector.collect(1)
    assert result.prior["weight"] == 1.0
    (_, _, given, env_ids, _, envstep), out = seen[0]
    assert envstep == 0 and seen[1][0][5] == 3
    for row, env_id in enumerate(env_ids):
        text = f"env {env_id} episode 1 step 0"
        totals = [sum(logprobs(text, a)) for a in told_actions(env_id, 0)]
        assert given[row] == pytest.approx(totals)
        assert np.exp(out[env_id].prior.log_mixed) == pytest.approx(
            np.exp(totals) / np.exp(totals).sum(), abs=1e-6
        )


async def test_without_an_llm_the_prior_is_empty(parts):
    collector, _, _, _ = parts(engine=None)
    step = (await collector.collect(1)).segments[0].steps[0]
    assert step.prior_logprobs is None and step.prior_weight == 0.0


async def test_a_failing_engine_is_counted_or_stops_the_run(parts):
    collector, _, _, engine = parts(engine=FakeEngine(fails=True))
    result = await collector.collect(1)
    assert result.segments[0].steps[0].prior_logprobs is None
    assert collector._prior.counters["failures"] == len(engine.calls) > 0
    collector._prior = make_prior(engine, required=True)
    with pytest.raises(PriorZeroError, match="llm.required"):
        await collector.collect(1)


# ---- evaluator -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["world_model", "world_model_llm", "llm", "random"])
async def test_evaluation_plays_whole_episodes_and_writes_them_down(parts, tmp_path, mode):
    envs = [ScriptedEnv(0, length=3), ScriptedEnv(1, length=5, end="truncated")]
    _, evaluator, group, engine = parts(envs, transcripts=tmp_path / "out")
    result = await evaluator.evaluate(mode, 3, 0, "it7")
    assert (
        sorted(result.lengths) == [3, 3, 5]
        and sorted(result.returns) == [6, 6, 15]
        and result.max_score == 40
    )
    metrics = result.metrics()
    assert metrics[f"{mode}/return_mean"] == 9 and metrics[f"{mode}/return_std"] == pytest.approx(
        np.std([6, 6, 15])
    )
    assert metrics[f"{mode}/return_best"] == 15 and metrics[f"{mode}/terminated"] == 2
    assert metrics[f"{mode}/score_share"] == pytest.approx(9 / 40)
    assert (len(engine.calls) > 0) == (mode in ("world_model_llm", "llm"))
    files = sorted((tmp_path / "out").glob("*.txt"))
    assert len(files) == 3 and all(f.name.startswith(f"it7_{mode}_") for f in files)
    text = next(f for f in files if "return15" in f.name).read_text(encoding="utf-8")
    for t, action in enumerate(envs[1].played[0]):
        assert f"env 1 episode 1 step {t}\n\n> {action}\n" in text
    assert "[reward 5]" in text and "[truncated, score 15.0]" in text
    if mode == "llm":
        for t, action in enumerate(envs[1].played[0]):
            state = f"env 1 episode 1 step {t}"
            assert action == max(told_actions(1, t), key=lambda a: sum(logprobs(state, a)))  # noqa: B023 (used at once)


async def test_random_evaluation_is_spread_over_the_valid_actions(parts):
    _, evaluator, group, _ = parts([ScriptedEnv(1, length=2)])
    await evaluator.evaluate("random", 60, 0)
    first = [played[0] for played in group.envs[0].played]
    assert set(first) == set(told_actions(1, 0))
    assert min(first.count(a) for a in set(first)) > 8


async def test_an_evaluation_plays_the_same_seeds_each_time_and_leaves_collection_alone(
    parts, make_policy, encoder
):
    collector, evaluator, group, _ = parts([ScriptedEnv(0, length=9)])
    await evaluator.evaluate("world_model", 2, 0)
    seeds = group.envs[0].episode_seed
    await evaluator.evaluate("world_model", 2, 0)
    assert group.envs[0].episode_seed == seeds == 2
    own = GameEnvGroup([ScriptedEnv(0, length=9)], seed=0)
    collector.reset_env(own)
    await collector.collect(1)
    before = collector._policy._collect_context.batch([0], "cpu")
    await evaluator.evaluate("world_model", 1, 0)
    after = collector._policy._collect_context.batch([0], "cpu")
    own.close()
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


async def test_evaluation_modes_that_cannot_be(parts):
    _, evaluator, _, _ = parts(engine=None)
    with pytest.raises(PriorZeroError, match="'best' is unknown"):
        await evaluator.evaluate("best", 1, 0)
    with pytest.raises(PriorZeroError, match="needs an LLM"):
        await evaluator.evaluate("llm", 1, 0)


# ---- a real game ---------------------------------------------------------------------------------


async def test_textworld(make_policy, encoder, tmp_path, monkeypatch):
    """tw-simple: invalid actions raise in the environment, so a finished run proves that all were
    valid.
    """
    from priorzero.games.env import TextGameEnv

    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    policy = make_policy(
        actions=0,
        num_simulations=4,
        action_vocabulary=dict(capacity=128, overflow=4),
        game_segment_length=6,
    )
    group = GameEnvGroup(
        [TextGameEnv(dict(env_id="tw-simple", max_steps=10)) for _ in range(2)], seed=0
    )
    try:
        collector = PriorZeroCollector(
            policy._cfg, policy, group, encoder, make_prior(FakeEngine()), HistoryWindow(2)
        )
        result = await collector.collect(4)
        evaluator = PriorZeroEvaluator(policy, group, encoder, None, transcripts=tmp_path / "out")
        played = [await evaluator.evaluate(mode, 2, 0) for mode in ("world_model", "random")]
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
    assert all(len(e.returns) == 2 and max(e.lengths) <= 10 for e in played)
    assert len(list((tmp_path / "out").glob("*.txt"))) == 4


@pytest.mark.parametrize(
    ("length", "drop", "kept"),
    [
        (0, 1, [0, 0, 0, 0, 0, 0, 0, 0]),
        (3, 1, [1, 2, 3, 3, 3, 3, 3, 3]),
        (4, 3, [1, 2, 3, 4, 2, 3, 4, 2]),
    ],
)
def test_a_full_history_loses_its_oldest_steps_together(length, drop, kept):
    seat = Seat("Win.", HistoryWindow(length, drop))
    seat.start({"text": "start", "valid_actions": ("go",), "score": 0.0})
    sizes = []
    for step in range(8):
        seat.advance(
            f"action {step}", 1.0, {"text": f"text {step}", "valid_actions": ("go",), "score": 0.0}
        )
        history = seat.state.history
        assert [h.action for h in history] == [
            f"action {i}" for i in range(step + 1 - len(history), step + 1)
        ]
        sizes.append(len(history))
    assert sizes == kept
