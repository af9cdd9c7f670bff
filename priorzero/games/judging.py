"""The games that results are judged on. Nothing is trained, tuned or chosen on them."""

from __future__ import annotations

from pathlib import Path

from priorzero.games.jericho_stories import STORIES
from priorzero.games.records import GameSpec

JUDGING_GAMES = ("acorncourt", "library", "ludicorp", "omniquest", "pentari", "temple")
"""Jericho's names of them."""

_TITLES = {STORIES[name].title for name in JUDGING_GAMES}


def judging_only(game: GameSpec) -> bool:
    """Whether a game is one of them, whatever its file is called: Jericho knows it by its contents.

    A file that has the name of one counts as well.
    """
    return game.title in _TITLES or Path(game.path).stem in JUDGING_GAMES
