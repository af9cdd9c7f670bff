"""The replay buffer on disk: segments in chunk files that are written once and never changed.

    <exp>/replay/chunk_00000001.npz, …

A segment does not change once it is finished, so a save writes the segments that came since the
save before and names the chunks that hold all of them; that list, the index, is part of the
checkpoint. A chunk goes when its last segment has left the buffer, or the oldest one when the disk
limit is reached, and its file goes when no checkpoint of the last two names it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from priorzero.data.packing import Pool, pack, unpack
from priorzero.data.segment import Segment

logger = logging.getLogger(__name__)

CHUNK_STEPS = 4096  # a chunk is closed once it holds so many
_PATTERN = "chunk_*.npz"


@dataclass(frozen=True)
class Chunk:
    """A file: its name, the running numbers of its first and last segment, its size."""

    name: str
    first: int
    last: int
    size: int


class SegmentArchive:
    """Chunk files of one experiment.

    Args:
        folder: `<exp>/replay`.
        limit: bytes that the chunks of one index may take; 0 keeps nothing.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._chunks: list[Chunk] = []
        self._written = -1  # running number of the newest segment that is in a chunk or was dropped
        self._committed: set[str] = set()
        self._at_limit = False

    def write(self, segments: Iterable[tuple[int, Segment]]) -> list[dict[str, Any]]:
        """Bring the chunks up to date.

        Args:
            segments: all that the buffer holds with their running numbers, oldest first.

        Returns:
            the index for the checkpoint.

        Raises:
            OSError: a file cannot be written; what was written before stands.
        """
        held = list(segments)
        if not self._limit:
            return []
        oldest = held[0][0] if held else 0
        self._chunks = [chunk for chunk in self._chunks if chunk.last >= oldest]

        for numbers, group in _groups([pair for pair in held if pair[0] > self._written]):
            self._chunks.append(self._write_chunk(numbers, group))
            self._written = numbers[-1]

        self._keep_to_limit()
        return [asdict(chunk) for chunk in self._chunks]

    def _write_chunk(self, numbers: list[int], segments: list[Segment]) -> Chunk:
        self._folder.mkdir(parents=True, exist_ok=True)
        taken = [int(path.stem.rpartition("_")[2]) for path in self._folder.glob(_PATTERN)]
        path = self._folder / f"chunk_{max(taken, default=0) + 1:08d}.npz"

        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as handle:
                np.savez(handle, numbers=np.array(numbers, np.int64), **pack(segments))
                handle.flush()
                os.fsync(handle.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return Chunk(path.name, numbers[0], numbers[-1], path.stat().st_size)

    def _keep_to_limit(self) -> None:
        dropped = 0
        while sum(chunk.size for chunk in self._chunks) > self._limit:
            self._chunks.pop(0)
            dropped += 1
        if dropped and not self._at_limit:
            self._at_limit = True
            logger.warning(
                "the replay buffer takes more than %.0f MiB on disk: its oldest segments are not "
                "kept there, so that a resumed run has the newest only (said once; "
                "policy.replay_save_mib)",
                self._limit / 2**20,
            )

    def commit(self) -> None:
        """The checkpoint with the newest index is on disk: drop the files that neither it nor the
        one before names.
        """
        names = {chunk.name for chunk in self._chunks}
        keep = names | self._committed
        for path in self._folder.glob("chunk_*"):
            if path.name not in keep:
                path.unlink(missing_ok=True)
        self._committed = names

    def read(self, index: Sequence[dict[str, Any]]) -> dict[int, Segment]:
        """Go on from a checkpoint's index.

        A file that is gone or damaged costs the segments in it, and is named in the log.

        Returns:
            segments by running number.
        """
        pool: Pool = {}
        found: dict[int, Segment] = {}
        self._chunks = []
        for chunk in (Chunk(**entry) for entry in index):
            path = self._folder / chunk.name
            try:
                with np.load(path, allow_pickle=False) as file:
                    arrays = dict(file)
                numbers, segments = arrays["numbers"].tolist(), unpack(arrays, pool)
                found |= dict(zip(numbers, segments, strict=True))
                self._chunks.append(chunk)
            except Exception as error:  # of many kinds, for a file that is not as it was written
                logger.warning(
                    "%s cannot be read (%s: %s): its segments, numbers %d to %d, are missing from "
                    "the replay buffer, and the run goes on without them",
                    path,
                    type(error).__name__,
                    error,
                    chunk.first,
                    chunk.last,
                )
            self._written = max(self._written, chunk.last)
        self._committed = {entry["name"] for entry in index}
        return found


def _groups(numbered: Sequence[tuple[int, Segment]]) -> Iterable[tuple[list[int], list[Segment]]]:
    """Cut into chunks of about `CHUNK_STEPS` steps."""
    numbers: list[int] = []
    group: list[Segment] = []
    for number, segment in numbered:
        numbers.append(number)
        group.append(segment)
        if sum(map(len, group)) >= CHUNK_STEPS:
            yield numbers, group
            numbers, group = [], []
    if group:
        yield numbers, group
