"""From an `env_id` to a game.

`env_id` is what a kind of game in `priorzero.games.kinds` makes of it: a story file's name or
path (`zork1.z5`, `zork1`), a generated game (`tw-simple`, `tw-coin:level=5,seed=3`); or
`auto`: zork1.z5 if it is found, else tw-simple.
"""

from __future__ import annotations

import logging
import os

from priorzero.games import kinds
from priorzero.games.records import GameSpec
from priorzero.games.story_files import find_story, search_folders
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

AUTO_STORY = "zork1.z5"
AUTO_GENERATED = "tw-simple"


def resolve_game(env_id: str, games_dir: str | os.PathLike | None = None) -> GameSpec:
    """The game that `env_id` names.

    Args:
        env_id: see the module's text.
        games_dir: a folder that is searched first.

    Raises:
        PriorZeroError: no kind knows it, or it cannot be played. The message lists what is
            available and how to get more.
    """
    folders = search_folders(games_dir)
    if env_id == "auto":
        env_id = _choose(games_dir)

    for kind in kinds.names():
        spec = kinds.load(kind).find(env_id, folders)
        if spec is not None:
            return spec
    raise PriorZeroError(_unknown_game(env_id, games_dir))


def list_games(games_dir: str | os.PathLike | None = None) -> list[str]:
    """One line per available game, for the launcher's `check` and for error messages."""
    folders = search_folders(games_dir)
    return [line for kind in kinds.names() for line in kinds.load(kind).available(folders)]


def _choose(games_dir: str | os.PathLike | None) -> str:
    folders = search_folders(games_dir)
    if find_story(AUTO_STORY, folders) is not None:
        logger.info("game auto -> %s: its story file was found", AUTO_STORY)
        return AUTO_STORY

    logger.info(
        "game auto -> %s: no %s in %s; this TextWorld game needs no file, rewards every step of its"
        " goal and can be won in about ten actions",
        AUTO_GENERATED,
        AUTO_STORY,
        ", ".join(map(str, folders)),
    )
    return AUTO_GENERATED


def _unknown_game(env_id: str, games_dir: str | os.PathLike | None) -> str:
    folders = ", ".join(str(folder.absolute()) for folder in search_folders(games_dir))
    available = "\n".join(f"  - {line}" for line in list_games(games_dir))
    ways = "; or ".join(kinds.load(kind).how_to_get for kind in kinds.names())
    return (
        f"game {env_id!r} is unknown: no such story file in {folders} nor at that path. Available:"
        f"\n{available}\n  - auto ({AUTO_STORY} if found, else {AUTO_GENERATED})"
        f"\nTo get more: {ways}"
    )
