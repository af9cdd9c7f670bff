"""Listing ahead of need: the same play, less to wait for, faults survived, nothing left."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from priorzero.games.ahead import NICENESS
from priorzero.games.env import TextGameEnv
from priorzero.games.group import GameEnvGroup
from priorzero.games.valid_actions import ValidActionCache

LIMIT_S = 60.0


@pytest.fixture
def make_group():
    """GameEnvGroup of `count` environments, closed at the test's end."""
    groups = []

    def make(count: int, **settings) -> GameEnvGroup:
        groups.append(GameEnvGroup([TextGameEnv(settings) for _ in range(count)], seed=4))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


def wait_until(holds) -> None:
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def children() -> set[int]:
    """Interpreter processes below this one: the nurseries' children."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX":
                parents[int(entry.name)] = int(fields[1])
    nurseries = {pid for pid, parent in parents.items() if parent == os.getpid()}
    return {pid for pid, parent in parents.items() if parent in nurseries}


def play(group: GameEnvGroup, steps: int, pause_s: float) -> list[tuple]:
    """Random play of all environments as a comparable list, with a pause before each step."""
    choice = random.Random(7)
    present = group.reset()
    trace = [tuple(sorted((i, o["text"], o["valid_actions"]) for i, o in present.items()))]
    for _ in range(steps):
        taken = {i: choice.choice(o["valid_actions"]) for i, o in sorted(present.items())}
        time.sleep(pause_s)
        outcomes = group.step(taken)
        trace.append(
            tuple((i, t.obs["text"], t.obs["valid_actions"], t.reward) for i, t in outcomes.items())
        )
        ended = [i for i, t in outcomes.items() if t.done]
        present = {i: t.obs for i, t in outcomes.items()}
        if ended:
            present |= group.reset(ended)
    return trace


def test_play_is_the_same_with_and_without(make_group, tmp_path, zork1):
    """Zork draws random numbers (thief, lamp). What both caches know, they know alike."""
    known, traces, stats = [], [], []
    for workers in (0, 2):
        cache = tmp_path / f"{workers}.sqlite"
        group = make_group(
            2, env_id=zork1, max_steps=12, action_cache=str(cache), listing_workers=workers
        )
        traces.append(play(group, 16, 0.1 if workers else 0))
        stats.append(group.stats())
        group.close()
        with sqlite3.connect(cache) as db:
            known.append(dict(db.execute("SELECT state, payload FROM details")))

    assert traces[0] == traces[1]
    assert stats[0]["ahead_listed"] == 0 < stats[1]["ahead_used"] <= stats[1]["ahead_listed"]
    assert stats[1]["state_misses"] < stats[0]["state_misses"] and not stats[1]["ahead_faults"]
    assert known[0].keys() < known[1].keys()
    assert known[0].items() < known[1].items()


def test_successors_are_known_when_they_come(make_env, detective, tmp_path):
    cache = ValidActionCache(tmp_path / "states.sqlite")
    env = make_env(env_id=detective, listing_workers=1)
    env.use_state_cache(cache)
    present = env.reset()
    wait_until(lambda: not env.ahead.wants(present["state_hash"]))
    wait_until(lambda: env.ahead.stats()["ahead_listed"] >= 1)
    listed = env.ahead.stats()["ahead_listed"]

    # One of the actions leads to a listed state; without the pool it would be listed now.
    for action in present["valid_actions"]:
        env.reset()
        if env.step(action).obs["state_hash"] != present["state_hash"]:
            break
    env.close()
    assert env.stats()["state_misses"] == 1 and listed >= 1


def test_workers_yield_and_are_gone_after_the_last_environment(make_group, detective, tmp_path):
    before = children()
    settings = {"env_id": detective, "action_cache": str(tmp_path / "s.sqlite")}
    players, judges = (make_group(n, **settings, listing_workers=2) for n in (2, 1))
    players.reset()
    judges.reset([0])
    pool = players.envs[0].ahead
    assert pool is players.envs[1].ahead is judges.envs[0].ahead
    wait_until(lambda: len(children() - before) > 3)

    usual = os.getpriority(os.PRIO_PROCESS, 0)
    wait_until(lambda: pool.stats()["ahead_listed"] >= 1)
    found = sorted(os.getpriority(os.PRIO_PROCESS, pid) for pid in children() - before)
    assert found[:3] == [usual] * 3 and set(found[3:]) == {min(19, usual + NICENESS)}

    players.close()
    assert judges.step({0: "west"})[0].obs["valid_actions"]
    judges.close()
    assert children() - before == set()
    assert not [t for t in threading.enumerate() if t.name == "listing-ahead"]


@pytest.mark.parametrize("command", ["crash", "hang"])
def test_a_fault_ahead_costs_no_episode(make_env, failing_story, caplog, command):
    """The stand-in's valid actions crash and hang the process that tries them ahead."""
    env = make_env(env_id=failing_story(), action_cache=None, listing_workers=1, step_timeout_s=0.7)
    env.reset()
    wait_until(lambda: env.ahead.stats()["ahead_faults"] >= 1)
    timestep = env.step("east")
    assert timestep.info["done_kind"] == "running" and timestep.obs["valid_actions"]
    wait_until(lambda: env.ahead.stats()["ahead_faults"] >= 2)  # the replaced process went on
    assert env.stats()["hangs"] == env.stats()["deaths"] == env.stats()["respawns"] == 0
    assert "a process that lists ahead failed" in caplog.text


def test_generated_games_start_no_workers(make_env):
    env = make_env(env_id="tw-coin:level=3,seed=2", listing_workers=2)
    obs = env.reset()
    env.step(obs["valid_actions"][0])
    assert env.ahead is None
