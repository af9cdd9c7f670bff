"""Runs side by side until none is left, the time is up, or a signal asks for the end."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from priorzero.run.signals import StopRequest
from priorzero.settings.sweep import SweepSettings
from priorzero.sweeping import budget, record
from priorzero.sweeping.plan import PlannedRun
from priorzero.sweeping.process import RunProcess, start
from priorzero.sweeping.record import RunRecord, keep_results, last_lines, new_record
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)
_LOOK_S = 0.5


@dataclass
class Sweep:
    """A sweep under way.

    settings: of the sweep. runs: in the order in which they start. out: what is kept goes to
    `out`/runs. work: the experiments' folders. commit: of this copy. records: by a run's name, of
    all runs that were ever started.
    """

    settings: SweepSettings
    runs: Sequence[PlannedRun]
    out: Path
    work: Path
    commit: str
    records: dict[str, RunRecord] = field(default_factory=dict)
    _running: list[RunProcess] = field(default_factory=list, init=False)
    _memory_told: bool = field(default=False, init=False)

    def state(self, run: PlannedRun) -> str:
        """Of a run; `waiting` where it was never started."""
        known = self.records.get(run.name)
        return known.state if known is not None else "waiting"

    async def run(self) -> None:
        """Run what is not done yet.

        Raises:
            PriorZeroError: another sweep works in this folder, its runs were begun with other
                options, or the machine is too small for one.
        """
        jobs = budget.jobs_at_a_time(self.settings.resources, budget.usable_cores())
        with _locked(self.out) as lock, StopRequest() as stop:
            self._read_records()
            waiting = [run for run in self.runs if self.state(run) not in record.FINAL]
            logger.info(
                "%d of %d runs are to be done, %d at a time", len(waiting), len(self.runs), jobs
            )

            try:
                await self._work_off(waiting, jobs, lock, stop)
            finally:
                self._end_at_once()

    async def _work_off(
        self, waiting: list[PlannedRun], jobs: int, lock: int, stop: StopRequest
    ) -> None:
        total = 60 * self.settings.limits.total_minutes
        deadline = time.monotonic() + total if total else float("inf")
        while True:
            over = stop.requested or time.monotonic() > deadline
            while waiting and not over and len(self._running) < jobs and self._has_memory():
                self._start(waiting.pop(0), lock)
            if not self._running and (over or not waiting):
                return

            await asyncio.sleep(_LOOK_S)
            for one in list(self._running):
                self._look_after(one, over)

    def _read_records(self) -> None:
        for run in self.runs:
            known = record.read_record(self._kept(run) / "run.json", run)
            if known is not None:
                self.records[run.name] = known

    def _kept(self, run: PlannedRun) -> Path:
        """Folder of what is kept of a run."""
        return self.out / "runs" / run.name

    def _has_memory(self) -> bool:
        wanted = self.settings.resources.memory_gb
        held = [budget.held_memory_gb(one.process.pid) for one in self._running] if wanted else []
        enough = budget.has_memory_for_one_more(wanted, held, budget.free_memory_gb())
        if not enough and not self._running and not self._memory_told:
            self._memory_told = True
            logger.warning(
                "no run can start: less than %g GiB are free (resources.memory_gb); waiting for "
                "other programs to end",
                wanted,
            )
        return enough

    def _start(self, run: PlannedRun, lock: int) -> None:
        known = self.records.setdefault(run.name, new_record(run))
        threads = self.settings.resources.threads
        # The run holds the lock too: none may start twice, even where the sweep was killed.
        one = start(run, known, self.work / run.name, threads, self.commit, (lock,))
        self._running.append(one)
        record.write_record(self._kept(run) / "run.json", known)

    def _look_after(self, one: RunProcess, over: bool) -> None:
        """Write down that a run has ended, or ask it to where its time or the sweep's is up."""
        limits = self.settings.limits
        if one.has_ended():
            self._running.remove(one)
            self._write_down(one)
            return

        if over:
            one.ask_to_end(record.INTERRUPTED)
        elif limits.minutes and one.earlier + one.seconds() > 60 * limits.minutes:
            one.ask_to_end(record.TIME_LIMIT)
        one.kill_if_late(limits.grace_seconds)

    def _write_down(self, one: RunProcess) -> None:
        known, target = one.record, self._kept(one.run)
        minutes = known.seconds / 60
        logger.info("%-8s %s after %.1f minutes", known.state, one.run.name, minutes)
        failed = known.state == record.FAILED
        if failed:
            logger.error(
                "%s ended with status %s; its last lines:\n%s",
                one.run.name,
                known.status,
                last_lines(one.output)[-800:],
            )
        keep_results(one.folder, target, self.settings.keep, one.output if failed else None)
        record.write_record(target / "run.json", known)

        if known.state in record.FINAL and not self.settings.checkpoints:
            shutil.rmtree(one.folder)

    def _end_at_once(self) -> None:
        """Whatever ended the sweep, no run outlives it."""
        for one in self._running:
            one.ask_to_end(record.INTERRUPTED)
            one.kill_if_late(0)
            one.has_ended()
            self._write_down(one)


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Hold the lock of a sweep's folder; its file's number.

    Raises:
        PriorZeroError: it is taken.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PriorZeroError(
                f"{out} is in use: another sweep works there, or runs of one that was killed are "
                "still running; wait for their end, or end them"
            ) from error
        yield file.fileno()
