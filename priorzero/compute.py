"""How many CPU threads torch uses for one piece of work.

A tree search runs thousands of matrix products of a few rows. Splitting each over threads costs
more than it saves, and where other processes want the same cores the threads wait for each other at
every product: on two busy cores one decision (2 roots, 16 simulations, width 128) took 39 ms with
one thread and 2.6 s with two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch's CPU operators called from this thread use `count` threads; 0 changes nothing."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
