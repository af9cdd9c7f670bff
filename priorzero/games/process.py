"""The parent's end of an interpreter process: calls with a time limit, kill and respawn.

A call that runs past its limit, or whose process ends, raises a `WorkerFault`; the process is
gone by then and the next call starts a fresh one. Thread-safe as long as one GameProcess is used by
one thread at a time.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from priorzero.games.records import WorkerDied, WorkerError, WorkerFault, WorkerTimeout
from priorzero.games.worker import REPLY, REQUEST
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

NURSERY_START_S = 180.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_SURROUNDINGS = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    # Jericho walks through sets of strings, and which of two equivalent commands it lists ("throw
    # egg at path", "... at window") depends on their order, which Python draws anew in every
    # process. Lists are shared between runs and machines, so the order has to be the same.
    "PYTHONHASHSEED": "0",
}


class Nursery:
    """The process workers of one kind are forked from; started when needed, also after a death."""

    _all: dict[tuple[int, str], Nursery] = {}
    _all_lock = threading.Lock()

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen | None = None

    @classmethod
    def of(cls, kind: str) -> Nursery:
        """The one nursery of this process for `kind`; a forked parent gets its own."""
        with cls._all_lock:
            key = (os.getpid(), kind)
            if key not in cls._all:
                cls._all[key] = cls(kind)
                atexit.register(cls._all[key].close)
            return cls._all[key]

    def spawn(self) -> tuple[int, Connection]:
        """Fork a worker.

        Returns:
            its pid, and our end of its connection.

        Raises:
            PriorZeroError: a part that games of this kind need is missing.
            WorkerDied: the nursery failed twice.
        """
        with self._lock:
            for attempt in (1, 2):
                ours, theirs = socket.socketpair()
                try:
                    self._start()

                    # The worker gets its end of the pair, and the nursery answers with its pid.
                    socket.send_fds(self._control, [REQUEST.pack(b"n", 0)], [theirs.fileno()])
                    pid = self._reply()
                    if pid > 0:
                        return pid, Connection(ours.detach())
                    raise PriorZeroError(self._read(self._reply()).decode())

                except OSError as error:
                    self._stop()
                    logger.warning(
                        "the nursery of %s workers failed (%r), attempt %d of 2",
                        self.kind,
                        error,
                        attempt,
                    )
                finally:
                    theirs.close()
                    ours.close()
        raise WorkerDied(
            f"no {self.kind} worker could be started; see the warnings above",
            way="a nursery that does not fork",
        )

    def kill(self, pid: int) -> int | None:
        """Kill and reap a worker. If the nursery is gone, so are its workers.

        Returns:
            how it ended, which it may have done before: its exit status, or minus the number of the
            signal. None where the nursery is gone.
        """
        with self._lock:
            if self._control is None:
                return None
            try:
                self._control.sendall(REQUEST.pack(b"k", pid))
                return self._reply()
            except OSError as error:
                logger.warning(
                    "the nursery of %s workers is gone (%r) and its workers with it",
                    self.kind,
                    error,
                )
                self._stop()
                return None

    def close(self) -> None:
        """End the nursery and every worker it forked."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        if self._control is not None:
            return
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(p for p in (_PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")) if p)
        with theirs:
            # The C interpreters print to stdout.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    (
                        "import sys; from priorzero.games.worker import nursery_main; "
                        "nursery_main(int(sys.argv[1]), sys.argv[2])"
                    ),
                    str(theirs.fileno()),
                    self.kind,
                ],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_SURROUNDINGS, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        ours.settimeout(NURSERY_START_S)
        self._control = ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _reply(self) -> int:
        return REPLY.unpack(self._read(REPLY.size))[0]

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._control.recv(size - len(data))
            if not part:
                raise ConnectionResetError("the nursery closed its socket")
            data += part
        return data


class GameProcess:
    """One game in one interpreter process."""

    def __init__(
        self, kind: str, path: str, *, open_timeout_s: float = 60.0, niceness: int = 0
    ) -> None:
        """Starts nothing yet.

        Args:
            kind: file name of the game's kind.
            path: what its class opens.
            open_timeout_s: time limit of opening it.
            niceness: by how much the process yields to others where cores are short.
        """
        self.kind = kind
        self.path = path
        self.spawns = 0
        self.spawn_s = 0.0
        self.pid: int | None = None
        self._open_timeout_s = open_timeout_s
        self._niceness = niceness
        self._connection: Connection | None = None
        self._interrupted = False

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Run `method` of the game in the worker, starting one if need be.

        Raises:
            WorkerTimeout, WorkerDied, WorkerError: the worker is gone, the next call starts one.
            PriorZeroError: something is missing that the user can mend.
        """
        if self._interrupted:
            raise WorkerDied(
                f"the worker of {self.path} was interrupted; close() makes a new start possible"
            )
        if self._connection is None:
            start = time.perf_counter()
            self.pid, self._connection = Nursery.of(self.kind).spawn()
            self.spawns += 1
            if self._niceness:
                own = os.getpriority(os.PRIO_PROCESS, self.pid)
                os.setpriority(os.PRIO_PROCESS, self.pid, own + self._niceness)
            self._exchange("open", (self.path,), self._open_timeout_s)
            self.spawn_s += time.perf_counter() - start
        return self._exchange(method, arguments, timeout_s)

    def _exchange(self, method: str, arguments: tuple, timeout_s: float) -> Any:
        call = f"{method}{arguments!r} of {self.path}"
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(timeout_s):
                raise WorkerTimeout(f"{call} did not return within {timeout_s:g} s")

            kind, result = self._connection.recv()
            if kind == "error":
                last_line = result.strip().rpartition("\n")[2]
                raise WorkerError(f"{call} failed:\n{result}", way=f"{last_line} in {method}")
        except WorkerFault:
            self.kill()
            raise
        except (EOFError, OSError) as error:
            # Nobody has looked at the process yet: killing it tells how it had ended.
            ending = _in_words(self.kill())
            way = "" if self._interrupted else f"{ending} in {method}"
            raise WorkerDied(f"the worker ended during {call}: {ending}", way) from error
        except BaseException:
            # E.g. KeyboardInterrupt between send and recv: from here on the pipe is out of step.
            self.kill()
            raise

        if kind == "user":
            self.kill()
            raise PriorZeroError(result)
        return result

    def kill(self) -> int | None:
        """End the worker now; the next call starts a new one.

        Returns:
            how it ended, see `Nursery.kill`; None also where there was none.
        """
        if self._connection is None:
            return None
        self._connection.close()
        self._connection = None
        ended = Nursery.of(self.kind).kill(self.pid)
        self.pid = None
        return ended

    def interrupt(self) -> None:
        """From another thread: calls raise WorkerDied at once, until `close`."""
        self._interrupted = True
        pid = self.pid
        if pid is not None:
            Nursery.of(self.kind).kill(pid)

    def close(self) -> None:
        """End the worker and lift an interruption; no call may be under way."""
        self.kill()
        self._interrupted = False


def _in_words(ended: int | None) -> str:
    """How a process ended, from `Nursery.kill`."""
    if ended is None:
        return "the end of its nursery"
    if ended < 0:
        return f"{signal.Signals(-ended).name} ({signal.strsignal(-ended)})"
    return f"exit status {ended}"
