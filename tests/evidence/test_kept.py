"""Walks on disk: known by what they come of, wherever the story lies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from priorzero.evidence.kept import kept_walk
from priorzero.evidence.walk import Walk, WalkStep
from priorzero.games.records import GameSpec
from priorzero.types import HistoryItem, TextState

GAME = GameSpec(
    "a/cave.z5", "jericho", "a/cave.z5", "Cave", "Get out.", 5.0, 50, "0123/v2", ("n", "take lamp")
)
STATE = TextState("A cave.", ("north", "wait"), (HistoryItem("Home.", "sleep", -1.5),), "", 2.0)
STEPS = (WalkStep(STATE, "n", (0, 1), False), WalkStep(STATE, "look", (1, 2), True))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path))


def walks(game: GameSpec, *facts, fault: str = "") -> tuple[Walk, bool]:
    walked, known = kept_walk("walks", facts, game, lambda: Walk(game, STEPS, fault))
    assert walked == Walk(game, STEPS, fault)
    return walked, known


def test_a_walk_is_read_again_with_everything_in_it():
    assert not walks(GAME, 1, 80)[1]
    assert walks(GAME, 1, 80)[1]
    # The same story in another place, as on another machine.
    assert walks(replace(GAME, path="/b/x.z5", env_id="/b/x.z5"), 1, 80)[1]


@pytest.mark.parametrize(
    "other",
    [
        {"story_key": "0123/v3"},
        {"walkthrough": ("n",)},
        {"goal": ""},
    ],
)
def test_another_game_is_another_walk(other):
    walks(GAME, 1, 80)
    assert not walks(replace(GAME, **other), 1, 80)[1]


def test_other_facts_are_another_walk():
    walks(GAME, 1, 80)
    assert not walks(GAME, 2, 80)[1] and not walks(GAME, 1, 81)[1]


def test_a_walk_that_ended_at_a_fault_is_not_kept():
    assert not walks(GAME, 1, 80, fault="it hung")[1]
    assert not walks(GAME, 1, 80, fault="it hung")[1]
