"""Every kind of game against the contract of `priorzero.games.kinds`, in interpreter processes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from priorzero.games import kinds
from priorzero.games.catalogue import list_games, resolve_game
from priorzero.games.process import GameProcess
from priorzero.games.records import GameSpec, GameState, StateDetails
from priorzero.games.story_files import search_folders
from priorzero.types import PriorZeroError
from tests.games.conftest import story_folders

SLOW_KINDS = {"scienceworld"}  # a tenth of a second a step
LIMIT = 60.0
SEED = 5000
STEPS = 15


class Player:
    """A game in its process; every state comes with its details."""

    def __init__(self, spec: GameSpec) -> None:
        self._process = GameProcess(spec.kind, spec.path)

    def reset(self, seed: int) -> GameState:
        return self._process.call("reset", seed, timeout_s=LIMIT)

    def step(self, action: str) -> GameState:
        return self._process.call("step", action, timeout_s=LIMIT)

    def describe(self) -> StateDetails:
        return self._process.call("describe", timeout_s=LIMIT)

    def outcomes(self, seed: int, played: list[str], actions: tuple[str, ...]) -> list[GameState]:
        return self._process.call("outcomes", seed, played, actions, timeout_s=LIMIT)

    def snapshot(self) -> Any:
        return self._process.call("snapshot", timeout_s=LIMIT)

    def restore(self, snapshot: Any) -> None:
        self._process.call("restore", snapshot, timeout_s=LIMIT)

    def close(self) -> None:
        self._process.close()


@pytest.fixture(
    params=[
        pytest.param(kind, marks=pytest.mark.slow if kind in SLOW_KINDS else ())
        for kind in kinds.names()
    ]
)
def spec(request, monkeypatch) -> GameSpec:
    folders = ":".join(map(str, story_folders()))
    monkeypatch.setenv("PRIORZERO_GAMES", folders)
    example = kinds.load(request.param).example
    try:
        found = kinds.load(request.param).find(example, search_folders())
    except PriorZeroError as error:
        if "more_games.txt" in str(error) or "no `java`" in str(error):
            pytest.skip(str(error))
        raise
    if found is None:
        pytest.skip(f"{example}, the example of {request.param}, is not at hand")
    return found


@pytest.fixture
def player(spec):
    players = []

    def make() -> Player:
        players.append(Player(spec))
        return players[-1]

    yield make
    for one in players:
        one.close()


def test_all_kinds_are_found():
    assert set(kinds.names()) == {"jericho", "scienceworld", "textworld", "textworld_express"}


def test_a_kind_finds_its_example_and_nothing_else(spec):
    game_class = kinds.load(spec.kind)
    assert resolve_game(game_class.example) == spec
    assert spec.max_score > 0 and spec.max_steps > 0 and spec.goal and spec.story_key
    assert game_class.find("no such game at all", search_folders()) is None
    assert game_class.how_to_get and set(game_class.available(search_folders())) <= set(
        list_games()
    )


def test_equal_seeds_and_actions_give_equal_traces(player):
    """A twin that is described at no step plays like the one that is described at every step."""
    described, twin = player(), player()
    choice = random.Random(3)

    # The second episode begins in the middle of the first.
    for _ in range(2):
        state = described.reset(SEED)
        assert state == twin.reset(SEED) and not state.terminated

        for _ in range(STEPS):
            details = described.describe()
            action = choice.choice(details.valid_actions or ("look",))
            state = described.step(action)
            assert state == twin.step(action)
            if state.terminated:
                break


def test_a_snapshot_goes_on_alike_in_another_process(player):
    """Random numbers included; the other one has never been reset, or is in another state."""
    first, second = player(), player()
    first.reset(SEED)
    choice = random.Random(1)
    for _ in range(2):
        for _ in range(3):
            first.step(choice.choice(("north", "west", "east", "take all")))
        snapshot = first.snapshot()
        if snapshot is None:
            pytest.skip("a kind without snapshots")

        second.restore(snapshot)
        for _ in range(2):
            details = first.describe()
            assert second.describe() == details
            action = choice.choice(details.valid_actions or ("look",))
            assert first.step(action) == second.step(action)


def test_details_are_sorted_without_duplicates_and_belong_to_the_hash(player):
    """Equal hash, equal details, whatever led to the state and whatever was drawn on the way."""
    game = player()
    known: dict[str, StateDetails] = {}
    met_again = 0

    for episode in range(3):
        choice = random.Random(episode)
        state = game.reset(SEED + episode)
        for _ in range(STEPS):
            details = game.describe()
            assert details.valid_actions == tuple(sorted(set(details.valid_actions)))
            assert all(a == a.strip() != "" for a in details.valid_actions)
            if state.details is not None:
                assert state.details == details

            met_again += state.state_hash in known
            assert known.setdefault(state.state_hash, details) == details

            state = game.step(choice.choice(details.valid_actions or ("look",)))
            if state.terminated:
                break
    assert met_again and len(known) > 1


def test_outcomes_are_what_stepping_there_leads_to(spec, player):
    """Against a twin that is played up to the state for every command; the game stays where it is.

    The commands are some of the listed ones, and one that the game does not understand.
    """
    game, twin = player(), player()
    game.reset(SEED)
    played = list(spec.walkthrough[:3])
    for command in played:
        state = game.step(command)
    actions = (*game.describe().valid_actions[:4], "xyzzq")

    asked = game.outcomes(SEED, played, actions)
    for action, got in zip(actions, asked, strict=True):
        twin.reset(SEED)
        for command in played:
            twin.step(command)
        assert got == twin.step(action)
    assert len({one.state_hash for one in asked}) > 1

    following = spec.walkthrough[3]
    assert game.step(following) == game_after(twin, [*played, following])
    assert state.state_hash in {one.state_hash for one in asked}  # "xyzzq" changes nothing


def test_an_outcome_that_ends_the_game_is_undone(detective):
    """Going north there is fatal; what is asked after it knows nothing of it, nor does the game."""
    spec = resolve_game(detective)
    game, played = Player(spec), list(spec.walkthrough[:9])
    try:
        game.reset(spec.walkthrough_seed)
        for command in played:
            game.step(command)
        before, fatal, after = game.outcomes(spec.walkthrough_seed, played, ("e", "north", "e"))
        assert fatal.terminated and not fatal.won
        assert before == after == game.step("e") and not after.terminated
    finally:
        game.close()


def game_after(player: Player, commands: list[str]) -> GameState:
    player.reset(SEED)
    for command in commands:
        state = player.step(command)
    return state


def test_the_walkthrough_ends_the_game_with_its_maximum(spec, player):
    game = player()
    game.reset(spec.walkthrough_seed)
    assert spec.walkthrough
    for command in spec.walkthrough:
        state = game.step(command)

    assert state.terminated and state.won and state.score == spec.max_score
    assert state.details is not None and state.details.valid_actions == ()
    assert not game.reset(SEED).terminated
