"""Chains of work beside the loop: training while the next data are collected, evaluation of a
snapshot while both go on.

A chain is asyncio tasks over threads: its pieces run one after the other, in the order in which the
loop handed them over, beside the loop and beside the other chains. What they do stands in
`beside.py`; here is how far they may fall behind, how they are waited for and how they fail.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import fmean

logger = logging.getLogger(__name__)

TUNE = -1  # `off_policy_degree` that chooses itself
MOST = 8  # the largest degree it chooses
_REMEMBERED = 20  # times that it chooses by
_GRACE_S = 60.0  # for what is under way when the run ends with an error

Work = Callable[[], Awaitable[None]]


class Chain:
    """Pieces of one kind of work. Of one event loop.

    Attributes:
        name: in the log.
        failure: what ended the chain; the rest of its pieces was dropped.
        seconds: of its last pieces, oldest first.
        intervals: seconds that were collected between its last hand-overs, oldest first.

    Args:
        on_change: called before and after each piece.
    """

    def __init__(self, name: str, on_change: Callable[[], None]) -> None:
        self.name = name
        self.failure: Exception | None = None
        self.seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self.intervals: deque[float] = deque(maxlen=_REMEMBERED)
        self._collected = 0.0
        self._on_change = on_change
        self._waiting: deque[Work] = deque()
        self._running = False
        self._task: asyncio.Task[None] | None = None

    @property
    def behind(self) -> int:
        """Pieces that are not finished."""
        return len(self._waiting) + self._running

    @property
    def running(self) -> bool:
        """Whether one is under way."""
        return self._running

    def add(self, work: Work) -> None:
        """Hand over a piece; it begins once those before it are finished."""
        self._waiting.append(work)
        self.intervals.append(self._collected)
        self._collected = 0.0
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name=self.name)

    def collected(self, seconds: float) -> None:
        """So long was collected meanwhile."""
        self._collected += seconds

    async def _run(self) -> None:
        while self._waiting:
            self._on_change()
            work, self._running = self._waiting.popleft(), True
            started = time.perf_counter()
            try:
                await work()
            except Exception as error:  # of any kind: the loop raises it at its next step
                self.failure = error
                self._waiting.clear()
            finally:
                self._on_change()
                self._running = False
            self.seconds.append(time.perf_counter() - started)

    async def abandon(self, grace_s: float) -> bool:
        """Drop what waits, and let what is under way finish for so long.

        Returns:
            whether it did; else it was cancelled.
        """
        self._waiting.clear()
        if self._task is None:
            return True
        _, pending = await asyncio.wait({self._task}, timeout=grace_s)
        if pending:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        return not pending


class Background:
    """The chains of a run, and how far the loop may run ahead of them. Of one event loop.

    Attributes:
        world_model, llm: training phases.
        evaluation: of snapshots; one at a time.
        degree: phases that collection may be ahead; 0: nothing is trained beside it; -1: chosen by
            measured times.
        updates: of the world model handed over so far, with those before the run.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.world_model = Chain("world model", self._on_change)
        self.llm = Chain("LLM", self._on_change)
        self.evaluation = Chain("evaluation", self._on_change)
        self.degree = 0
        self.updates = 0

        self._chosen = 1
        self._collecting = False
        self._marked = time.perf_counter()
        self._waited = self._overlap = 0.0
        self._reported = (0.0, 0.0)

    @property
    def _training(self) -> tuple[Chain, Chain]:
        return self.world_model, self.llm

    # ---- the loop's side -------------------------------------------------------------------------

    async def room(self) -> None:
        """Before collecting: wait until no chain is more than the degree behind.

        Raises:
            Exception: a piece of any chain failed.
        """
        ahead = self._choose() if self.degree == TUNE else self.degree
        started = time.perf_counter()
        await self._until(lambda: all(chain.behind <= ahead for chain in self._training))
        self._waited += time.perf_counter() - started

    async def settle(self) -> None:
        """Before a checkpoint, an evaluation and the end: wait until nothing is under way.

        At most one phase more than the degree is left of each training, and one evaluation.

        Raises:
            Exception: a piece of any chain failed.
        """
        chains = [chain for chain in (*self._training, self.evaluation) if chain.behind]
        if chains:
            left = ", ".join(f"{chain.name} {chain.behind}" for chain in chains)
            logger.info("Waiting for what is under way beside the loop: %s", left)
        await self._until(lambda: not any(chain.behind for chain in chains))

    def raise_failure(self) -> None:
        """Raise what a piece of a chain raised, if one did."""
        for chain in (*self._training, self.evaluation):
            if chain.failure is not None:
                raise chain.failure

    async def abandon(self) -> None:
        """The run ends with an error: drop what waits, cut an evaluation short, and let training
        finish its phases before what they work with is closed.
        """
        await self.evaluation.abandon(0.0)
        done = await asyncio.gather(*(chain.abandon(_GRACE_S) for chain in self._training))
        for chain, finished in zip(self._training, done, strict=True):
            if not finished:
                logger.warning(
                    "%s: what was under way did not end within %g s and is left behind",
                    chain.name,
                    _GRACE_S,
                )

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Around a collection."""
        started = time.perf_counter()
        self._mark()
        self._collecting = True
        try:
            yield
        finally:
            self._mark()
            self._collecting = False
            for chain in self._training:
                chain.collected(time.perf_counter() - started)

    def metrics(self, acting_version: int) -> dict[str, float]:
        """For perf/ at the end of an iteration; seconds are since the call before.

        Args:
            acting_version: updates in the weights that collection plans with.
        """
        self._mark()
        total, before = (self._waited, self._overlap), self._reported
        self._reported = total
        return {
            "background_degree": float(self._chosen if self.degree == TUNE else self.degree),
            "background_wm_behind": float(self.world_model.behind),
            "background_llm_behind": float(self.llm.behind),
            "background_acting_age": float(self.updates - acting_version),
            "background_seconds_waited": total[0] - before[0],
            "background_seconds_overlap": total[1] - before[1],
        }

    # ---- inside ----------------------------------------------------------------------------------

    async def _until(self, holds: Callable[[], bool]) -> None:
        self.raise_failure()
        while not holds():
            self._changed.clear()
            await self._changed.wait()
            self.raise_failure()

    def _on_change(self) -> None:
        self._mark()
        # The chain changes right after this call, before the loop can look.
        self._changed.set()

    def _mark(self) -> None:
        """Count the time since the last call, if it was one of overlap."""
        now = time.perf_counter()
        if self._collecting and any(chain.running for chain in self._training):
            self._overlap += now - self._marked
        self._marked = now

    def _choose(self) -> int:
        """The degree that chooses itself."""
        wanted = max(suggested(chain.seconds, chain.intervals) for chain in self._training)
        if wanted != self._chosen:
            logger.info(
                "off_policy_degree is now %d, by the measured times (was %d)", wanted, self._chosen
            )
        self._chosen = wanted
        return wanted


def suggested(phases: Sequence[float], intervals: Sequence[float]) -> int:
    """How many phases collection should be ahead of one chain, so that neither side waits for the
    other's slowest turn: the longest turn of the faster side over the mean turn of the slower one,
    rounded up, 1 to 8. More would make the data older and the run no faster, since the slower side
    is at work all the time.

    Args:
        phases: seconds of the chain's phases.
        intervals: seconds of collection between their hand-overs.
    """
    if not phases or not intervals:
        return 1
    slower, faster = (
        (phases, intervals) if fmean(phases) > fmean(intervals) else (intervals, phases)
    )
    return min(MOST, max(1, math.ceil(max(faster) / max(fmean(slower), 1e-9))))
