"""TextWorld-Express and ScienceWorld beyond the contract of all kinds: ids, variations, scores,
what is said where a part is missing, and that no virtual machine is left behind.
"""

from __future__ import annotations

import importlib.metadata
import time

import psutil
import pytest

from priorzero.games import java_games, kinds
from priorzero.games.catalogue import list_games, resolve_game
from priorzero.games.env import SPLITS, episode_seed
from priorzero.games.java_games import GameId, variation_of
from priorzero.games.process import GameProcess
from priorzero.types import PriorZeroError

LIMIT = 60.0
IDS = {"textworld-express": "twx-coin", "scienceworld": "sw-boil"}
MISSING = [package for package in IDS if not java_games.is_installed(package)]
needs = {
    package: pytest.mark.skipif(
        package in MISSING, reason=f"{package} or Java is not installed (requirements/more_games)"
    )
    for package in IDS
}


@pytest.fixture
def play():
    """`play(env_id)`: an interpreter process of a game."""
    processes = []

    def make(env_id: str) -> GameProcess:
        spec = resolve_game(env_id)
        processes.append(GameProcess(spec.kind, spec.path))
        return processes[-1]

    yield make
    for process in processes:
        process.close()


# ---- without the packages ------------------------------------------------------------------------


@pytest.mark.parametrize("package", IDS)
def test_a_missing_package_is_said_with_the_command_that_installs_it(package, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(PriorZeroError, match=f"{package} .*pip install .*more_games.txt"):
        resolve_game(IDS[package])
    assert not any("ScienceWorld" in line or "twx-" in line for line in list_games())


def test_the_command_installs_the_versions_that_messages_name():
    lines = (kinds.Path(__file__).parents[2] / "requirements/more_games.txt").read_text()
    for kind in ("textworld_express", "scienceworld"):
        module = kinds.plugins.load(kinds.__name__, kind)
        assert f"{module.PACKAGE}=={module.PINNED}" in lines


def test_missing_java_is_said(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PriorZeroError, match="no `java` on PATH; install"):
        resolve_game("twx-coin")


def test_ids():
    game = GameId.parse("twx-coin: seed=3, numLocations=5")
    assert (game.prefix, game.game, game.number("seed"), game.number("eval")) == (
        ("twx", "coin", 3, None)
    )
    assert str(game) == "twx-coin:numLocations=5,seed=3"
    assert GameId.parse(str(game)) == game
    assert GameId.parse("sw-lifespan-longest-lived").game == "lifespan-longest-lived"
    for text in ("twx-coin:seed", "twx-coin:seed=", "twx-coin:seed=1,seed=2"):
        with pytest.raises(PriorZeroError, match="option=value"):
            GameId.parse(text)
    with pytest.raises(PriorZeroError, match="whole number"):
        GameId.parse("twx-coin:seed=-1").number("seed")


def test_evaluation_draws_other_variations_than_training():
    training, evaluation = range(100), range(20_000, 20_100)
    drawn = {
        split: {
            variation_of(episode_seed(7, env, episode, split), training, evaluation, None)
            for env in range(4)
            for episode in range(100)
        }
        for split in SPLITS
    }
    # 400 draws of 100: about 98 are met.
    assert drawn["train"] <= set(training) and len(drawn["train"]) > 80
    assert drawn["eval"] <= set(evaluation) and len(drawn["eval"]) > 80
    assert variation_of(5001, training, evaluation, 42) == 42


# ---- with them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, message",
    [
        pytest.param(env_id, message, marks=needs["textworld-express"])
        for env_id, message in (
            ("twx-chess", "has no game 'chess'; it has arithmetic, coin"),
            ("twx-coin:numLocations=99", "less than or equal to 11"),
            ("twx-coin:rooms=3", "Known properties: numLocations"),
            ("twx-coin:seed=5000", "there are 0 to 999 .train."),
            ("twx-coin:eval=train", "give dev or test"),
        )
    ]
    + [
        pytest.param(env_id, message, marks=[needs["scienceworld"], pytest.mark.slow])
        for env_id, message in (
            ("sw-fly", "Unknown taskName"),
            ("sw-boil:seed=3", "there is no option seed; a task has variation"),
            ("sw-boil:variation=30", "there are 0 to 29"),
            ("sw-boil:simplify=easier", "Unknown simplification"),
        )
    ],
)
def test_impossible_games_are_refused(env_id, message):
    with pytest.raises(PriorZeroError, match=message):
        resolve_game(env_id)


@needs["textworld-express"]
def test_drawn_variations_are_the_package_s_own_and_tell_their_task(play):
    """Against the package itself, opened here."""
    from textworld_express import TextWorldExpressEnv

    process, reference = play("twx-mapreader"), TextWorldExpressEnv()
    reference.load("mapreader", "")
    tasks = set()
    for seed, own, fold in ((5000, 500, "train"), (5001, 20_500, "test"), (7002, 501, "train")):
        state = process.call("reset", seed, timeout_s=LIMIT)
        observation, infos = reference.reset(seed=own, gameFold=fold)
        task = infos["taskDescription"]
        assert state.feedback.split() == observation.split()
        assert state.details.look.split() == f"Your task: {task} {infos['look']}".split()
        assert set(state.details.valid_actions) == set(infos["validActions"])
        tasks.add(task)
    reference.close()
    assert len(tasks) == 3


@needs["textworld-express"]
def test_a_failed_task_has_no_points(play):
    """Simon says: one right command, then a wrong one."""
    spec = resolve_game("twx-simonsays:seed=1")
    process = play(spec.env_id)
    process.call("reset", 0, timeout_s=LIMIT)
    state = process.call("step", spec.walkthrough[0], timeout_s=LIMIT)
    assert state.score == pytest.approx(100 / len(spec.walkthrough))

    wrong = next(a for a in state.details.valid_actions if a != spec.walkthrough[1])
    state = process.call("step", wrong, timeout_s=LIMIT)
    assert (state.score, state.terminated, state.won) == (0.0, True, False)


@needs["scienceworld"]
@pytest.mark.slow
def test_a_failed_science_task_has_no_points(play):
    """Two commands of the expert earn points; to focus on a wrong thing fails."""
    process = play("sw-find-living-thing:simplify=easy,variation=0")
    state = process.call("reset", 0, timeout_s=LIMIT)
    assert state.score > 0
    state = process.call("step", "focus on agent", timeout_s=LIMIT)
    assert (state.score, state.terminated, state.won) == (0.0, True, False)


@needs["textworld-express"]
@pytest.mark.parametrize("way", ["kill", "close"])
def test_no_virtual_machine_is_left(play, way):
    process = play("twx-coin:seed=1")
    process.call("reset", 0, timeout_s=LIMIT)
    machines = psutil.Process(process.pid).children()
    assert [machine.name() for machine in machines] == ["java"]

    getattr(process, way)()
    deadline = time.monotonic() + 20
    while any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in machines):
        assert time.monotonic() < deadline, "the virtual machine outlives its worker"
        time.sleep(0.05)
