"""From an `env_id` to a game.

`env_id` is what a kind of game in `priorzero.games.kinds` makes of it: a story file's name or
path (`zork1.z5`, `zork1`), a generated game (`tw-simple`, `tw-coin:level=5,seed=3`); or
`auto`: zork1.z5 if it is found, else tw-simple. A run of several games names several, or
`jericho-suite`: all story files that are found, but for the games that results are judged on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from priorzero.games import kinds
from priorzero.games.judging import judging_only
from priorzero.games.records import GameSpec
from priorzero.games.story_files import find_story, list_stories, search_folders, textworld_record
from priorzero.settings.env import SUITE, plain_name
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


def resolve_games(
    env_id: str | Sequence[str], games_dir: str | os.PathLike | None = None
) -> tuple[GameSpec, ...]:
    """The games of a run, in the order in which they are named; one that is named twice, by itself
    and by the suite, once.

    Args:
        env_id: one name or several, see the module's text.
        games_dir: a folder that is searched first.

    Raises:
        PriorZeroError: as `resolve_game`; or two games would be told apart by nothing.
    """
    found: dict[str, GameSpec] = {}  # by path
    for one in [env_id] if isinstance(env_id, str) else env_id:
        games = _suite(games_dir) if one == SUITE else [resolve_game(one, games_dir)]
        for game in games:
            found.setdefault(game.path, game)

    games = tuple(found.values())
    names = [plain_name(game.env_id) for game in games]
    twice = [game.env_id for game, name in zip(games, names, strict=True) if names.count(name) > 1]
    if twice:
        raise PriorZeroError(
            f"{', '.join(twice)}: two games of a run would have one name in its metrics; give one "
            "of the files another name"
        )
    return games


def list_games(games_dir: str | os.PathLike | None = None) -> list[str]:
    """One line per available game, for the launcher's `check` and for error messages."""
    folders = search_folders(games_dir)
    return [line for kind in kinds.names() for line in kinds.load(kind).available(folders)]


def _suite(games_dir: str | os.PathLike | None) -> list[GameSpec]:
    """Every story file that Jericho can play, but for the judging games."""
    folders = search_folders(games_dir)
    jericho = kinds.load("jericho")
    games: list[GameSpec] = []
    kept_back: list[str] = []

    names = dict.fromkeys(p.name for p in list_stories(folders) if not textworld_record(p))
    for name in names:
        try:
            game = jericho.find(name, folders)
        except PriorZeroError as error:
            logger.warning("%s leaves %s out: %s", SUITE, name, error)
            continue
        if game is None:
            continue
        if judging_only(game):
            kept_back.append(name)
        else:
            games.append(game)

    if kept_back:
        logger.info(
            "%s leaves out %s: results are judged on these games, and nothing is trained on them "
            "(name them beside it, or in env.eval_env_id, to play them all the same)",
            SUITE,
            ", ".join(kept_back),
        )
    if not games:
        raise PriorZeroError(
            f"{SUITE}: no story file to train on lies in {', '.join(map(str, folders))}; "
            f"{jericho.how_to_get}"
        )
    logger.info("%s: %d games, %s", SUITE, len(games), ", ".join(game.env_id for game in games))
    return games


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
