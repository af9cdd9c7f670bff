"""The interpreter process, and the nursery it is forked from.

`process.Nursery` (parent) starts one nursery per kind of game: `nursery_main` imports the heavy
parts once (spaCy and its model take two seconds and 100 MB), then forks a worker for each request.
So a worker starts in milliseconds, its memory is shared copy-on-write, and, unlike with
multiprocessing's forkserver, the parent's `__main__` is never imported again.

No one outlives anyone: a nursery ends when its control socket closes or its parent changes; the
kernel kills a worker with its nursery, also one that hangs in C. SIGINT is ignored, since Ctrl-C is
the parent's to handle.

Must not import torch, transformers or vllm.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback
from multiprocessing.connection import Connection

from priorzero.games import kinds
from priorzero.types import PriorZeroError

# Command and pid. b"n": fork a worker on the attached socket; b"k": kill and reap pid.
REQUEST = struct.Struct("!ci")
# To b"n" the pid, or -1 where the nursery could not load its parts; the length of a message and the
# message follow. To b"k" how the process ended: its exit status, or minus the signal's number.
REPLY = struct.Struct("!i")
PARENT_CHECK_S = 2.0
_PR_SET_PDEATHSIG = 1


def nursery_main(control_fd: int, kind: str) -> None:
    """Entry point of a nursery process; see the module's text."""
    # A signal to the whole process group is for the run: it finishes its step with us and ends us
    # with SIGKILL.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid()
    control = socket.socket(fileno=control_fd)

    failure = ""
    try:
        game_class = kinds.load(kind)
        game_class.preload()
    except (PriorZeroError, ImportError) as error:
        failure = str(error)

    # What is alive now is shared with every worker: a collection there must not copy its pages.
    gc.collect()
    gc.freeze()

    workers: set[int] = set()
    while True:
        readable, _, _ = select.select([control], [], [], PARENT_CHECK_S)
        if not readable:
            if os.getppid() != parent:
                return
            continue

        data, fds, _, _ = socket.recv_fds(control, REQUEST.size, 1)
        if len(data) < REQUEST.size:
            return
        command, pid = REQUEST.unpack(data)

        if command == b"k":
            # One that is not there any more was killed by an earlier request.
            ended = _kill_and_reap(pid) if pid in workers else -signal.SIGKILL
            workers.discard(pid)
            control.sendall(REPLY.pack(ended))
        elif failure:
            os.close(fds[0])
            text = failure.encode()
            control.sendall(REPLY.pack(-1) + REPLY.pack(len(text)) + text)
        else:
            pid = os.fork()
            if pid == 0:
                control.close()
                _worker_main(fds[0], game_class)
            os.close(fds[0])
            workers.add(pid)
            control.sendall(REPLY.pack(pid))


def _kill_and_reap(pid: int) -> int:
    """How the process ended; a process that had died on its own keeps its own signal.

    Only the nursery kills: until it has reaped a worker, the pid cannot belong to another process.
    """
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _worker_main(fd: int, game_class: type[kinds.GameKind]) -> None:
    """Serve one parent until it closes the connection. Never returns into the nursery's loop."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with Connection(fd) as connection:
            _serve(connection, game_class)
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # the parent closed its end, or is gone
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(connection: Connection, game_class: type[kinds.GameKind]) -> None:
    """Answer requests `(method, arguments)` until the connection ends.

    Answers are `("ok", result)`, `("user", text)` for a PriorZeroError, and `("error",
    traceback)`.
    """
    game: kinds.GameKind | None = None
    while True:
        method, arguments = connection.recv()
        try:
            if method == "open":
                game, result = game_class(*arguments), None
            else:
                result = getattr(game, method)(*arguments)
            answer = ("ok", result)
        except PriorZeroError as error:
            answer = ("user", str(error))
        except Exception:
            # What to do about it is the parent's to decide.
            answer = ("error", traceback.format_exc())
        connection.send(answer)
