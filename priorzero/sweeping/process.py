"""A run's process: its start, its end, and who asked for it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from priorzero.sweeping import record
from priorzero.sweeping.plan import PlannedRun, child_environment
from priorzero.sweeping.record import RunRecord

logger = logging.getLogger(__name__)


@dataclass
class RunProcess:
    """A run that is running. `folder`: of its experiment; `earlier`: seconds of its processes
    before this one.
    """

    run: PlannedRun
    record: RunRecord
    folder: Path
    process: subprocess.Popen
    earlier: float
    started: float
    asked: float | None = None
    reason: str = ""

    @property
    def output(self) -> Path:
        """What it says."""
        return output_of(self.folder)

    def seconds(self) -> float:
        """Of this process."""
        return time.monotonic() - self.started

    def ask_to_end(self, reason: str) -> None:
        """SIGTERM: it finishes its step and saves. A second request changes nothing.

        Args:
            reason: the state that it has afterwards, TIME_LIMIT or INTERRUPTED.
        """
        if self.asked is not None:
            return
        self.asked, self.reason = time.monotonic(), reason
        self.process.terminate()
        logger.info("stopping %s (%s)", self.run.name, reason)

    def kill_if_late(self, grace: float) -> None:
        """End it where it has not ended by itself `grace` seconds after it was asked to."""
        is_late = self.asked is not None and time.monotonic() >= self.asked + grace
        if not is_late or self.process.poll() is not None:
            return
        logger.warning(
            "%s did not end within %g s of SIGTERM and is killed; its last checkpoint stands",
            self.run.name,
            grace,
        )
        # The process is the first of a session of its own, with all that it started.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def has_ended(self) -> bool:
        """Whether it has; then its record says how."""
        status = self.process.poll()
        if status is None:
            return False
        self.record.end(self._state(status), status, self.seconds())
        return True

    def _state(self, status: int) -> str:
        if self.reason == record.TIME_LIMIT and status != 0:
            return record.KILLED
        if self.reason:
            return self.reason
        return record.DONE if status == 0 else record.FAILED


def output_of(folder: Path) -> Path:
    """Where a run's standard output and error go."""
    return folder / "output.txt"


def start(
    run: PlannedRun,
    known: RunRecord,
    folder: Path,
    threads: int,
    commit: str,
    pass_fds: Sequence[int] = (),
) -> RunProcess:
    """Start a run, from its checkpoint where there is one, else anew.

    Args:
        run, known: which run, and what is known of it.
        folder: of its experiment.
        threads: it may use.
        commit: of this copy, for the record.
        pass_fds: open files that it inherits.
    """
    resume = (folder / "ckpt" / "latest").exists()
    if not resume:
        if known.sessions:
            logger.warning("%s has no checkpoint and starts anew", run.name)
            known.sessions.clear()
        # Metrics of an attempt that saved nothing would stand before those of this one.
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    with output_of(folder).open("a", encoding="utf-8") as output:
        # A session of its own: a signal from the terminal reaches the sweep alone, which then ends
        # its runs itself.
        process = subprocess.Popen(
            [sys.executable, *run.command(str(folder.resolve()), resume)],
            env=child_environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    earlier = known.seconds
    known.begin(shlex.join(["python", *run.command(run.name, resume)]), commit)
    logger.info("%s %s", "resumed " if resume else "started ", run.name)
    return RunProcess(run, known, folder, process, earlier, time.monotonic())
