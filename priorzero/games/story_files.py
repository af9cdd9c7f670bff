"""Finding story files, and telling them apart. For the kinds of games that are played from files.

Files are looked for in `games_dir`, then in the folders of $PRIORZERO_GAMES, then in ./games, and
last as a path of their own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from priorzero.types import PriorZeroError

STORY_SUFFIXES = (".z3", ".z4", ".z5", ".z6", ".z8")


def search_folders(games_dir: str | os.PathLike | None = None) -> list[Path]:
    """Where story files are looked for, the first place first."""
    named = [games_dir] if games_dir else []
    named += [part for part in os.environ.get("PRIORZERO_GAMES", "").split(os.pathsep) if part]
    return [Path(folder).expanduser() for folder in (*named, "games")]


def find_story(env_id: str, folders: Sequence[Path]) -> Path | None:
    """The story file that `env_id` names, or None. The suffix may be left out."""
    candidates = [folder / env_id for folder in folders] + [Path(env_id).expanduser()]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in STORY_SUFFIXES:
            return candidate.resolve()

        for suffix in STORY_SUFFIXES:
            named = candidate.with_name(candidate.name + suffix) if candidate.name else candidate
            if named.is_file():
                return named.resolve()
    return None


def list_stories(folders: Sequence[Path]) -> Iterator[Path]:
    """The story files that lie in `folders`."""
    for folder in folders:
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.suffix in STORY_SUFFIXES)


def textworld_record(story: Path) -> Path | None:
    """The `.json` that tw-make writes beside a story; None: the story is not TextWorld's."""
    record = story.with_suffix(".json")
    return record if record.is_file() else None


def story_key(path: Path, package: str, details_version: int) -> str:
    """Identity of a story in the cache of world states.

    Args:
        path: the story file; its contents count, not its name.
        package: the interpreter's distribution, whose version counts as well.
        details_version: of the kind's own `describe`; raised when what it returns changes.

    Raises:
        PriorZeroError: the package is not installed.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise PriorZeroError(
            f"{path.name} needs the package {package}, which is not installed; "
            f"pip install {package}"
        ) from error
    return f"{digest}/{package}-{version}/v{details_version}"
