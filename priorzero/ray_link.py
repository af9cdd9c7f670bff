"""Whether Ray is there, and how this process comes into a cluster: one that is started for the run,
or one that runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from priorzero.types import PriorZeroError

INSTALL = ".venv/bin/pip install --no-deps -r requirements/ray.lock"


def ray_missing() -> str:
    """Why Ray cannot be used, with what installs it; empty where it can."""
    if importlib.util.find_spec("ray") is None:
        return f"the package ray is not installed: {INSTALL}"
    return ""


def connect(address: str, *, cpus: int, gpus: int) -> bool:
    """Join a cluster, or start one on this machine.

    Args:
        address: host:port of a cluster's head, or auto for the one this machine belongs to; empty:
            one is started, which `disconnect` ends.
        cpus: at least so many of Ray's resource CPU has one that is started.
        gpus: so many of its resource GPU has one that is started.

    Returns:
        whether this call did; False where the process was in a cluster already.

    Raises:
        PriorZeroError: no cluster answers there, or Ray does not start.
    """
    import ray

    if ray.is_initialized():
        return False
    begun: Future[None] = Future()
    _left.clear()
    # In a thread of its own, which lives as long: in the main one Ray would take the run's SIGTERM,
    # and the kernel kills Ray's processes when the thread that started them ends.
    arguments = (begun, address, cpus, gpus)
    threading.Thread(target=_live, args=arguments, name="ray", daemon=True).start()
    try:
        begun.result()
    except Exception as error:  # of any class: a start that takes too long raises a bare one
        what = f"no Ray cluster answers at {address}" if address else "Ray does not start"
        raise PriorZeroError(
            f"{what} ({error}). Start one with `ray start --head`, or leave ray_address "
            "(llm.orz.ray_address) empty for one of the run's own"
        ) from error
    return True


def keep_signals() -> None:
    """After `connect`, in the main thread: let Python handle SIGTERM again. Ray's library puts a
    handler below Python's that writes stack traces and ends the process with an error status.
    """
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


_left = threading.Event()


def _live(begun: Future[None], address: str, cpus: int, gpus: int) -> None:
    import ray

    # Of a cluster that ended badly Ray finds traces, and would try to join it.
    own = dict(
        address="local",
        num_cpus=max(cpus, os.cpu_count() or 1),
        num_gpus=gpus,
        include_dashboard=False,
    )
    try:
        where = dict(address=address) if address else own
        with _groups_of_their_own():
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except BaseException as error:  # of any kind: `connect` raises it
        begun.set_exception(error)
        return
    begun.set_result(None)
    _left.wait()


@contextlib.contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Inside, Ray's processes are started outside of the run's process group.

    timeout(1) and some supervisors signal a whole group. The run finishes its step and saves then,
    for which it needs its workers; Ray keeps SIGINT from its processes for that, but not SIGTERM.
    They end with the run all the same: the kernel tells them, see `connect`.
    """
    from ray._private import services

    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


def worker_logs() -> str:
    """Where the workers of the cluster this process is in write their errors, on their machines.

    Several clusters may run on one; Ray's link `session_latest` names the youngest.
    """
    import ray

    session = ray.get_runtime_context().get_session_name()
    return f"{session}/logs/worker-*.err in the folder where Ray keeps its sessions"


def disconnect() -> None:
    """Leave the cluster; one that was started by `connect` ends."""
    import ray

    ray.shutdown()
    _left.set()


def counted(resources: dict[str, float]) -> str:
    """GPUs and CPUs of Ray's resources, in words."""
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("GPU", "CPU"))
