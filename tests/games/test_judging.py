"""The judging games are known by their contents and by their names."""

from __future__ import annotations

import pytest

from priorzero.games.jericho_stories import STORIES
from priorzero.games.judging import JUDGING_GAMES, judging_only
from priorzero.games.records import GameSpec


def spec(path: str, title: str) -> GameSpec:
    return GameSpec("", "jericho", path, title, "", 10.0, 50, "")


@pytest.mark.parametrize("name", JUDGING_GAMES)
def test_a_judging_game_is_known(name):
    assert judging_only(spec(f"/games/{name}.z5", STORIES[name].title))
    assert judging_only(spec("/games/renamed.z5", STORIES[name].title))
    assert judging_only(spec(f"/games/{name}.z8", "whatever"))


@pytest.mark.parametrize("name", ["detective", "zork1", "tw-simple"])
def test_other_games_are_not(name):
    title = STORIES[name].title if name in STORIES else name
    assert not judging_only(spec(f"/games/{name}.z5", title))
