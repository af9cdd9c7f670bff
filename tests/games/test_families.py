"""Families: who counts as a relative, and what a game is called wherever its file lies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from priorzero.games.families import FAMILIES, kinship
from priorzero.games.jericho_stories import STORIES
from priorzero.games.judging import JUDGING_GAMES
from priorzero.games.records import GameSpec

STORY = GameSpec("x.z5", "jericho", "/some/x.z5", "", "Win.", 10.0, 50, "key")


def of_story(name: str) -> GameSpec:
    return replace(STORY, title=STORIES[name].title)


def test_every_name_is_a_story_and_stands_once():
    names = [name for own in FAMILIES.values() for name in own]
    assert set(names) <= set(STORIES) and len(names) == len(set(names))
    assert not set(names) & set(JUDGING_GAMES)


@pytest.mark.parametrize(
    ("name", "other", "related"),
    [
        ("zork1", "zork3", True),
        ("zork1", "enchanter", True),
        ("infidel", "inhumane", True),
        ("zork1", "detective", False),
        ("detective", "curses", False),
    ],
)
def test_relatives(name, other, related):
    assert (kinship(of_story(name)).family == kinship(of_story(other)).family) is related


def test_a_story_is_known_by_its_title_wherever_it_lies():
    moved = replace(of_story("zork1"), env_id="elsewhere/renamed.z5", path="elsewhere/renamed.z5")
    assert kinship(moved) == kinship(of_story("zork1"))


def test_a_generated_game_is_known_by_its_options_and_its_generator():
    def kin(env_id: str):
        return kinship(replace(STORY, env_id=env_id, kind="textworld", title="tw-coin"))

    assert kin("tw-coin:seed=3,level=5") == kin("tw-coin:level=5,seed=3")
    assert kin("tw-coin:seed=3").game != kin("tw-coin:seed=4").game
    assert kin("tw-coin:seed=3").family == kin("tw-coin:seed=4").family == "tw-coin"
    file = replace(STORY, kind="textworld", env_id="/a/own.z8", path="/a/own.z8")
    assert kinship(file).game == "own.z8"
