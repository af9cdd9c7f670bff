"""The network's look at the roots on a GPU: `read_contexts` captured in a CUDA graph, one for each
number of roots, rounded up. It is a hundred small operations, over on the device before the next
one is started from Python.

Letters: `B` roots there is room for, `C` context steps.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from priorzero.search.fused.cuda_graph import Upload, capture
from priorzero.search.roots import Root, batch_contexts, fill_contexts
from priorzero.types import PriorZeroError
from priorzero.world_model.inference import ContextMemory, RootOutput, read_contexts
from priorzero.world_model.model import PriorZeroModel


@dataclass(frozen=True, eq=False)
class CapturedLook:
    """A graph, what it reads, what it leaves, and the action texts it knows."""

    graph: torch.cuda.CUDAGraph
    brought: Upload
    contexts: ContextMemory
    text: Tensor | None


class CudaRoots:
    """Reads roots with one network.

    Args:
        model: the network, on a GPU; its weights may change in place between calls.
        context_steps: `C`, most real observations a root brings.
        device: the GPU.
    """

    def __init__(self, model: PriorZeroModel, context_steps: int, device: str) -> None:
        self._model, self._steps, self._device = model, context_steps, torch.device(device)
        self._captured: dict[int, CapturedLook] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def read(self, roots: Sequence[Root]) -> ContextMemory:
        """What `read_contexts` says of these roots, in memory of their own.

        Raises:
            PriorZeroError: the device's memory or software does not let it be captured.
        """
        batch = triton.next_power_of_2(len(roots))
        with self._lock:
            # Borrowed action texts lie elsewhere in memory than the graph looks.
            look = self._captured.get(batch)
            if look is not None and look.text is not self._text():
                return read_contexts(self._model, *batch_contexts(roots, self._device))

            if look is None:
                look = self._captured[batch] = self._capture(batch, roots)
            _bring(roots, look.brought)
            look.graph.replay()
            return _first_rows(look.contexts, len(roots))

    def _text(self) -> Tensor | None:
        return getattr(self._model.world_model.act_embedding_table, "text", None)

    def _capture(self, batch: int, roots: Sequence[Root]) -> CapturedLook:
        width = roots[0].observations.shape[1]
        brought = Upload(
            self._device,
            dict(
                observations=((batch, self._steps, width), np.float32),
                actions=((batch, self._steps), np.int64),
                lengths=((batch,), np.int64),
            ),
        )
        _bring(roots, brought)
        try:
            graph, contexts = capture(
                lambda: read_contexts(self._model, **brought.device), self._device
            )
        except Exception as error:
            raise PriorZeroError(
                f"the network's look at {batch} roots could not be captured as a CUDA graph "
                f"({type(error).__name__}: {error}); set policy.search_backend=plain to search "
                "without"
            ) from error
        return CapturedLook(graph, brought, contexts, self._text())


def _bring(roots: Sequence[Root], brought: Upload) -> None:
    """Rows beyond these roots are padding: one observation of zeros each."""
    host = brought.open()
    for array in host.values():
        array[:] = 0
    host["lengths"][:] = 1
    fill_contexts(roots, **host)
    brought.send()


def _first_rows(contexts: ContextMemory, rows: int) -> ContextMemory:
    """Copies, which the next look leaves alone."""
    root = contexts.root
    return ContextMemory(
        keys=contexts.keys[:, :rows].clone(),
        values=contexts.values[:, :rows].clone(),
        visible=contexts.visible[:rows].clone(),
        position=contexts.position[:rows].clone(),
        root=RootOutput(root.policy_logits[:rows].clone(), root.value_logits[:rows].clone()),
    )
