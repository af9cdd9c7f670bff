"""A saved episode comes back by its commands, or ends and says why."""

from __future__ import annotations

import copy
import json
import random

import pytest

from priorzero.games.group import GameEnvGroup

COIN = "tw-coin:level=3,seed=2"


def choose(obs, chooser) -> str:
    return chooser.choice(obs["valid_actions"])


@pytest.fixture(params=["detective", "zork1", "coin"])
def game(request) -> str:
    return COIN if request.param == "coin" else request.getfixturevalue(request.param)


def walked(env, steps: int, seed: int = 0) -> dict:
    """The observation after random commands; fewer than `steps` where the game ends."""
    chooser, obs = random.Random(seed), env.reset()
    for _ in range(steps):
        obs = env.step(choose(obs, chooser)).obs
    return obs


def trace(env, obs, steps: int) -> list:
    chooser, told = random.Random(1), []
    for _ in range(steps):
        step = env.step(choose(obs, chooser))
        obs = step.obs
        told.append((obs, step.reward, step.info))
        if step.done:
            break
    return told


def test_an_episode_goes_on_where_it_was(make_env, game):
    """Observation, rewards, score, step limit and the return of the whole episode."""
    one, two = (make_env(env_id=game, max_steps=24, seed=3) for _ in range(2))
    one.reset()
    obs = walked(one, 9)
    state = json.loads(json.dumps(one.state_dict()))
    assert len(state["commands"]) == 9 and state["episode"] == 1

    assert two.replay(state) == obs
    assert two.state_dict() == state
    told = trace(one, obs, 30)
    assert trace(two, obs, 30) == told and told[-1][2]["steps"] <= 24
    # The next episode has the seed it would have had.
    assert one.reset() == two.reset() and one.episode_seed == two.episode_seed


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(state_hash="0"), "another state of the game"),
        (dict(text="elsewhere"), "another text"),
        (dict(commands=["look"]), "another"),
        (dict(score=99.0), "another text"),
    ],
)
def test_one_that_does_not_come_back_ends_with_a_line(make_env, change, why, caplog):
    one, two = (make_env(env_id=COIN, max_steps=24, seed=3) for _ in range(2))
    walked(one, 6)
    state = one.state_dict() | change
    assert two.replay(state) is None
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and why in lines[0] and "ends here, as truncated" in lines[0]
    assert f"seed {one.episode_seed}" in lines[0]
    with pytest.raises(RuntimeError, match="outside an episode"):
        two.step("look")
    assert one.reset() == two.reset() and one.episode_seed == two.episode_seed


def test_a_shorter_step_limit_or_a_game_that_ended_is_no_running_episode(make_env, caplog):
    one = make_env(env_id=COIN, max_steps=24)
    walked(one, 6)
    assert make_env(env_id=COIN, max_steps=6).replay(one.state_dict()) is None
    assert "env.max_steps is 6 now" in caplog.text
    won = one.state_dict() | dict(commands=[*one.game.walkthrough, "look"])
    assert make_env(env_id=COIN, max_steps=24).replay(won) is None
    assert f"the game ended after {len(one.game.walkthrough)} steps" in caplog.text


def test_an_interpreter_that_dies_meanwhile_ends_it_too(make_env, failing_story, caplog):
    story = failing_story()
    env = make_env(env_id=story)
    env.reset()
    state = env.state_dict() | dict(commands=["east", "crash", "west"])
    again = make_env(env_id=story)
    assert again.replay(state) is None
    assert "(seed" in caplog.text and "did not come back and ends here" in caplog.text
    assert again.stats()["deaths"] == 1 and again.reset()["text"].startswith("You are in a row")


def test_no_episode_is_nothing_to_bring_back(make_env, caplog):
    fresh = make_env(env_id=COIN, max_steps=2, seed=5)
    assert fresh.state_dict()["commands"] is None
    walked(fresh, 2)  # over
    state = fresh.state_dict()
    assert state["commands"] is None
    other = make_env(env_id=COIN, max_steps=2, seed=5)
    assert other.replay(state) is None and caplog.text == ""
    assert other.reset() == fresh.reset() and other.episode_seed == fresh.episode_seed


def test_a_group_brings_back_what_it_can(make_env):
    def group(size):
        return GameEnvGroup(
            [make_env(env_id="tw-simple", max_steps=24) for _ in range(size)], seed=1
        )

    one, two = group(3), group(2)
    present = one.reset()
    for _ in range(2):
        present = {
            i: t.obs
            for i, t in one.step({i: choose(o, random) for i, o in present.items()}).items()
        }
    states = copy.deepcopy(one.state_dict())
    states[0]["text"] = "elsewhere"
    assert two.replay(states) == {1: present[1]}  # the third has no environment any more
