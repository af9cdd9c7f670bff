"""Reads the decisions of a run from its files, also while it goes on or after it was killed."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.decisions.record import VERSION
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

_MAGIC = b"\x1f\x8b\x08"  # how every gzip member begins


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode's decisions.

    Attributes:
        name: such as iter000050/world_model_llm/0.
        steps: as docs/DECISIONS.md tells, in their order.
    """

    name: str
    steps: list[dict[str, Any]]


def is_recorded(run: Path) -> bool:
    """Whether a run's folder holds any recorded decisions."""
    return any((run / "decisions").glob("*.jsonl.gz"))


def recorded_mib(run: Path) -> float:
    """How much is recorded in a run's folder, in MiB on disk."""
    return sum(path.stat().st_size for path in (run / "decisions").glob("*.jsonl.gz")) / 2**20


def read_episodes(run: Path) -> list[RecordedEpisode]:
    """The recorded episodes, in the order of the training; evaluations stand before what was
    collected after them.

    Raises:
        PriorZeroError: nothing is recorded there, or another version of this program did it.
    """
    files = sorted((run / "decisions").glob("*.jsonl.gz"))
    if not files:
        raise PriorZeroError(
            f"{run} holds no recorded decisions (decisions/*.jsonl.gz): it is no run's folder, the "
            "run was made by a version that did not record, or decisions.evaluation is off"
        )
    episodes: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        for record in _records(path):
            if record.get("v") != VERSION:
                raise PriorZeroError(
                    f"{path} was recorded in format {record.get('v')}, and this version reads "
                    f"{VERSION}; read it with the version of its run"
                )
            # A resumed run plays again from its checkpoint; what was recorded beyond is void.
            steps = episodes.setdefault(record["episode"], [])
            del steps[record["step"] :]
            if len(steps) == record["step"]:
                steps.append(record)

    # Where a part was lost, an episode may lack its beginning.
    whole = [RecordedEpisode(name, steps) for name, steps in episodes.items() if steps]
    return sorted(whole, key=_order)


def find_episode(episodes: list[RecordedEpisode], wanted: str) -> RecordedEpisode:
    """The episode of this name or number.

    Args:
        wanted: its name, or its place among all, from 0, as the page counts them.

    Raises:
        PriorZeroError: there is none.
    """
    if wanted.isdecimal():
        if int(wanted) < len(episodes):
            return episodes[int(wanted)]
    else:
        for episode in episodes:
            if episode.name == wanted:
                return episode
    raise PriorZeroError(
        f"there is no recorded episode {wanted}; there are 0 to {len(episodes) - 1}, with names "
        f"such as {episodes[0].name}"
    )


def _order(episode: RecordedEpisode) -> tuple:
    first = episode.steps[0]
    # Numbers inside a name by their size: collect/9 before collect/10.
    parts = [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", episode.name)]
    return first["env_steps"], first["source"] != "eval", parts


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in _text(path).splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last line of a cut member
            logger.warning("%s: a damaged line is left out", path)


def _text(path: Path) -> str:
    """The text of all members that can be read, and of the readable beginning of one that was cut
    by a kill.
    """
    data, parts, at = path.read_bytes(), [], 0
    while at < len(data):
        reader = zlib.decompressobj(wbits=31)
        try:
            parts.append(reader.decompress(data[at:]))
        except zlib.error:
            reader = None
        if reader is not None and reader.eof:
            at = len(data) - len(reader.unused_data)
            continue
        logger.warning("%s: a damaged part is left out", path)
        parts.append(b"\n")
        following = data.find(_MAGIC, at + 1)
        at = following if following > 0 else len(data)
    return b"".join(parts).decode("utf-8", "replace")
