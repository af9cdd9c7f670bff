"""How many runs fit on the machine: cores at the start, memory whenever a run is to begin."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from priorzero.settings.sweep import SweepResources
from priorzero.types import PriorZeroError

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def jobs_at_a_time(resources: SweepResources, cores: int) -> int:
    """Runs at a time, as far as cores decide; at least one.

    Raises:
        PriorZeroError: this machine has less memory than one run needs.
    """
    total = psutil.virtual_memory().total / 2**30
    if resources.memory_gb > total:
        raise PriorZeroError(
            f"resources.memory_gb is {resources.memory_gb:g}, but this machine has {total:.1f} GiB "
            "in all: no run would ever start"
        )
    return resources.jobs or max(1, cores // resources.threads)


def has_memory_for_one_more(wanted: float, held: Iterable[float], free: float) -> bool:
    """Whether a further run may start: what is free must hold it and what the running ones are
    still going to take.

    Args:
        wanted: GiB of each run; 0: memory is not looked at.
        held: GiB that each running one holds now.
        free: GiB free on the machine.
    """
    if wanted == 0:
        return True
    still_to_come = sum(max(0.0, wanted - one) for one in held)
    return free - still_to_come >= wanted


def free_memory_gb() -> float:
    """GiB that can be had without swapping: of the machine, and of the container where it has a
    limit (cgroup v2).
    """
    free = psutil.virtual_memory().available
    # No such files, or the word "max": there is no limit.
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        # Cached files count as used there, and go when memory is wanted.
        free = min(free, limit - used + int(stat["inactive_file"]))
    return free / 2**30


def held_memory_gb(pid: int) -> float:
    """GiB that a process holds with all it has started; pages that they share count once."""
    total = 0
    with suppress(psutil.Error):  # it may end while we look
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                memory = one.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
    return total / 2**30
