"""Walks: which commands are right is decided by the states they lead to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from priorzero.evidence import walk as module
from priorzero.evidence.walk import walk
from priorzero.games.catalogue import resolve_game
from priorzero.games.process import GameProcess
from priorzero.games.records import GameSpec, GameState, StateDetails, WorkerDied
from priorzero.types import PriorZeroError

SPEC = GameSpec("script", "script", "script.z5", "Script", "Win.", 10.0, 50, "script")

# State -> command -> next state. "n" is what the list spells "north"; "jump" does nothing; "dig" is
# in no list; at the gate both commands win.
MAP = {
    "hut": {"n": "road", "north": "road", "south": "pit", "jump": "hut"},
    "road": {"dig": "gate", "north": "hut", "south": "pit"},
    "gate": {"enter": "won", "walk in": "won", "wait": "gate"},
}
LISTED = {
    "hut": ("jump", "north", "south"),
    "road": ("north", "south"),
    "gate": ("enter", "wait", "walk in"),
}
POINTS = {"gate": 5.0, "won": 10.0}


class ScriptedProcess:
    """A `GameProcess` that plays the map."""

    broken_at = ""  # a state whose outcomes the interpreter does not survive

    def __init__(self, kind: str, path: str) -> None:
        self.at = ""

    def call(self, method: str, *arguments, timeout_s: float):
        if method == "reset":
            self.at = "hut"
            return self.state(self.at)
        if method == "step":
            self.at = MAP[self.at][arguments[0]]
            return self.state(self.at)
        assert method == "outcomes", method
        if self.at == self.broken_at:
            raise WorkerDied(f"the worker ended at the {self.at}\nand more")
        return [self.state(MAP[self.at][action]) for action in arguments[2]]

    def state(self, name: str) -> GameState:
        won = name == "won"
        details = StateDetails(LISTED.get(name, ()), "", "")
        return GameState(f"At the {name}.", POINTS.get(name, 0.0), won, won, 0, name, details)

    def close(self) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "GameProcess", ScriptedProcess)
    monkeypatch.setattr(ScriptedProcess, "broken_at", "")

    def make(*commands: str, limit: int = 0, history_length: int = 5):
        return walk(replace(SPEC, walkthrough=commands), limit, history_length)

    return make


def test_commands_are_equal_by_the_state_they_lead_to(scripted):
    jump, north, dig, enter = scripted("jump", "n", "dig", "enter", "never typed").steps

    assert jump.idle and jump.listed and not jump.judged
    # "n" is spelled "north" in the list; "south" and "jump" lead elsewhere, each to its own state.
    assert north.right.tolist() == [False, True, False] and north.judged
    assert len({*north.outcomes}) == 3
    assert not dig.listed and not dig.judged and not dig.idle
    assert enter.outcomes == (0, 1, 0) and enter.judged


def test_states_are_what_an_agent_would_have_seen(scripted):
    *_, enter = scripted("jump", "n", "dig", "enter").steps
    assert enter.state.observation == "At the gate." and enter.state.score == 5.0
    assert enter.state.valid_actions == LISTED["gate"] and enter.state.goal == "Win."
    # "n" stands there as the list spells it; what is in no list, and what did nothing, as typed.
    assert [(h.action, h.reward) for h in enter.state.history] == [
        ("jump", 0.0),
        ("north", 0.0),
        ("dig", 5.0),
    ]
    assert enter.state.history[1].observation == "At the hut."


def test_limit_and_history_are_kept(scripted):
    walked = scripted("jump", "n", "dig", "enter", limit=3, history_length=1)
    assert [step.command for step in walked.steps] == ["jump", "n", "dig"]
    assert [len(step.state.history) for step in walked.steps] == [0, 1, 1]


def test_a_fault_ends_the_walk_and_is_told(scripted):
    ScriptedProcess.broken_at = "gate"
    walked = scripted("n", "dig", "enter")
    assert [step.command for step in walked.steps] == ["n", "dig"]
    assert walked.fault == "the worker ended at the gate"


def test_what_cannot_be_walked_is_refused(scripted):
    with pytest.raises(PriorZeroError, match="script has no walkthrough"):
        scripted()
    ScriptedProcess.broken_at = "hut"
    with pytest.raises(PriorZeroError, match="cannot be walked: the worker ended at the hut"):
        scripted("n")


def test_a_generated_game_against_a_twin(monkeypatch, tmp_path):
    """Every right command of the first steps leads where the expert's leads, every other does not;
    looked up in a process of its own.
    """
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path))
    game = resolve_game("tw-simple")
    walked = walk(game, 3, 5)
    assert [step.command for step in walked.steps] == list(game.walkthrough[:3])

    twin = GameProcess(game.kind, game.path)
    try:
        for place, step in enumerate(walked.steps):
            led_to = {}
            for command in (step.command, *step.state.valid_actions):
                twin.call("reset", game.walkthrough_seed, timeout_s=60)
                for earlier in game.walkthrough[:place]:
                    twin.call("step", earlier, timeout_s=60)
                led_to[command] = twin.call("step", command, timeout_s=60).state_hash
            goal = led_to[step.command]
            expected = [led_to[action] == goal for action in step.state.valid_actions]
            assert step.right.tolist() == expected and sum(expected) == 1 and step.judged
    finally:
        twin.close()


def test_abbreviations_of_a_story_are_known(story):
    """Detective's walkthrough shouts and abbreviates: TAKE PAPER, READ PAPER, ..., W."""
    walked = walk(resolve_game(story("detective.z5")), 5, 5)
    take, read, _, _, west = walked.steps
    assert west.command == "W" and west.judged
    assert [a for a, r in zip(west.state.valid_actions, west.right, strict=True) if r] == ["west"]
    assert take.state.valid_actions[take.outcomes.index(0)] == "take paper"
    assert read.idle
