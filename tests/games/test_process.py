"""Interpreter processes: what they load, hangs, crashes, orphans; describing a state does not touch
the game.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from priorzero.games import backends
from priorzero.games.catalogue import resolve_game
from priorzero.games.process import GameProcess, Nursery, WorkerDied, WorkerError, WorkerTimeout

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 30.0


@pytest.fixture
def game(detective):
    process = GameProcess("jericho", detective)
    yield process
    process.close()


def _gone(pid: int) -> bool:
    """Ended; an orphan nobody reaps stays a zombie, which is just as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def _wait_gone(pid: int, seconds: float = 8.0) -> bool:
    end = time.monotonic() + seconds
    while not _gone(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return _gone(pid)


def test_hang_is_killed_and_the_next_call_respawns_in_milliseconds(game):
    game.call("reset", 5000, timeout_s=LIMIT)
    pid = game.pid
    game.call("hang_next", "step", timeout_s=LIMIT)
    start = time.monotonic()
    with pytest.raises(WorkerTimeout, match="within 0.5 s"):
        game.call("step", "north", timeout_s=0.5)
    assert time.monotonic() - start < 3 and _wait_gone(pid)
    start = time.monotonic()
    assert game.call("reset", 5000, timeout_s=LIMIT).score == 10
    assert time.monotonic() - start < 1.0 and game.spawns == 2 and game.pid != pid


def test_killed_worker_is_reported_and_replaced(game):
    game.call("reset", 5000, timeout_s=LIMIT)
    os.kill(game.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        game.call("step", "north", timeout_s=LIMIT)
    assert "Chief's office" in game.call("reset", 5000, timeout_s=LIMIT).feedback


def test_python_exception_in_the_worker_carries_its_traceback(game):
    game.call("reset", 5000, timeout_s=LIMIT)
    with pytest.raises(WorkerError, match="AttributeError"):
        game.call("no_such_method", timeout_s=LIMIT)


def test_dead_nursery_is_restarted(game):
    game.call("reset", 5000, timeout_s=LIMIT)
    nursery, worker = Nursery.of("jericho"), game.pid
    os.kill(nursery._process.pid, signal.SIGKILL)
    assert _wait_gone(worker)  # no worker outlives its nursery
    with pytest.raises(WorkerDied):
        game.call("step", "north", timeout_s=LIMIT)
    assert game.call("reset", 5000, timeout_s=LIMIT).score == 10


def test_workers_ignore_sigint_and_load_no_torch(game):
    game.call("reset", 5000, timeout_s=LIMIT)
    os.kill(game.pid, signal.SIGINT)
    assert game.call("step", "north", timeout_s=LIMIT).moves >= 1
    libraries = Path(f"/proc/{game.pid}/maps").read_text()
    assert "libfrotz" in libraries and "libtorch" not in libraries


_PARENT = """
import sys, time
print("main ran", flush=True)   # no __main__ guard: a worker that imported this again would print it again, or worse
from priorzero.games.process import GameProcess, Nursery
game = GameProcess("jericho", sys.argv[1])
game.call("reset", 5000, timeout_s=60)
game.call("hang_next", "step", timeout_s=60)
print(game.pid, Nursery.of("jericho")._process.pid, flush=True)
if sys.argv[2] == "hang":
    game.call("step", "north", timeout_s=600)
"""


@pytest.mark.parametrize("ending", ["exit", "hang"])
def test_nothing_outlives_the_parent(detective, tmp_path, ending):
    """Once by a normal exit, once by SIGKILL while the worker hangs in C code."""
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(script), detective, ending], stdout=subprocess.PIPE, text=True, env=env
    )
    assert parent.stdout.readline() == "main ran\n"
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    if ending == "hang":
        time.sleep(0.3)
        assert not any(map(_gone, pids))
        parent.kill()
    parent.wait(20)
    assert parent.stdout.read() == ""
    parent.stdout.close()
    assert all(map(_wait_gone, pids))


def test_describing_a_state_leaves_the_game_alone(zork1):
    """A game described at every step plays like its undisturbed twin, random numbers included."""
    described, twin = GameProcess("jericho", zork1), GameProcess("jericho", zork1)
    choice = random.Random(3)
    try:
        assert described.call("reset", 7001, timeout_s=LIMIT) == twin.call(
            "reset", 7001, timeout_s=LIMIT
        )
        for _ in range(60):
            details = described.call("describe", timeout_s=LIMIT)
            assert list(details.valid_actions) == sorted(set(details.valid_actions))
            action = choice.choice(details.valid_actions or ("look",))
            state = described.call("step", action, timeout_s=LIMIT)
            assert state == twin.call("step", action, timeout_s=LIMIT)
            if state.terminated:
                break
    finally:
        described.close()
        twin.close()


TO_THE_TROLL = (
    "s/e/open window/w/w/take lamp/take sword/move rug/open trap door/turn on lamp/d/n".split("/")
)


def test_valid_actions_depend_on_the_world_state_alone(zork1):
    """In the troll's room Jericho's own list varies with the random numbers drawn so far (7 lists
    for one state).
    """
    game = GameProcess("jericho", zork1)
    lists: dict[str, set] = {}
    try:
        for seed in range(1000, 1012):
            game.call("reset", seed, timeout_s=LIMIT)
            for command in TO_THE_TROLL:
                state = game.call("step", command, timeout_s=LIMIT)
            lists.setdefault(state.state_hash, set()).add(game.call("describe", timeout_s=LIMIT))
    finally:
        game.close()
    assert len(lists) < 12 and all(len(found) == 1 for found in lists.values())


def test_walkthrough_of_zork1_wins_under_its_seed(zork1):
    spec = resolve_game(zork1)
    game = GameProcess("jericho", zork1)
    try:
        game.call("reset", spec.walkthrough_seed, timeout_s=LIMIT)
        for command in spec.walkthrough:
            state = game.call("step", command, timeout_s=LIMIT)
        assert (state.score, state.won, state.terminated) == (350, True, True)
        assert state.details.valid_actions == ()
    finally:
        game.close()


def test_textworld_noise_is_dropped():
    banner = (
        "\n\n   ________  ________\n  |        \\|        \\\n   \\$$$$$$$$| $$$$$$$$|\n             | $$/  $\\| $$|"
        " $$\n   \n"
    )
    raw = banner + "Cook!\n\n-= Kitchen =-\nA   room.\n\n\n\n>" + " " * 90 + "-= Kitchen =-0/1"
    assert backends.tidy_textworld(raw) == "Cook!\n\n-= Kitchen =-\nA room."
    assert (
        backends.tidy_textworld("You won.\n\nWould you like to RESTART, RESTORE a saved game\n>   ")
        == "You won."
    )
