"""What is known of a world state (valid actions, room, inventory), in memory and in a SQLite file.

Finding the valid actions of a state is what a Jericho game costs, and they depend on the world
state alone, so all environments of a run, and later runs, share one file. Keys: `story_key` of the
game and the state's hash. The first writer wins, so that every reader sees the same list.

A file that is damaged is set aside as `<name>.damaged-<n>` and rebuilt. A file that cannot be
written (disk full, read-only, locked for too long) costs persistence only: it is counted, said
once, and the memory part goes on.

A state that several environments meet at the same time is listed once: `get_or_list`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

from priorzero.games.records import StateDetails
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 20.0
_DAMAGED_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS details (story TEXT NOT NULL, state TEXT NOT NULL,"
    " payload TEXT NOT NULL, PRIMARY KEY (story, state)) WITHOUT ROWID"
)
_INSERT = "INSERT INTO details VALUES (?, ?, ?) ON CONFLICT DO NOTHING"


def cache_root() -> Path:
    """Folder of generated games and known states, by $PRIORZERO_CACHE or in the home's cache."""
    given = os.environ.get("PRIORZERO_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "priorzero") / "games"


def default_cache_path() -> Path:
    """The file of known states that runs share."""
    return cache_root() / "states.sqlite"


class ValidActionCache:
    """See the module's text. Safe for several threads, and for several processes with one file."""

    def __init__(self, path: str | Path | None, memory_entries: int = 50_000) -> None:
        """Opens or creates the file.

        Args:
            path: the SQLite file; None keeps everything in memory.
            memory_entries: bound of the memory part; the least recently used goes first.
        """
        self.path = None if path is None else Path(path)
        self._memory: OrderedDict[tuple[str, str], StateDetails] = OrderedDict()
        self._memory_entries = memory_entries
        self._under_way: dict[tuple[str, str], Future] = {}
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._warned = False
        self._counts = dict.fromkeys(
            ("memory_hits", "disk_hits", "misses", "stored", "store_errors", "damaged_files"), 0
        )
        if self.path is not None:
            with self._lock:
                self._run("open", None)

    def get(self, story: str, state: str) -> StateDetails | None:
        """The details of a state, or None; counted as hit or miss."""
        with self._lock:
            return self._look_up((story, state))

    def get_or_list(
        self, story: str, state: str, list_state: Callable[[], StateDetails]
    ) -> tuple[StateDetails, Literal["known", "shared", "listed"]]:
        """The details of a state, listed where they are not known.

        Args:
            list_state: finds them, in bounded time. Not called while another thread is at it for
                this state; if that one fails, this one tries.

        Returns:
            the details, and whether they were known, came from the thread that was listing them
            already, or were listed here.

        Raises:
            Exception: whatever `list_state` raises.
        """
        key = (story, state)
        while True:
            with self._lock:
                found = self._look_up(key)
                if found is not None:
                    return found, "known"
                under_way = self._under_way.get(key)
                if under_way is None:
                    mine = self._under_way[key] = Future()
                    break
            if under_way.exception() is None:
                return under_way.result(), "shared"

        try:
            details = self.put(story, state, list_state())
            mine.set_result(details)
            return details, "listed"
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._under_way[key]

    def is_known(self, story: str, state: str) -> bool:
        """Whether there is nothing to list: the details are known, or a thread is at it."""
        key = (story, state)
        with self._lock:
            if key in self._memory or key in self._under_way:
                return True
            return self._run("get", key) is not None

    def put(self, story: str, state: str, details: StateDetails) -> StateDetails:
        """Store the details of a state.

        Returns:
            what holds from now on: another writer's if it was first.
        """
        key = (story, state)
        with self._lock:
            self._run("put", (*key, _encode(details)))
            details = self._decode(self._run("get", key)) or details
            self._counts["stored"] += 1
            self._remember(key, details)
            return details

    def stored(self, story: str) -> dict[str, StateDetails]:
        """All that the file knows of a story, by state hash.

        Raises:
            PriorZeroError: the file cannot be read.
        """
        with self._lock:
            found = {}
            for state, payload in self._query(
                "SELECT state, payload FROM details WHERE story=?", (story,)
            ):
                details = self._decode((payload,))
                if details is not None:
                    found[state] = details
            return found

    def merge(self, story: str, states: Mapping[str, StateDetails]) -> int:
        """Add states to the file; all of them, or none. What it knows already stays.

        Returns:
            how many were new.

        Raises:
            PriorZeroError: the file cannot be written.
        """
        rows = [(story, state, _encode(details)) for state, details in states.items()]
        count = "SELECT count(*) FROM details WHERE story=?"
        with self._lock:
            before = self._query(count, (story,))[0][0]
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(_INSERT, rows)
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise _unusable(self.path, error) from error
            return self._query(count, (story,))[0][0] - before

    def count(self) -> dict[str, int]:
        """States in the file, by story.

        Raises:
            PriorZeroError: the file cannot be read.
        """
        with self._lock:
            return dict(self._query("SELECT story, count(*) FROM details GROUP BY story", ()))

    def stats(self) -> dict[str, int]:
        """Counters since construction; `entries` is the memory part's size."""
        with self._lock:
            return {
                **self._counts,
                "hits": self._counts["memory_hits"] + self._counts["disk_hits"],
                "entries": len(self._memory),
            }

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _look_up(self, key: tuple[str, str]) -> StateDetails | None:
        found = self._memory.get(key)
        if found is not None:
            self._memory.move_to_end(key)
            self._counts["memory_hits"] += 1
            return found

        found = self._decode(self._run("get", key))
        if found is None:
            self._counts["misses"] += 1
            return None
        self._counts["disk_hits"] += 1
        self._remember(key, found)
        return found

    def _remember(self, key: tuple[str, str], details: StateDetails) -> None:
        self._memory[key] = details
        self._memory.move_to_end(key)
        while len(self._memory) > self._memory_entries:
            self._memory.popitem(last=False)

    def _decode(self, row: tuple[str] | None) -> StateDetails | None:
        if row is None:
            return None
        try:
            actions, look, inventory = json.loads(row[0])
            return StateDetails(tuple(actions), look, inventory)
        except (ValueError, TypeError) as error:
            self._counts["store_errors"] += 1
            logger.warning(
                "an entry of %s is unreadable (%s) and will be computed again", self.path, error
            )
            return None

    def _query(self, sql: str, arguments: tuple) -> list[tuple]:
        """Rows of the file, or a PriorZeroError: for those who want the file and not its states."""
        assert self.path is not None, "a cache in memory has no file"
        try:
            if self._db is None:
                self._db = _open_database(self.path)
            return self._db.execute(sql, arguments).fetchall()
        except (sqlite3.Error, OSError) as error:
            raise _unusable(self.path, error) from error

    def _run(self, what: str, arguments: tuple | None) -> tuple | None:
        """One database operation: repairs a damaged file once, survives one it cannot write."""
        if self.path is None:
            return None
        for attempt in (1, 2):
            try:
                if self._db is None:
                    self._db = _open_database(self.path)

                if what == "get":
                    return self._db.execute(
                        "SELECT payload FROM details WHERE story=? AND state=?", arguments
                    ).fetchone()
                if what == "put":
                    self._db.execute(_INSERT, arguments)
                return None

            except (sqlite3.Error, OSError) as error:
                code = getattr(error, "sqlite_errorcode", 0) or 0
                if code & 0xFF in _DAMAGED_CODES and attempt == 1:
                    self._set_aside(error)
                    continue

                # Not to be mended: the run goes on with what memory holds.
                self._counts["store_errors"] += 1
                if not self._warned:
                    self._warned = True
                    logger.warning(
                        "%s cannot be used (%r): known states stay in memory and are lost with this"
                        " process; make the folder writable or set PRIORZERO_CACHE (said once,"
                        " counted as store_errors)",
                        self.path,
                        error,
                    )
                return None
        return None

    def _set_aside(self, error: Exception) -> None:
        """Rename a damaged file, unless another process has already put a good one in its place."""
        if self._db is not None:
            self._db.close()
            self._db = None
        with open(f"{self.path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_sound(self.path):
                return

            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
                number += 1
            os.replace(self.path, aside)
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self._counts["damaged_files"] += 1
        logger.warning(
            "%s is damaged (%s); it was set aside as %s and is rebuilt as states are met again",
            self.path,
            error,
            aside,
        )


def _encode(details: StateDetails) -> str:
    """What `_decode` reads."""
    return json.dumps([details.valid_actions, details.look, details.inventory], ensure_ascii=False)


def _unusable(path: Path, error: Exception) -> PriorZeroError:
    return PriorZeroError(
        f"the file of known states {path} cannot be used: {error!r}; check its folder, or name"
        " another file"
    )


def _open_database(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def _is_sound(path: Path) -> bool:
    try:
        db = _open_database(path)
        try:
            return db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
        finally:
            db.close()
    except sqlite3.DatabaseError:
        return False


_shared: dict[tuple[int, str], ValidActionCache] = {}
_shared_lock = threading.Lock()


def shared_cache(path: str | Path | None) -> ValidActionCache:
    """The one cache of this process for `path`: environments share the memory part too."""
    key = (os.getpid(), "" if path is None else os.path.abspath(path))
    with _shared_lock:
        if key not in _shared:
            _shared[key] = ValidActionCache(path)
        return _shared[key]
