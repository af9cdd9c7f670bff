"""The processes of one data-parallel run, which `torchrun` starts; docs/TORCHRUN.md is the manual.

Each has a rank. All do the same stages in the same order, so that every method here that asks the
others is called by all of them, or none returns. A process that ends breaks the connections of the
others, and whoever waits for it raises `LostRank`.

In an ordinary run there is one process (`ALONE`), and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Others wait while the first evaluates; one that died is noticed at once all the same.
_PATIENCE = timedelta(hours=24)
# What torchrun tells its processes. Interpreters and engines that these start are no ranks.
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_SEEDS_APART = 100_003  # runs with neighbouring seeds have no rank's seed in common


class LostRank(PriorZeroError):
    """Another process of the run ended, so that this one cannot go on."""


class Ranks:
    """This process among those of the run.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.

    Args:
        rank, size: the same; with more than one, torch.distributed is initialised.
    """

    def __init__(self, rank: int, size: int) -> None:
        assert 0 <= rank < size
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether it is this process that evaluates, and writes what a run leaves."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def seed(self, seed: int) -> int:
        """Of this process's play and sampling; the first has the run's own.

        Args:
            seed: of the run.
        """
        return (seed + self.rank * _SEEDS_APART) % 2**31

    # ---- asking the others -----------------------------------------------------------------------

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise mean over the processes, the same bits in each of them.

        Raises:
            LostRank: one is gone.
        """
        if not self.several:
            return values
        from torch import distributed

        found = values.detach().clone()
        with _connected():
            distributed.all_reduce(found)
        return found / self.size

    def total(self, *numbers: int) -> list[int]:
        """Sum of each number over the processes.

        Raises:
            LostRank: one is gone.
        """
        return [sum(column) for column in zip(*self.gather(numbers), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process.

        Raises:
            LostRank: one is gone.
        """
        return any(self.gather(flag))

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank; it must be possible to pickle it.

        Raises:
            LostRank: one is gone.
        """
        if not self.several:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        with _connected():
            distributed.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first process's value; what others give does not count.

        Raises:
            LostRank: one is gone.
        """
        if not self.several:
            return value
        from torch import distributed

        found = [value if self.first else None]
        with _connected():
            distributed.broadcast_object_list(found, src=0)
        return found[0]

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """The first goes through before the others: where it fails, it alone says so.

        Raises:
            LostRank: it did.
        """
        if not self.first:
            self.from_first(None)
        yield
        if self.first:
            self.from_first(None)

    def take_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite these with the first process's.

        Raises:
            LostRank: one is gone.
        """
        if not self.several:
            return
        from torch import distributed

        with _connected():
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def store(self) -> SharedStore:
        """Small values by name that all processes read and write at once, kept by the first.

        Raises:
            LostRank: one is gone.
        """
        from torch import distributed

        assert self.several, "one process has nobody to share with"
        host = os.environ["MASTER_ADDR"]
        with _connected():
            if self.first:
                store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
                self.from_first(store.port)
            else:
                store = distributed.TCPStore(host, self.from_first(0), is_master=False)
        return SharedStore(store)


class SharedStore:
    """Values by name, for all processes; see `Ranks.store`.

    Args:
        store: torch's own. Where the process that keeps it is gone, every method raises `LostRank`.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def add(self, key: str, amount: int) -> int:
        """Add to a number that begins at 0; returns what it is then."""
        with _connected():
            return self._store.add(key, amount)

    def set(self, key: str, value: str) -> None:
        """Write a value."""
        with _connected():
            self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Read a value; waits for one that is not written yet."""
        with _connected():
            return self._store.get(key)


ALONE = Ranks(0, 1)


def launched() -> bool:
    """Whether torchrun started this process beside others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> Ranks:
    """Meet the others. Before anything asks for a GPU: each process sees the one that is its own.

    Raises:
        PriorZeroError: there are more processes than GPUs on this machine, or they do not meet.
    """
    if not launched():
        return ALONE
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    _choose_gpu(local)
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise PriorZeroError(
            f"rank {rank} of {size} did not meet the others ({error}); start them with torchrun, "
            "as docs/TORCHRUN.md shows"
        ) from error
    for name in _TOLD:
        os.environ.pop(name, None)
    return Ranks(rank, size)


def leave(ranks: Ranks) -> None:
    """At the end of a run that all processes brought to its end."""
    if ranks.several:
        from torch import distributed

        distributed.destroy_process_group()


def _choose_gpu(local: int) -> None:
    """Let this process see one GPU: threads would otherwise begin on the machine's first.

    Raises:
        PriorZeroError: there is none left for it.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        import torch  # counts them without a driver's context, which would fix what is seen

        listed = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [gpu for gpu in listed.split(",") if gpu.strip()]
    if not gpus:
        return
    if local >= len(gpus):
        raise PriorZeroError(
            f"process {local} of this machine has no GPU: it has {len(gpus)} ({listed}). Start as "
            "many with --nproc-per-node, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local].strip()


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """What torch raises where a peer is gone, as `LostRank`."""
    try:
        yield
    except LostRank:
        raise
    except RuntimeError as error:  # gloo's and NCCL's are of this class
        raise LostRank(
            "another process of this run has ended; unless it was killed, it says why. The last "
            "checkpoint stands, continue it with --resume"
        ) from error
