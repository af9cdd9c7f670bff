"""The machine's part of a computation: which device, and how many CPU threads of torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from priorzero.types import PriorZeroError


def resolve_device(setting: str, name: str = "policy.device") -> str:
    """`auto` -> cuda where torch sees a GPU, else cpu.

    Args:
        setting: auto, cpu or cuda. name: the setting's name, for the message.

    Raises:
        PriorZeroError: cuda was asked for and there is none.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise PriorZeroError(
            f"{name} is cuda, but torch sees no GPU: install the CUDA lock "
            "(PRIORZERO_DEVICE=cuda ./run_priorzero_orz.sh check) or use --device cpu"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if setting == "auto" else setting


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch's CPU operators called from this thread use `count` threads; 0 changes nothing.

    A tree search runs thousands of matrix products of a few rows. Splitting each over threads costs
    more than it saves, and where other processes want the same cores the threads wait for each
    other at every product.
    """
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_pool(workers: int, name: str) -> ThreadPoolExecutor:
    """Threads whose torch operators use as many CPU threads each as the caller's do now.

    torch keeps that number per thread, but a new thread begins with the one that any thread has set
    last: beside a search (`torch_threads`) it would begin with the search's, and keep it.

    Args:
        workers: at most so many threads. name: of the threads, for a debugger.
    """
    count = torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # takes over the last number, now and not later
        torch.set_num_threads(count)

    return ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=begin)
