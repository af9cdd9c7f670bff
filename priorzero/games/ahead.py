"""Valid actions listed ahead of need, in processes of their own.

While an environment waits for its next command, the states that its valid actions lead to are
worked out from a snapshot of the present one, which is cheap, and listed where nobody has listed
them yet, which is not. The lists go into the cache of known states and nowhere else, so what is
played is the same with and without; a state that comes up while it is being listed here is waited
for, not listed twice.

One pool serves all environments of a process that play the same game with the same cache; the last
to leave closes it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from priorzero.games.process import GameProcess
from priorzero.games.records import GameSpec, StateDetails, WorkerFault
from priorzero.games.valid_actions import ValidActionCache
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

NICENESS = 5  # an environment's own work goes first, yet one that waits for a list gets it
COUNTERS = ("ahead_listed", "ahead_used", "ahead_faults")
FEWEST_CORES = 8
MOST_WORKERS = 16
_REMEMBERED = 50_000  # states whose successors are known not to need anything


def default_workers() -> int:
    """Workers of `env.listing_workers` = None, by the cores this process may use."""
    cores = len(os.sched_getaffinity(0))
    return min(cores // 2, MOST_WORKERS) if cores >= FEWEST_CORES else 0


@dataclass
class _Offer:
    """The present state of one environment.

    Attributes:
        state: its hash.
        snapshot: the state itself, see `GameKind.snapshot`.
        actions: its valid actions, the likeliest first.
        due: successors still to be listed, each as its hash and the action that leads there; None
            until they have been worked out.
        taken: tasks of this offer that were given out.
    """

    state: str
    snapshot: Any
    actions: tuple[str, ...]
    due: deque[tuple[str, str]] | None = None
    taken: int = 0


class ListingAhead:
    """See the module's text. `join` makes one."""

    _all: dict[tuple[int, str, int], ListingAhead] = {}
    _all_lock = threading.Lock()

    @classmethod
    def join(
        cls,
        game: GameSpec,
        cache: ValidActionCache,
        workers: int,
        *,
        step_timeout_s: float,
        describe_timeout_s: float,
    ) -> ListingAhead:
        """The pool of this process for a game and a cache; `leave` when done.

        Args:
            workers: processes at most, started when there is something to list; the first to join
                decides.
            step_timeout_s: time limit of a step.
            describe_timeout_s: time limit of one listing.
        """
        with cls._all_lock:
            key = (os.getpid(), game.story_key, id(cache))
            if key not in cls._all:
                cls._all[key] = cls(game, cache, workers, step_timeout_s, describe_timeout_s)
            cls._all[key]._members += 1
            return cls._all[key]

    def __init__(
        self,
        game: GameSpec,
        cache: ValidActionCache,
        workers: int,
        step_timeout_s: float,
        describe_timeout_s: float,
    ) -> None:
        assert workers > 0, workers
        self._game, self._cache = game, cache
        self._step_timeout_s, self._describe_timeout_s = step_timeout_s, describe_timeout_s
        self._members = 0

        self._change = threading.Condition()
        self._closed = False
        self._offers: dict[int, _Offer] = {}  # by environment
        self._done: set[str] = set()  # states with nothing left to list
        self._typed: Counter[str] = Counter()
        self._unused: set[str] = set()  # states listed here that nobody has asked for so far
        self._counts = dict.fromkeys(COUNTERS, 0)

        self._processes = [
            GameProcess(game.kind, game.path, niceness=NICENESS) for _ in range(workers)
        ]
        self._threads = [
            threading.Thread(target=self._serve, args=(one,), name="listing-ahead", daemon=True)
            for one in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def wants(self, state: str) -> bool:
        """Whether successors of this state may still have to be listed."""
        with self._change:
            return not self._closed and state not in self._done

    def offer(self, environment: int, state: str, snapshot: Any, actions: tuple[str, ...]) -> None:
        """List the successors of a state, as far as nobody needs the workers for newer ones.

        Args:
            environment: whose present state it is; its earlier offer is dropped.
            state: the state's hash.
            snapshot: see `GameKind.snapshot`.
            actions: its valid actions.
        """
        with self._change:
            # What has been typed often is what this run's policy likes.
            likeliest = sorted(actions, key=lambda action: -self._typed[action])
            self._offers[environment] = _Offer(state, snapshot, tuple(likeliest))
            self._change.notify_all()

    def typed(self, action: str) -> None:
        """An environment played `action`."""
        with self._change:
            self._typed[action] += 1

    def asked_for(self, state: str) -> None:
        """An environment needed the list of this state and found it."""
        with self._change:
            if state in self._unused:
                self._unused.discard(state)
                self._counts["ahead_used"] += 1

    def stats(self) -> dict[str, int]:
        """States listed here, how many of them were asked for, and faults of the workers."""
        with self._change:
            return dict(self._counts)

    def leave(self) -> None:
        """One environment needs the pool no more; after the last, no process is left."""
        with self._all_lock:
            self._members -= 1
            if self._members > 0:
                return
            del self._all[os.getpid(), self._game.story_key, id(self._cache)]

        with self._change:
            self._closed = True
            self._change.notify_all()
        for process in self._processes:
            process.interrupt()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.close()

    # --- in the workers' threads ------------------------------------------------------------------

    def _serve(self, process: GameProcess) -> None:
        """Work off what is offered until the pool is closed."""
        while (task := self._next_task()) is not None:
            offer, successor = task
            try:
                if successor is None:
                    self._expand(process, offer)
                else:
                    self._list(process, offer, *successor)
            except WorkerFault as fault:
                self._give_up(offer, fault)
            except PriorZeroError as error:
                # The environment's own interpreter says the same to the user, and ends the run.
                logger.warning(
                    "no valid actions of %s are listed ahead: %s", self._game.env_id, error
                )
                return

    def _next_task(self) -> tuple[_Offer, tuple[str, str] | None] | None:
        """What to do next, waiting for it: an offer to expand, or one of its successors to list.

        The offer that has got least comes first, so that no environment is left out. None: closed.
        """
        with self._change:
            while not self._closed:
                open_ones = [o for o in self._offers.values() if o.due or not o.taken]
                if open_ones:
                    offer = min(open_ones, key=lambda one: one.taken)
                    offer.taken += 1
                    return offer, offer.due.popleft() if offer.due else None
                self._change.wait()
        return None

    def _expand(self, process: GameProcess, offer: _Offer) -> None:
        """Find out which successors nobody has listed."""
        process.call("restore", offer.snapshot, timeout_s=self._step_timeout_s)
        outcomes = process.call("outcomes", 0, (), offer.actions, timeout_s=self._step_timeout_s)

        first_way: dict[str, str] = {}
        for action, outcome in zip(offer.actions, outcomes, strict=True):
            if outcome.details is None:
                first_way.setdefault(outcome.state_hash, action)
        due = deque(
            (state, action)
            for state, action in first_way.items()
            if not self._cache.is_known(self._game.story_key, state)
        )
        with self._change:
            offer.due = due
            self._note_done(offer)
            self._change.notify_all()

    def _list(self, process: GameProcess, offer: _Offer, state: str, action: str) -> None:
        """List one successor, unless somebody was faster."""

        def list_state() -> StateDetails:
            process.call("restore", offer.snapshot, timeout_s=self._step_timeout_s)
            reached = process.call("step", action, timeout_s=self._step_timeout_s)
            assert reached.state_hash == state, (action, reached.state_hash, state)
            details = process.call("describe", timeout_s=self._describe_timeout_s)

            # Before anybody who waits for it has it.
            with self._change:
                self._counts["ahead_listed"] += 1
                self._unused.add(state)
            return details

        key = self._game.story_key, state
        if not self._cache.is_known(*key):
            self._cache.get_or_list(*key, list_state)
        with self._change:
            self._note_done(offer)

    def _note_done(self, offer: _Offer) -> None:
        """Remember a state whose successors are all seen to. The lock is held."""
        if offer.due:
            return
        if len(self._done) >= _REMEMBERED:
            self._done.clear()
        self._done.add(offer.state)

    def _give_up(self, offer: _Offer, fault: WorkerFault) -> None:
        """A worker hung or died: its next call starts a new one, and this state is let be."""
        with self._change:
            if self._closed:
                return
            offer.due = deque()
            self._note_done(offer)
            self._counts["ahead_faults"] += 1
        logger.warning(
            "%s: a process that lists ahead failed and is replaced; the states behind %s are listed"
            " when they are met: %s",
            self._game.env_id,
            offer.state,
            fault,
        )
