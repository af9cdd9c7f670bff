"""Interpreter processes: what they load, hangs, crashes, orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from priorzero.games.catalogue import resolve_game
from priorzero.games.process import GameProcess, Nursery
from priorzero.games.records import WorkerDied, WorkerError, WorkerTimeout

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 30.0


@pytest.fixture
def game(detective):
    process = GameProcess("jericho", detective)
    yield process
    process.close()


@pytest.fixture
def failing(failing_story):
    """A GameProcess of a story that fails as the words say."""
    processes = []

    def make(words: str = "") -> GameProcess:
        processes.append(GameProcess("jericho", failing_story(words)))
        return processes[-1]

    yield make
    for process in processes:
        process.close()


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


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


def test_hang_is_killed_and_the_next_call_respawns_in_milliseconds(failing):
    game = failing()
    game.call("reset", 5000, timeout_s=LIMIT)
    pid = game.pid
    start = time.monotonic()
    with pytest.raises(WorkerTimeout, match="within 0.5 s") as caught:
        game.call("step", "hang", timeout_s=0.5)
    assert caught.value.way == ""
    assert time.monotonic() - start < 3 and _wait_gone(pid)

    start = time.monotonic()
    assert game.call("reset", 5000, timeout_s=LIMIT).score == 0
    assert time.monotonic() - start < 1.0 and game.spawns == 2 and game.pid != pid


@pytest.mark.parametrize(("words", "method"), [("open:crash", "open"), ("reset:crash", "reset")])
def test_a_crash_names_its_signal(failing, words, method):
    game = failing(words)
    with pytest.raises(WorkerDied, match="SIGSEGV") as caught:
        game.call("reset", 5000, timeout_s=LIMIT)
    assert caught.value.way == f"SIGSEGV (Segmentation fault) in {method}"


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
    worker = game.pid
    os.kill(_parent_of(worker), signal.SIGKILL)
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
# No __main__ guard: a worker that imported this again would print it again, or worse.
print("main ran", flush=True)
from priorzero.games.process import GameProcess, Nursery
game = GameProcess("jericho", sys.argv[1])
game.call("reset", 5000, timeout_s=60)
print(game.pid, flush=True)
sys.stdin.readline() if sys.argv[2] == "exit" else game.call("step", "hang", timeout_s=600)
"""


@pytest.mark.parametrize("ending", ["exit", "hang"])
def test_nothing_outlives_the_parent(failing_story, tmp_path, ending):
    """Once by a normal exit, once by SIGKILL while the worker hangs in C code."""
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"}
    parent = subprocess.Popen(
        [sys.executable, str(script), failing_story(), ending],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert parent.stdout.readline() == "main ran\n"
    worker = int(parent.stdout.readline())
    pids = [worker, _parent_of(worker)]
    if ending == "hang":
        time.sleep(0.3)
        assert not any(map(_gone, pids))
        parent.kill()
    else:
        parent.stdin.write("\n")
        parent.stdin.flush()
    parent.wait(20)
    assert parent.stdout.read() == ""
    parent.stdout.close()
    parent.stdin.close()
    assert all(map(_wait_gone, pids))


TO_THE_TROLL = (
    "s/e/open window/w/w/take lamp/take sword/move rug/open trap door/turn on lamp/d/n".split("/")
)


def test_valid_actions_depend_on_the_world_state_alone(zork1):
    """In the troll's room Jericho's own list varies with the random numbers drawn so far."""
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


def test_lists_do_not_depend_on_pythons_hash_seed(zork1, monkeypatch):
    """Jericho walks through sets of strings: with an egg to throw, its list would differ."""
    to_the_egg = "n/n/up/take egg".split("/")
    found = []
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        Nursery.of("jericho").close()
        game = GameProcess("jericho", zork1)
        try:
            game.call("reset", 5000, timeout_s=LIMIT)
            for command in to_the_egg:
                game.call("step", command, timeout_s=LIMIT)
            found.append(game.call("describe", timeout_s=LIMIT))
        finally:
            game.close()
    assert found[0] == found[1] == found[2]


def test_equal_hashes_are_equal_worlds(zork1):
    """Two states have one hash if and only if Jericho's is one and they read alike: against stock
    Jericho, after every command, also where a new episode begins in the middle of the game. No
    random number is drawn on the way.
    """
    import jericho

    stock = jericho.FrotzEnv(zork1, seed=5000)
    game = GameProcess("jericho", zork1)
    before_the_troll = TO_THE_TROLL[:-1]
    pairs = set()
    try:
        for _ in range(2):
            stock.reset()
            state = game.call("reset", 5000, timeout_s=LIMIT)
            for command in (*before_the_troll, "drop lamp", "take lamp", "wait"):
                before = stock.get_state()
                world = stock.get_world_state_hash(), stock.step("inventory")[0]
                stock.set_state(before)
                pairs.add((state.state_hash, *world, stock.step("look")[0]))
                stock.set_state(before)
                state = game.call("step", command, timeout_s=LIMIT)
                stock.step(command)
    finally:
        game.close()
    hashes, worlds = {pair[0] for pair in pairs}, {pair[1:] for pair in pairs}
    assert len(pairs) == len(hashes) == len(worlds) > len(before_the_troll)


def test_a_state_that_reads_differently_has_another_hash(zork1):
    """An egg that was taken from its nest and put back: the room reads differently from then on,
    and Jericho's own hash is what it was.
    """
    import jericho

    stock = jericho.FrotzEnv(zork1, seed=5000)
    game = GameProcess("jericho", zork1)
    worlds, hashes, rooms = [], [], []
    try:
        for commands in ("n/n/up/put egg in nest", "n/n/up/take egg/put egg in nest"):
            stock.reset()
            game.call("reset", 5000, timeout_s=LIMIT)
            for command in commands.split("/"):
                stock.step(command)
                state = game.call("step", command, timeout_s=LIMIT)
            worlds.append(stock.get_world_state_hash())
            hashes.append(state.state_hash)
            rooms.append(game.call("describe", timeout_s=LIMIT).look)
    finally:
        game.close()
    assert worlds[0] == worlds[1] and rooms[0] != rooms[1] and hashes[0] != hashes[1]


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
