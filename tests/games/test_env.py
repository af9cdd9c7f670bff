"""TextGameEnv and GameEnvGroup on real games."""

from __future__ import annotations

import asyncio
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from easydict import EasyDict

from priorzero.games.env import FIRST_SEED, TextGameEnv, compose_text, episode_seed
from priorzero.games.group import GameEnvGroup
from priorzero.games.records import GameState, StateDetails
from priorzero.games.valid_actions import ValidActionCache
from priorzero.types import PriorZeroError

COIN = "tw-coin:level=3,seed=2"


def play(env, chooser: random.Random, steps: int) -> list[tuple]:
    """A random episode as a comparable list."""
    obs = env.reset()
    trace = [(obs["text"], obs["valid_actions"], 0.0)]
    for _ in range(steps):
        timestep = env.step(chooser.choice(obs["valid_actions"]))
        obs = timestep.obs
        trace.append((obs["text"], obs["valid_actions"], timestep.reward))
        if timestep.done:
            break
    return trace


# --- whole games ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id", ["tw-simple", "tw-cooking:recipe=1,take=1,go=6,cook,seed=4", COIN]
)
def test_walkthrough_wins_generated_games(make_env, env_id):
    env = make_env(env_id=env_id)
    obs = env.reset()
    rewards, texts = [], [obs["text"]]
    for command in env.game.walkthrough:
        assert command in obs["valid_actions"] and list(obs["valid_actions"]) == sorted(
            set(obs["valid_actions"])
        )
        timestep = env.step(command)
        obs = timestep.obs
        rewards.append(timestep.reward)
        texts.append(obs["text"])
    # Neither the banner in ASCII art, nor the status line, nor the closing menu.
    assert not any(re.search(r"\$\$|\n>|RESTART|   ", text) for text in texts)
    assert (
        timestep.done
        and timestep.info["won"]
        and timestep.info["terminated"]
        and not timestep.info["truncated"]
    )
    assert (
        timestep.info["score"] == timestep.info["max_score"] == env.game.max_score == sum(rewards)
    )
    assert (
        timestep.info["eval_episode_return"] == sum(rewards)
        and timestep.info["done_kind"] == "terminated"
    )
    assert obs["valid_actions"] == ()


def test_walkthrough_of_detective_reaches_its_maximum(make_env, detective):
    """Through every check of step(); Jericho's list has "west" where the walkthrough types "W",
    hence extra_actions.
    """
    commands = TextGameEnv({"env_id": detective}).game.walkthrough
    env = make_env(env_id=detective, extra_actions=sorted(set(commands)))
    first = env.reset()
    assert first["score"] == 10 and {"take paper", "west"} <= set(first["valid_actions"])
    for command in commands:
        timestep = env.step(command)
    assert timestep.info["score"] == 360 == timestep.info["max_score"] and timestep.info["won"]
    assert (
        timestep.done and timestep.info["eval_episode_return"] == 350.0
    )  # ten points are there at the start
    # All states are known now: a second pass asks the interpreter for nothing but steps.
    misses = env.stats()["state_misses"]
    env.reset()
    for command in commands:
        env.step(command)
    assert env.stats()["state_misses"] == misses and env.stats()["state_hits"] >= 51


# --- seeds ----------------------------------------------------------------------------------------


def test_stock_jericho_takes_seed_0_for_the_walkthroughs(zork1, make_env):
    """The defect, and that ours does not have it."""
    import jericho

    stock = jericho.FrotzEnv(zork1, seed=0)
    assert stock._seed == stock.bindings["seed"] == 12
    env = make_env(env_id=zork1)
    env.seed(0)
    env.reset()
    assert (
        env.episode_seed
        >= FIRST_SEED
        > max(r["seed"] for r in jericho.defines.BINDINGS_DICT.values())
    )


def test_train_and_eval_seeds_are_disjoint_and_spread():
    grid = [(seed, env, episode) for seed in range(4) for env in range(6) for episode in range(40)]
    train = {episode_seed(*key, "train") for key in grid}
    evaluation = {episode_seed(*key, "eval") for key in grid}
    assert len(train) == len(evaluation) == len(grid)
    assert not train & evaluation
    assert all(seed % 2 == 0 for seed in train) and all(
        seed % 2 == 1 for seed in evaluation
    )  # by construction
    assert all(FIRST_SEED <= seed < 2**31 for seed in train | evaluation)
    assert episode_seed(0, 1, 0, "train") != episode_seed(
        1, 0, 0, "train"
    )  # DI-engine's seed + i would collide


# To the troll with lamp and sword, then fight: what happens is up to the random numbers.
FIGHT = [
    "s",
    "e",
    "open window",
    "w",
    "w",
    "take lamp",
    "take sword",
    "move rug",
    "open trap door",
    "turn on lamp",
    "d",
    "n",
    *["attack troll with sword"] * 4,
]


def test_episodes_differ_by_seed_and_repeat_by_seed(zork1, make_env):
    def fights(**settings) -> list[str]:
        env = make_env(
            env_id=zork1, extra_actions=FIGHT, observation_parts=["feedback"], **settings
        )
        texts = []
        for _ in range(4):
            env.reset()
            text = ""
            for command in FIGHT:
                timestep = env.step(command)
                text += timestep.obs["text"]
                if timestep.done:
                    break
            texts.append(text)
        return texts

    first = fights(seed=0)
    assert fights(seed=0) == first
    assert len(set(first)) > 1  # each episode its own seed
    assert fights(seed=0, env_index=1) != first and fights(seed=0, split="eval") != first


def test_random_play_is_reproducible_whatever_the_cache_holds(zork1, make_env, tmp_path):
    """Valid actions do not depend on who asked first: two empty caches and a full one give the same
    episodes.
    """
    paths = [tmp_path / "a.sqlite", tmp_path / "b.sqlite", tmp_path / "a.sqlite"]
    traces = [
        play(make_env(env_id=zork1, seed=5, action_cache=str(path)), random.Random(1), 30)
        for path in paths
    ]
    assert traces[0] == traces[1] == traces[2]


# --- steps ----------------------------------------------------------------------------------------


def test_invalid_action_raises_and_changes_nothing(make_env):
    env = make_env(env_id=COIN)
    obs = env.reset()
    with pytest.raises(ValueError, match="'sing' is not valid.*valid are"):
        env.step("sing")
    assert env.step(obs["valid_actions"][0]).obs["timestep"] == 1


def test_step_outside_an_episode(make_env):
    env = make_env(env_id=COIN, max_steps=1)
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look")
    env.reset()
    timestep = env.step("look")
    assert timestep.done and timestep.info["truncated"] and not timestep.info["terminated"]
    assert timestep.info["done_kind"] == "truncated" and timestep.obs["valid_actions"]
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look")


# --- faults of the interpreter --------------------------------------------------------------------


@pytest.mark.parametrize(("command", "count"), [("hang", "hangs"), ("crash", "deaths")])
def test_a_fault_truncates_the_episode_and_the_next_one_works(
    make_env, failing_story, command, count
):
    env = make_env(env_id=failing_story(), step_timeout_s=0.7, action_cache=None)
    first = env.reset()
    obs = env.step("east").obs
    timestep = env.step(command)
    assert timestep.done and timestep.info["truncated"] and not timestep.info["terminated"]
    assert timestep.info["done_kind"] == "hang" and f"step('{command}',)" in timestep.info["fault"]
    assert timestep.reward == 0 and timestep.info["eval_episode_return"] == 1.0
    assert timestep.obs["text"] == obs["text"] and timestep.obs["timestep"] == 2
    assert env.stats()[count] == 1 and env.stats()["hangs"] + env.stats()["deaths"] == 1

    assert env.reset()["text"] == first["text"] and not env.step("east").done
    assert env.stats()["respawns"] == 1


def test_repeated_faults_in_the_middle_are_survived(make_env, failing_story):
    """A command that always crashes is no reason to end a run."""
    env = make_env(env_id=failing_story(), action_cache=None)
    for _ in range(3):
        env.reset()
        assert env.step("crash").info["done_kind"] == "hang"
    assert env.reset()["valid_actions"] and env.stats()["deaths"] == 3


def test_a_hang_while_finding_valid_actions_truncates_the_episode(make_env, failing_story):
    env = make_env(
        env_id=failing_story("describe_later:hang"), action_cache=None, describe_timeout_s=0.7
    )
    env.reset()
    timestep = env.step("east")
    assert timestep.info["done_kind"] == "hang" and "describe" in timestep.info["fault"]
    assert env.reset()["valid_actions"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("open:crash", "SIGSEGV (Segmentation fault) in open"),
        ("reset:crash", "SIGSEGV (Segmentation fault) in reset"),
        ("describe:crash", "SIGSEGV (Segmentation fault) in describe"),
        ("open:raise", "OSError: the story is damaged in open"),
    ],
)
def test_an_interpreter_that_fails_at_the_start_is_one_clear_error(
    make_env, failing_story, words, reason
):
    """Twice the same way, so the story is the fault: no more attempts, no advice on time limits."""
    story = failing_story(words)
    env = make_env(env_id=story, action_cache=None, reset_attempts=50)
    with pytest.raises(PriorZeroError, match=re.escape(reason)) as caught:
        env.reset()
    message = str(caught.value)
    assert story in message and "choose another game" in message and "timeout" not in message
    assert env.stats()["deaths"] == 2 and env.stats()["respawns"] == 1


def test_a_group_tells_a_common_error_once(failing_story):
    story = failing_story("open:crash")
    group = GameEnvGroup(
        [partial(TextGameEnv, {"env_id": story, "action_cache": None}) for _ in range(3)], seed=0
    )
    try:
        with pytest.raises(PriorZeroError, match="in 3 of 3 environments: env 0, 1, 2:") as caught:
            group.reset()
        assert str(caught.value).count("SIGSEGV") == 1
    finally:
        group.close()


def test_a_reset_that_hangs_gives_up_after_its_attempts(make_env, failing_story):
    env = make_env(
        env_id=failing_story("reset:hang"), action_cache=None, step_timeout_s=0.3, reset_attempts=3
    )
    with pytest.raises(PriorZeroError, match="3 attempts.*step_timeout_s"):
        env.reset()
    assert env.stats()["hangs"] == 3


# --- settings and texts ---------------------------------------------------------------------------


def test_a_state_cache_of_ones_own_and_a_state_without_valid_actions(make_env, detective):
    """The fallback commands are offered where the cache knows of none."""
    env = make_env(env_id=detective, fallback_actions=["wait", "look"])
    start = env.reset()
    cache = ValidActionCache(None)
    cache.put(env.game.story_key, start["state_hash"], StateDetails((), "Dark.", ""))

    env.use_state_cache(cache)
    assert env.reset()["valid_actions"] == ("look", "wait") != start["valid_actions"]
    assert env.stats()["fallback_states"] == 1


def test_text_says_nothing_twice():
    details = StateDetails(("n",), "Hall\nA hall.", "You carry nothing.")

    def text(feedback, parts=("feedback", "look", "inventory"), terminated=False):
        return compose_text(GameState(feedback, 0.0, terminated, False, 1, "h"), details, parts)

    assert text("Taken.") == "Taken.\nHall\nA hall.\nYou carry nothing."
    assert text("Hall\n\nA hall.") == "Hall\n\nA hall.\nYou carry nothing."  # moving shows the room
    assert text("Hall") == "Hall\nA hall.\nYou carry nothing."  # a known room answers with its name
    assert text("You carry nothing.") == "You carry nothing.\nHall\nA hall."
    assert (
        text("Taken.", parts=("feedback",)) == "Taken."
        and text("You died.", terminated=True) == "You died."
    )


# --- several environments -------------------------------------------------------------------------


def test_di_engine_base_manager_runs_it():
    from ding.envs import BaseEnvManager, create_env_manager, get_vec_env_setting

    cfg = EasyDict(
        env_id=COIN,
        type="priorzero_text_game",
        import_names=["priorzero.games.env"],
        collector_env_num=2,
        evaluator_env_num=1,
        manager={**BaseEnvManager.default_config(), "type": "base", "auto_reset": False},
    )
    env_fn, collect, evaluate = get_vec_env_setting(cfg)
    assert [c.env_index for c in collect] == [0, 1] and [c.split for c in collect + evaluate] == [
        "train",
        "train",
        "eval",
    ]
    manager = create_env_manager(cfg.manager, [partial(env_fn, cfg=c) for c in collect])
    manager.seed(0)
    manager.launch()
    obs = manager.ready_obs
    timesteps = manager.step({i: obs[i]["valid_actions"][0] for i in obs})
    assert set(timesteps) == {0, 1} and timesteps[1].obs["timestep"] == 1
    assert np.isscalar(timesteps[0].reward)
    manager.close()


def test_group_overlaps_calls_and_keeps_apart_what_fails(failing_story):
    settings = {"env_id": failing_story(), "action_cache": None, "step_timeout_s": 1.0}
    group = GameEnvGroup([partial(TextGameEnv, settings) for _ in range(4)], seed=3)
    try:
        assert set(group.reset()) == {0, 1, 2, 3}
        assert len({env.episode_seed for env in group.envs}) == 4

        start = time.monotonic()
        timesteps = asyncio.run(_in_thread(group.step, dict.fromkeys(range(4), "hang")))
        assert time.monotonic() - start < 3  # four hangs of one second each, at once
        assert [timesteps[i].info["done_kind"] for i in range(4)] == ["hang"] * 4
        assert group.stats()["hangs"] == 4

        assert set(group.reset([1, 2, 3])) == {1, 2, 3}
        with pytest.raises(ValueError, match="action 'sing'") as caught:
            group.step({1: "east", 2: "sing", 3: "east"})
        assert caught.value.__notes__ == ["raised by step of environment 2"]
        assert group.step({1: "east"})[1].obs["timestep"] == 2  # the others had been stepped
    finally:
        group.close()


async def _in_thread(function, *arguments):
    return await asyncio.to_thread(function, *arguments)


def test_closing_a_group_cuts_a_hanging_call_short(failing_story):
    settings = {"env_id": failing_story(), "action_cache": None, "step_timeout_s": 60.0}
    group = GameEnvGroup([partial(TextGameEnv, settings)], seed=0)
    group.reset()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(group.step, {0: "hang"})
        time.sleep(0.5)
        start = time.monotonic()
        group.close()
        assert time.monotonic() - start < 5
        assert running.result()[0].info["done_kind"] == "hang"
