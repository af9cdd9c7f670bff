"""Known states (valid actions, room, inventory) carried from machine to machine.

    python -m priorzero.games.cache export GAME FILE     what is known here of a game
    python -m priorzero.games.cache import GAME FILE     add what another machine knew
    python -m priorzero.games.cache info [FILE]          what is in a file, or known here

GAME is what `env.env_id` takes. What is known here already stays as it is, and runs may go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from priorzero.games import cache_file
from priorzero.games.catalogue import resolve_game
from priorzero.games.valid_actions import ValidActionCache, default_cache_path
from priorzero.say import say
from priorzero.types import PriorZeroError


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.games.cache", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="the runs' env.action_cache; default: the one in the cache folder",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("export", "write what is known of a game into a file"),
        ("import", "add the states of such a file"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("game", metavar="GAME", help="as env.env_id")
        command.add_argument("file", metavar="FILE", type=Path)
        command.add_argument("--games-dir", help="as env.games_dir")
    info = commands.add_parser("info", help="what is in such a file, or known here")
    info.add_argument("file", metavar="FILE", type=Path, nargs="?")
    return parser.parse_args(arguments)


def export_states(cache: ValidActionCache, env_id: str, games_dir: str | None, file: Path) -> str:
    """Write what `cache` knows of a game into `file`; returns what was done.

    Raises:
        PriorZeroError: no such game, nothing known of it, or the file cannot be written.
    """
    game = resolve_game(env_id, games_dir)
    states = cache.stored(game.story_key)
    if not states:
        raise PriorZeroError(
            f"nothing is known of {env_id} in {cache.path}, so there is nothing to export; play it"
            " first, or name another --cache"
        )
    cache_file.write(file, cache_file.KnownStates(game.story_key, game.title, states))
    return f"{len(states)} states of {game.title} written to {file}"


def import_states(cache: ValidActionCache, env_id: str, games_dir: str | None, file: Path) -> str:
    """Add the states of `file` to `cache`; returns what was done.

    Raises:
        PriorZeroError: no such game, or the file is damaged or of another story.
    """
    game = resolve_game(env_id, games_dir)
    known = cache_file.read(file)
    known.check(game.story_key, file)
    added = cache.merge(game.story_key, known.states)
    return f"{added} of {len(known.states)} states of {game.title} were new, now in {cache.path}"


def describe(cache: ValidActionCache, file: Path | None) -> str:
    """What a file holds, or what `cache` knows, in words."""
    if file is None:
        counts = cache.count()
        told = [f"{states:7d} states of {story}" for story, states in sorted(counts.items())]
        return "\n".join([f"{cache.path}:", *told]) if told else f"{cache.path}: no states"
    known = cache_file.read(file)
    return f"{file}: {len(known.states)} states of {known.title} ({known.story})"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 2 where the user can mend what went wrong."""
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    cache = ValidActionCache(args.cache or default_cache_path())
    try:
        if args.command == "info":
            say(describe(cache, args.file) + "\n")
        else:
            act = export_states if args.command == "export" else import_states
            say(act(cache, args.game, args.games_dir, args.file) + "\n")
    except PriorZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        cache.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
