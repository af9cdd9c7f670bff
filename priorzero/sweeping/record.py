"""What is known of a run (`run.json`), and what is kept of it beside that.

Kept is what tables and plots are made from: `config.json`, `summary.json`, the chosen metrics and,
of a run that failed, its last lines. Checkpoints stay in the run's own folder.
"""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from priorzero.sweeping.plan import PlannedRun
from priorzero.types import PriorZeroError

RUNNING = "running"
DONE = "done"
TIME_LIMIT = "time limit"
"""Its time was up; it saved."""
KILLED = "killed"
"""Its time was up, and it ended without saving."""
INTERRUPTED = "interrupted"
"""The sweep ended first."""
FAILED = "failed"

FINAL = (DONE, TIME_LIMIT, KILLED)
"""States in which a run is not started again."""

_TAIL = 4000
"""Characters that are kept of a failed run's output."""


@dataclass
class RunRecord:
    """What is known of a run.

    game, variant, seed: which one. arguments: of its command line. state: see above. status: exit
    status of its last process, None while it runs. sessions: one per process of this run, with
    command, commit, date, seconds.
    """

    game: str
    variant: str
    seed: int
    arguments: list[str]
    state: str = RUNNING
    status: int | None = None
    sessions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all its processes."""
        return sum(session["seconds"] for session in self.sessions)

    def begin(self, command: str, commit: str) -> None:
        """A process of this run starts."""
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        session = {"command": command, "commit": commit, "date": date, "seconds": 0.0}
        self.sessions.append(session)
        self.state, self.status = RUNNING, None

    def end(self, state: str, status: int, seconds: float) -> None:
        """It ended.

        Args:
            state: one of this module's.
            status: the exit status.
            seconds: since it began.
        """
        self.sessions[-1]["seconds"] = round(seconds, 1)
        self.state, self.status = state, status


def new_record(run: PlannedRun) -> RunRecord:
    """Of a run that has not begun."""
    return RunRecord(run.game, run.variant, run.seed, list(run.arguments))


def read_record(path: Path, run: PlannedRun) -> RunRecord | None:
    """What an earlier start of the sweep wrote down of this run; None: nothing.

    Args:
        path: `run.json`.
        run: as it is asked for now.

    Raises:
        PriorZeroError: it cannot be read, or was made by another command line.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        record = RunRecord(**{name: values[name] for name in RunRecord.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PriorZeroError(
            f"{path} is not what a sweep writes ({error!r}); move {path.parent} away"
        ) from error

    if record.arguments != list(run.arguments):
        raise PriorZeroError(
            f"{run.name} was begun with other options: then {' '.join(record.arguments)}, now "
            f"{' '.join(run.arguments)}. Give the sweep another --out, or move {path.parent} away"
        )
    return record


def write_record(path: Path, record: RunRecord) -> None:
    """Write run.json, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = asdict(record) | {
        "command": record.sessions[-1]["command"],
        "commit": record.sessions[-1]["commit"],
        "seconds": round(record.seconds, 1),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def keep_results(folder: Path, target: Path, patterns: Sequence[str], output: Path | None) -> None:
    """Copy what tables and plots are made from.

    Args:
        folder: the experiment's.
        target: where it is kept.
        patterns: of the metrics that are wanted, such as `eval/*`.
        output: what a failed run said, of which the end is kept; None: it did not fail.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "summary.json"):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8")
            # Results are kept in the repository: the working folder's path tells nobody anything.
            text = text.replace(str(folder.resolve()), folder.name)
            (target / name).write_text(text, encoding="utf-8")

    metrics = folder / "log" / "metrics.jsonl"
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = [text for text in (_wanted(line, patterns) for line in lines) if text]
        (target / "metrics.jsonl").write_text("".join(wanted), encoding="utf-8")

    end = target / "output_end.txt"
    end.unlink(missing_ok=True)  # of an earlier failure
    if output is not None:
        end.write_text(last_lines(output), encoding="utf-8")


def _wanted(line: str, patterns: Sequence[str]) -> str | None:
    """A line of metrics.jsonl with the wanted metrics alone; None where none is left, or where the
    line of a killed run is cut off.
    """
    try:
        row = json.loads(line)
        namespace, step = row.pop("namespace"), row.pop("step")
    except (ValueError, KeyError, AttributeError):
        return None
    kept = {
        name: value
        for name, value in row.items()
        if any(fnmatch.fnmatchcase(f"{namespace}/{name}", pattern) for pattern in patterns)
    }
    return json.dumps({"namespace": namespace, "step": step} | kept) + "\n" if kept else None


def last_lines(output: Path) -> str:
    """The end of what a run said."""
    if not output.is_file():
        return ""
    return output.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
