"""Restarts on real games: what comes back, what is learnt of it, how it goes on after a stop."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.games.env import TextGameEnv
from priorzero.games.group import GameEnvGroup
from priorzero.settings.policy import RestartSettings
from priorzero.types import PriorZeroError
from priorzero_collector import PriorZeroCollector
from priorzero_config import get_priorzero_config
from tests.playing import FakePrior, make_watched
from tests.test_collector import through_a_file

SIZES = dict(
    num_simulations=2,
    action_vocabulary=dict(capacity=256, overflow=4),
    game_segment_length=3,
    num_unroll_steps=2,
    td_steps=1,
    burn_in=2,
)
CONTEXT = 3


class Told(GameEnvGroup):
    """A group that keeps how its episodes ended, and every state that it was brought back to."""

    def __init__(self, envs) -> None:
        super().__init__(envs, seed=4)
        self.ended: list[dict] = []
        self.back: list[dict] = []
        for env in self.envs:
            env.replay = self._watched(env.replay)

    def _watched(self, replay):
        def watched(state):
            answer = replay(state)
            self.back.append(state)
            return answer

        return watched

    def step(self, actions):
        steps = super().step(actions)
        self.ended += [dict(s.info, env_id=i) for i, s in steps.items() if s.done]
        return steps


@pytest.fixture(params=["tw-simple", "detective.z5"])
def game(request, story) -> str:
    return story(request.param) if request.param.endswith("z5") else request.param


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Where games are built, once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def made(compiled_cfg, encoder, one_thread, cache, monkeypatch):
    """A collector whose every second episode begins at a visited state."""
    monkeypatch.setenv("PRIORZERO_CACHE", cache)
    groups = []

    def make(env_id: str, share: float = 0.5, **restarts):
        cfg = compiled_cfg(**SIZES)
        policy = make_watched(
            cfg, encoder, restarts=RestartSettings(share=share, **restarts), context_steps=CONTEXT
        )
        settings = dict(env_id=env_id, max_steps=7, listing_workers=0)
        groups.append(Told([TextGameEnv(settings) for _ in range(2)]))
        collector = PriorZeroCollector(
            cfg.policy.settings,
            policy,
            groups[-1],
            encoder,
            FakePrior(),
            history_length=2,
            seed=0,
        )
        return collector, groups[-1], policy

    yield make
    for group in groups:
        group.close()


def by_episode(segments) -> dict[int, list]:
    found: dict[int, list] = {}
    for segment in segments:
        found.setdefault(segment.episode_id, []).append(segment)
    return found


def played(result) -> list[tuple]:
    return [
        (s.env_id, s.episode_id, step.timestep, step.state, step.action, step.root_value)
        for s in result.segments
        for step in s.steps
    ]


async def test_an_episode_goes_on_from_a_visited_state_as_if_it_had_come_there(
    made, game, encoder, make_buffer
):
    collector, group, policy = made(game)
    result = await collector.collect(18, 0, 1.0)
    late = {e: s for e, s in by_episode(result.segments).items() if s[0].steps[0].timestep > 0}
    assert len(late) >= 2 and group.back

    # What a player sees that types the commands from the game's start: in both games the seed
    # changes nothing.
    fresh, ways = TextGameEnv(dict(env_id=game, max_steps=50, listing_workers=0)), {}
    try:
        for state in group.back:
            seen = [fresh.reset(), *(fresh.step(command).obs for command in state["commands"])]
            ways[seen[-1]["text"], len(state["commands"])] = seen, state
    finally:
        fresh.close()

    for segments in late.values():
        first, depth = segments[0].steps[0], segments[0].steps[0].timestep
        seen, state = ways[first.state.observation, depth]
        assert depth == len(state["commands"]) and first.state.score == state["score"]
        reach = min(CONTEXT - 1, depth)
        before = segments[0].before
        assert [s.timestep for s in before] == list(range(depth - reach, depth))
        assert [s.state.observation for s in before] == [
            o["text"] for o in seen[depth - reach : depth]
        ]
        assert [s.action for s in before] == state["commands"][depth - reach :]
        # The LLM's history, two steps long as well.
        assert [(h.observation, h.action) for h in first.state.history] == [
            (s.state.observation, s.action) for s in before
        ]
        # The root saw what is kept for training.
        vectors = np.stack([*(s.observation for s in before), first.observation])
        roots = [r for (given, *_), _ in policy.calls for r in given]
        assert any(
            r.observations.shape == vectors.shape and (r.observations == vectors).all()
            for r in roots
        )
        assert first.observation.tolist() == encoder.encode([seen[-1]["text"]])[0].tolist()

    # A training window at such a beginning stands behind the same steps.
    buffer = make_buffer(policy)
    buffer.push_game_segments(result.segments)
    row = 0
    for segment in result.segments:
        if segment.steps[0].timestep > 0 and segment is late.get(segment.episode_id, [None])[0]:
            batch = buffer.batch_of(np.array([row]), np.ones(1, np.float32))
            assert batch.starts.tolist() == [len(segment.before)]
            for k, step in enumerate([*segment.before, segment.steps[0]]):
                np.testing.assert_array_equal(batch.observations[0, k], step.observation)
                assert batch.actions[0, k] == step.action_id
            if len(segment) > 1:  # one reward, then the next state's value
                assert batch.returns[0, 0] == np.float32(segment.steps[0].reward)
        row += len(segment)


async def test_returns_of_whole_episodes_are_those_of_whole_episodes(made, game):
    collector, group, _ = made(game)
    result = await collector.collect(18, 0, 1.0)
    metrics, episodes = result.collect, by_episode(result.segments)
    late = {e for e, s in episodes.items() if s[0].steps[0].timestep > 0}

    # Episodes that ended, told apart by their first step.
    over = {e: s[-1] for e, s in episodes.items() if s[-1].done_kind != "running"}
    whole = [sum(s.reward for x in episodes[e] for s in x.steps) for e in over if e not in late]
    gains = [sum(s.reward for x in episodes[e] for s in x.steps) for e in over if e in late]
    assert len(whole) >= 2 and len(gains) >= 2
    assert metrics["episodes"] == len(over) == len(group.ended)
    assert metrics["episode_return_mean"] == pytest.approx(np.mean(whole))
    assert metrics["restart_gain_mean"] == pytest.approx(np.mean(gains))
    lengths = [over[e].steps[-1].timestep + 1 for e in over if e not in late]
    assert metrics["episode_length"] == pytest.approx(np.mean(lengths))
    assert metrics["restarts"] == len(group.back) > 0
    assert metrics["restart_replayed"] == sum(len(state["commands"]) for state in group.back)
    assert metrics["restart_failures"] == 0 and metrics["restart_states"] > 2


async def test_a_run_goes_on_with_what_it_remembered(made, game, tmp_path):
    one, _, policy = made(game)
    first = await one.collect(12, 0, 1.0)
    learnt = policy.learn_mode.state_dict()
    state = through_a_file(one.state_dict(), tmp_path)
    vocabulary = {**learnt["vocabulary"]}
    rest = await one.collect(16, first.steps, 1.0)

    two, group, other = made(game)
    other.learn_mode.load_state_dict({**learnt, "vocabulary": vocabulary})
    assert await two.resume(state) == 0
    again = await two.collect(16, first.steps, 1.0)
    assert played(again) == played(rest)
    assert again.collect == rest.collect and rest.collect["restarts"] >= 2


async def test_where_a_game_does_not_come_back_the_episode_begins_at_its_start(made):
    collector, group, _ = made("tw-simple", share=1.0)
    first = await collector.collect(3, 0, 1.0)
    asked = []
    for env in group.envs:
        env.replay = lambda state: asked.append(state["state_hash"])
    result = await collector.collect(6, first.steps, 1.0)
    assert result.collect["restart_failures"] == len(asked) >= 2
    assert result.collect["restarts"] == 0

    ends = {s.env_id: s.episode_id for s in first.segments}
    begun = [s for s in result.segments if s.episode_id > max(ends.values()) + 1]
    assert begun and all(s.steps[0].timestep in (0, 3, 6) for s in begun)
    assert len(asked[:2]) == len(set(asked[:2])), "what did not come back is not asked for again"


def test_without_it_nothing_is_remembered(made):
    assert "visited" in made("tw-simple")[0].state_dict()
    assert "visited" not in made("tw-simple", share=0.0)[0].state_dict()


def test_groups_of_the_llm_need_whole_episodes():
    overrides = dict(policy=dict(restarts=dict(share=0.5)))
    with pytest.raises(PriorZeroError, match=r"policy.restarts.share is 0.5.*whole episodes"):
        get_priorzero_config(presets=("llm_only",), overrides=overrides)
    assert get_priorzero_config(overrides=overrides)[0].policy.restarts.share == 0.5


def test_visited_states_are_of_one_game():
    overrides = dict(
        policy=dict(restarts=dict(share=0.5)), env=dict(env_id=["tw-simple", "tw-coin"])
    )
    with pytest.raises(PriorZeroError, match=r"policy.restarts.share is 0.5.*several games"):
        get_priorzero_config(presets=("pure_unizero",), overrides=overrides)
