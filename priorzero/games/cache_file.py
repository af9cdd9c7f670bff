"""Known states of one game as a file that travels: what `python -m priorzero.games.cache` writes.

A gzipped text. Its first line is a JSON object that says what the file is, which story, interpreter
and version of the listing it belongs to (`story_key`), and the SHA-256 of the rest; then one JSON
array per state: hash, valid actions, room, inventory. A file is written beside its place and
renamed, and it is used as a whole or not at all.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from priorzero.games.records import StateDetails
from priorzero.types import PriorZeroError

FORMAT = "priorzero known states"
VERSION = 1
_PARTS = ("story file", "interpreter", "version of the listing")


@dataclass(frozen=True)
class KnownStates:
    """What is known of the states of one game.

    Attributes:
        story: `GameSpec.story_key` of the game.
        title: its name in words.
        states: details by state hash.
    """

    story: str
    title: str
    states: dict[str, StateDetails]

    def check(self, story: str, path: Path) -> None:
        """Refuse another game's states.

        Args:
            story: the key of the game that is meant.
            path: of the file, for the message.

        Raises:
            PriorZeroError: they belong to another story, interpreter or version of the listing.
        """
        pairs = zip(_PARTS, self.story.split("/"), story.split("/"), strict=True)
        differing = [
            f"{part} {theirs}, not {ours}" for part, theirs, ours in pairs if theirs != ours
        ]
        if differing:
            raise PriorZeroError(
                f"{path} holds states of {self.title!r} for another {'; another '.join(differing)}."
                " Nothing was imported; export again where story and versions are the same as here"
            )


def write(path: Path, known: KnownStates) -> None:
    """Write the file, whole or not at all.

    Raises:
        PriorZeroError: it cannot be written.
    """
    lines = (
        json.dumps([state, *_plain(details)], ensure_ascii=False)
        for state, details in sorted(known.states.items())
    )
    body = "".join(f"{line}\n" for line in lines).encode()
    head = {
        "format": FORMAT,
        "version": VERSION,
        "story": known.story,
        "title": known.title,
        "states": len(known.states),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    data = gzip.compress(json.dumps(head, ensure_ascii=False).encode() + b"\n" + body, mtime=0)

    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            part = file.name
            file.write(data)
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        raise PriorZeroError(
            f"{path} cannot be written: {error}; choose a folder that you may write to"
        ) from error


def read(path: Path) -> KnownStates:
    """Read a file that `write` made.

    Raises:
        PriorZeroError: it is not there, damaged, something else, or of a newer version.
    """
    try:
        first, _, body = gzip.decompress(path.read_bytes()).partition(b"\n")
        head = json.loads(first)

        # Is it one of ours, and whole?
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']!r}")
        if head["version"] != VERSION:
            raise PriorZeroError(
                f"{path} was written by another version of this project (format"
                f" {head['version']!r}, here {VERSION}); export again with this one"
            )
        if hashlib.sha256(body).hexdigest() != head["sha256"]:
            raise ValueError("its checksum is another one")
        if head["story"].count("/") != len(_PARTS) - 1:
            raise ValueError(f"story {head['story']!r}")

        states = dict(_state(line) for line in body.decode().splitlines())
        return KnownStates(head["story"], str(head["title"]), states)
    except FileNotFoundError as error:
        raise PriorZeroError(f"there is no file {path}; check the path") from error
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise PriorZeroError(
            f"{path} is no whole file of known states ({error!r}). Nothing was imported; copy it"
            " again, or export again where it came from"
        ) from error


def _plain(details: StateDetails) -> tuple[list[str], str, str]:
    return list(details.valid_actions), details.look, details.inventory


def _state(line: str) -> tuple[str, StateDetails]:
    """One state of the file. Raises ValueError where it is not one."""
    state, actions, look, inventory = json.loads(line)
    if not all(isinstance(text, str) for text in (state, look, inventory, *actions)):
        raise ValueError(f"a state is malformed: {line[:80]}")
    return state, StateDetails(tuple(actions), look, inventory)
