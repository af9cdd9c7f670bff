"""Writes decisions to `<exp>/decisions/*.jsonl.gz` while a run goes on.

Players ask the recorder for a `Tape` per episode, None for one that is not recorded, and hand it
every decision. JSON and compression happen in a thread. A disk that is full, or fails, costs
records and not the run: the log says so once, and the lost ones are counted.
"""

from __future__ import annotations

import gzip
import json
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from priorzero.decisions.record import Decode, Moment, decision_record, tree_commands
from priorzero.settings.decisions import DecisionSettings

logger = logging.getLogger(__name__)

_MEMBER_BYTES = 2**20  # of text that is compressed together
_WAITING = 1024  # decisions that may wait for the thread before players wait for it
_PROMPTS = 512  # whose text is kept: states met again are asked about with the same ids
_LEVEL = 6  # of gzip
_END = object()  # ends the thread


@dataclass
class _Lines:
    """What waits to be compressed. size: in characters."""

    lines: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.size += len(line)


class Recorder:
    """Records the decisions of one run. May be used from several threads.

    Args:
        folder: `<exp>/decisions`, made when the first record is written.
        settings: what is recorded.
        reduction: how the LLM's token log-probabilities become one number per command.
        decode: token ids -> text; None without an LLM.
        again: the run only evaluates a checkpoint; its episodes get names of their own beside the
            training's.
    """

    def __init__(
        self,
        folder: Path,
        settings: DecisionSettings,
        *,
        reduction: str,
        decode: Decode | None = None,
        again: bool = False,
    ) -> None:
        self._folder, self._settings = folder, settings
        self._reduction = reduction
        self._decode = lru_cache(_PROMPTS)(decode) if decode and settings.prompts else None
        self._prefix = "again_" if again else ""

        self._pending: dict[str, _Lines] = {}  # by file
        self._bytes = sum(p.stat().st_size for p in folder.glob("*.jsonl.gz"))
        self._written = self._lost = 0
        self._failed: str | None = None  # the fault that was told last
        self._closed = False

        self._queue: queue.Queue = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, name="decisions", daemon=True)
        self._thread.start()

    # ---- players ---------------------------------------------------------------------------------

    def evaluation(
        self,
        label: str,
        mode: str,
        number: int,
        *,
        game: str,
        seed: int,
        env_steps: int,
        part: str = "",
    ) -> Tape | None:
        """The tape of an evaluation episode.

        Args:
            label: of the evaluation, such as iter000050.
            mode: who plays.
            number: of the episode in this evaluation, mode and part, from 0.
            game: name of the game.
            seed: the interpreter's.
            env_steps: of the training so far.
            part: name of the game within the episode's own name, where an evaluation plays several.
        """
        if not self._settings.evaluation:
            return None
        label = f"{self._prefix}{label}"
        whose = f"{mode}/{part}" if part else mode
        facts = {
            "episode": f"{label}/{whose}/{number}",
            "source": "eval",
            "label": label,
            "mode": mode,
            "game": game,
            "seed": seed,
            "env_steps": env_steps,
        }
        return Tape(self, f"eval_{label}_{mode}", facts)

    def collection(self, number: int, *, game: str, seed: int) -> Tape | None:
        """The tape of a training episode, or None for one that does not belong to the share.

        Args:
            number: of the episode in the run, from 0.
            game: name of the game.
            seed: the interpreter's.
        """
        # A rule, not a draw: a resumed run records the same episodes, and no generator is touched.
        share = self._settings.collect_share
        if int((number + 1) * share) == int(number * share):
            return None
        facts = {
            "episode": f"collect/{number}",
            "source": "collect",
            "label": "collect",
            "mode": "collect",
            "game": game,
            "seed": seed,
        }
        return Tape(self, "collect", facts)

    @property
    def wants_trees(self) -> bool:
        """Whether the searches' trees are recorded."""
        return self._settings.trees

    def flush(self) -> None:
        """What was recorded so far shall go to disk; does not wait for it."""
        self._queue.put(None)

    def close(self) -> None:
        """Write the rest and end the thread; what comes later is lost, and counted."""
        self._closed = True
        self._queue.put(_END)
        self._thread.join()

    def stats(self) -> dict[str, float]:
        """Totals of this process: decisions written, and lost; MiB on disk, of all processes."""
        return {
            "decisions_written": float(self._written),
            "decisions_lost": float(self._lost),
            "decisions_mib": self._bytes / 2**20,
        }

    def put(self, file: str, facts: dict[str, Any], step: int, moment: Moment) -> None:
        """A decision for a file; `Tape.write` is the way here."""
        if self._closed:
            self._lost += 1
        else:
            self._queue.put((file, facts, step, moment))

    # ---- the thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._queue.get()) is not _END:
            try:
                if item is None:
                    self._write_all()
                else:
                    self._take(*item)
            except Exception:  # a bug of ours must not fill the queue, for which players would wait
                self._lost += item is not None
                logger.exception("a decision could not be recorded; the run goes on")
        self._write_all()

    def _take(self, file: str, facts: dict[str, Any], step: int, moment: Moment) -> None:
        record = decision_record(facts, step, moment, self._reduction, self._decode)
        waiting = self._pending.setdefault(file, _Lines())
        waiting.add(json.dumps(record, ensure_ascii=False, separators=(",", ":")))
        if waiting.size >= _MEMBER_BYTES:
            self._write(file)

    def _write_all(self) -> None:
        for file in list(self._pending):
            self._write(file)

    def _write(self, file: str) -> None:
        """Append a file's lines as one compressed member, whole or not at all."""
        lines = self._pending.pop(file).lines
        text = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
        member = gzip.compress(text, _LEVEL, mtime=0)
        try:
            if self._bytes + len(member) > self._settings.max_mib * 2**20:
                raise OSError(f"decisions.max_mib is {self._settings.max_mib}")
            self._append(self._folder / f"{file}.jsonl.gz", member)
        except OSError as error:
            self._lost += len(lines)
            if self._failed != str(error):
                self._failed = str(error)
                logger.error(
                    "%d decisions could not be written to %s (%s); the run goes on, and further "
                    "ones may be lost (said once; perf/decisions_lost counts them). Free space, or "
                    "raise decisions.max_mib",
                    len(lines),
                    self._folder,
                    error,
                )
        else:
            self._bytes += len(member)
            self._written += len(lines)

    def _append(self, path: Path, member: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as handle:
                handle.write(member)
        except OSError:
            if path.exists():
                with path.open("r+b") as handle:  # no half member between whole ones
                    handle.truncate(before)
            raise


@dataclass(frozen=True)
class Tape:
    """Where the decisions of one episode go.

    Attributes:
        recorder: whose it is.
        file: name of the file, without its ending.
        facts: of the episode; they stand in every line.
    """

    recorder: Recorder
    file: str
    facts: dict[str, Any]

    @property
    def wants_tree(self) -> bool:
        """Whether the search should hand its tree out."""
        return self.recorder.wants_trees

    def write(
        self,
        step: int,
        moment: Moment,
        valid_ids: np.ndarray | None = None,
        action_of: Callable[[int], str | None] | None = None,
        **facts: Any,
    ) -> None:
        """Record one decision.

        Args:
            step: actions played before in the episode.
            moment: the decision, without names for its tree's nodes.
            valid_ids: `[A]` ids of the commands; needed where there is a tree.
            action_of: the vocabulary's name of an action id; needed where there is a tree.
            facts: of this decision.
        """
        if moment.plan is not None and moment.plan.tree is not None:
            # At once: what an id means may be forgotten when an evaluation is over.
            named = tree_commands(moment.plan.tree, valid_ids, moment.commands, action_of)
            moment = replace(moment, tree_commands=named)
        self.recorder.put(self.file, self.facts | facts, step, moment)
