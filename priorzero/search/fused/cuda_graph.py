"""Work of a GPU that is captured once and replayed, and the arrays that it begins with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

_ALIGNED = 64  # bytes; what an array's address is a multiple of


def capture(work: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """`work` as a graph, and what it returned: tensors that each replay fills anew.

    Work is done once before: kernels are compiled and libraries make themselves ready. Other
    threads may use the device meanwhile.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return graph, result


class Upload:
    """Arrays that go to the device in one transfer, which does not wait.

    Args:
        device: where to.
        arrays: shape and numpy type by name.

    Attributes:
        device: the arrays there, by name.
    """

    def __init__(
        self, device: str | torch.device, arrays: dict[str, tuple[tuple[int, ...], type]]
    ) -> None:
        starts, size = [], 0
        for shape, kind in arrays.values():
            starts.append(size)
            size += -(-math.prod(shape) * np.dtype(kind).itemsize // _ALIGNED) * _ALIGNED
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        self._here = torch.zeros(size, dtype=torch.uint8, pin_memory=self._there.is_cuda)

        self._sent = torch.cuda.Event() if self._there.is_cuda else None
        self._host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        for start, (name, (shape, kind)) in zip(starts, arrays.items(), strict=True):
            own = slice(start, start + math.prod(shape) * np.dtype(kind).itemsize)
            self._host[name] = self._here[own].numpy().view(kind).reshape(shape)
            dtype = torch.from_numpy(np.zeros(0, dtype=kind)).dtype
            self.device[name] = self._there[own].view(dtype).view(shape)

    def open(self) -> dict[str, np.ndarray]:
        """The arrays here, by name, to be filled: what was sent last has left them."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._host

    def send(self) -> None:
        """What was filled in is on the device for all that is started there from now on."""
        self._there.copy_(self._here, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
