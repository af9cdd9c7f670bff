"""The interpreter process, and the nursery it is forked from.

``process.Nursery`` (parent) starts one nursery per kind of game: ``nursery_main`` imports the heavy
parts once (spaCy and its model take two seconds and 100 MB), then forks a worker for each request.
So a worker starts in milliseconds, its memory is shared copy-on-write, and, unlike with
multiprocessing's forkserver, the parent's ``__main__`` is never imported again.

No one outlives anyone: a nursery ends when its control socket closes or its parent changes; the
kernel kills a worker with its nursery, also one that hangs in C. SIGINT is ignored, since Ctrl-C is
the parent's to handle.

Must not import torch, transformers or vllm.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import struct
import sys
import traceback
from multiprocessing.connection import Connection

from priorzero.games import backends
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

REQUEST = struct.Struct(
    "!ci"
)  # command and pid; b"n": fork a worker on the attached socket; b"k": kill and reap pid
REPLY = struct.Struct(
    "!i"
)  # the pid; -1: the nursery could not load its parts, the message follows on the socket
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
        backends.preload(kind)
    except (PriorZeroError, ImportError) as error:
        failure = str(error)
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
            if pid in workers:
                workers.remove(pid)
                _kill_and_reap(pid)
            control.sendall(REPLY.pack(pid))
        elif failure:
            os.close(fds[0])
            text = failure.encode()
            control.sendall(REPLY.pack(-1) + REPLY.pack(len(text)) + text)
        else:
            pid = os.fork()
            if pid == 0:
                control.close()
                _worker_main(fds[0], kind)
            os.close(fds[0])
            workers.add(pid)
            control.sendall(REPLY.pack(pid))


def _kill_and_reap(pid: int) -> None:
    """Only the nursery kills: until it has reaped a worker, the pid cannot belong to another
    process.
    """
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _worker_main(fd: int, kind: str) -> None:
    """Serve one parent until it closes the connection. Never returns into the nursery's loop."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with Connection(fd) as connection:
            _serve(connection, kind)
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # the parent closed its end, or is gone
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(connection: Connection, kind: str) -> None:
    """Answer ``(method, arguments)`` with ``("ok", result)``, ``("user", text)`` or ``("error",
    traceback)``.
    """
    game = None
    hang_next = ""
    while True:
        method, arguments = connection.recv()
        try:
            if method == hang_next:
                ctypes.PyDLL(None).sleep(
                    3600
                )  # PyDLL keeps the GIL, just as the C interpreter's endless loops do
            if method == "open":
                game = backends.open_game(kind, *arguments)
                result = None
            elif method == "hang_next":  # for tests: the named method will not come back
                hang_next, result = arguments[0], None
            else:
                result = getattr(game, method)(*arguments)
            answer = ("ok", result)
        except PriorZeroError as error:
            answer = ("user", str(error))
        except (
            Exception
        ):  # the parent decides what to do: the traceback crosses the pipe and is raised there
            answer = ("error", traceback.format_exc())
        connection.send(answer)
