"""A search on a GPU: walking, network and backup of all simulations captured in one CUDA graph.

A plan uploads what its roots bring, replays the graph and reads the roots' statistics: nothing
crosses between host and device in between. A graph is captured for a number of roots and of ids,
both rounded up so that a run needs few of them; rows and ids beyond are padding that changes
nothing. Everything a graph reads stays where it is in memory, and each search overwrites it.

Letters: `B` roots there is room for, `N` nodes, `K` ids there is room for, `n` simulations.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from priorzero.search.fused import cuda_kernels
from priorzero.search.fused.rule import FusedRule, FusibleSearch
from priorzero.types import PriorZeroError
from priorzero.world_model.fused import FusedMemory, FusedWeights, fuse, overwrite, shape_of
from priorzero.world_model.inference import ContextMemory
from priorzero.world_model.model import PriorZeroModel

logger = logging.getLogger(__name__)

# Graphs that are kept; at width 768, 64 roots, 512 ids and 50 simulations one takes about 150 MB.
_MOST_GRAPHS = 8
_SMALLEST_IDS = 32


class CudaTree:
    """The trees of `B` roots on the device: the arrays of `TreeArrays`, in memory that does not
    move. `begin`, then `select` and `expand` once per simulation, then `finish`.

    Args:
        batch, simulations, actions: `B`, `n`, `K`.
        halving: the rule, see `FusedRule`.
        device: a CUDA device (or the CPU, under Triton's interpreter).
    """

    def __init__(
        self, batch: int, simulations: int, actions: int, halving: bool, device: str | torch.device
    ) -> None:
        nodes = simulations + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._halving, self._sizes = halving, dict(N=nodes, K=actions)
        self._child = zeros(batch, nodes, actions, dtype=torch.int32)
        self._visits, self._returns, self._prior = (zeros(batch, nodes, actions) for _ in range(3))
        self._log_prior = zeros(batch, nodes, actions) if halving else zeros(1)
        self._rewards, self._node_visits, self._node_returns = (
            zeros(batch, nodes) for _ in range(3)
        )
        self._low, self._high = zeros(batch), zeros(batch)
        self._valid = zeros(batch, actions, dtype=torch.int8)

        # The rule: its tables; discount, visit_constant, value_scale, smallest_range; ids in use.
        self._exploration, self._gumbel = zeros(nodes + 1), zeros(batch, actions)
        self._schedule = zeros(batch, simulations, dtype=torch.int32)
        self._constants, self._limit = zeros(4), zeros(1, dtype=torch.int32)

        self._path = zeros(batch, nodes, 2, dtype=torch.int32)
        self._depth = zeros(batch, dtype=torch.int32)
        self._parents, self._actions = (zeros(batch, dtype=torch.int64) for _ in range(2))

    def begin(self, search: FusibleSearch, rule: FusedRule) -> None:
        """Start from these roots; rows and ids beyond theirs are padding."""
        t, (rows, _, ids) = search.tree.arrays, search.tree.arrays.child.shape
        assert rule.halving == self._halving and ids <= self._sizes["K"]
        self._limit.fill_(ids)
        numbers = search.tree.discount, rule.visit_constant, rule.value_scale, rule.smallest_range
        _fill(self._constants, np.array(numbers, dtype=np.float64))
        _fill(self._exploration, rule.exploration)
        _fill(self._gumbel[:rows, :ids], rule.gumbel)
        _fill(self._schedule[:rows], rule.schedule)

        # A padded row knows the id 0 alone.
        for array in (self._child, self._visits, self._returns, self._prior):
            array[:, 0] = 0
        self._prior[rows:, 0, 0] = 1.0
        self._valid.zero_()
        self._valid[rows:, 0] = 1
        self._node_visits[:, 0], self._node_returns[:, 0] = 1.0, 0.0
        self._low.fill_(torch.inf)
        self._high.fill_(-torch.inf)

        _fill(self._prior[:rows, 0, :ids], t.prior[:, 0])
        _fill(self._valid[:rows, :ids], t.valid)
        _fill(self._node_returns[:rows, 0], t.node_returns[:, 0])
        if self._halving:
            root = self._prior[:, 0]
            nothing = cuda_kernels.NOTHING
            self._log_prior[:, 0] = root.clamp_min(1e-300).log().where(root > 0, nothing)

    def select(self) -> tuple[Tensor, Tensor]:
        """Parent nodes `[B]` and action ids `[B]` to expand next, int64."""
        cuda_kernels.walk[(len(self._depth),)](
            self._child,
            self._visits,
            self._returns,
            self._prior,
            self._log_prior,
            self._node_visits,
            self._node_returns,
            self._low,
            self._high,
            self._valid,
            self._exploration,
            self._gumbel,
            self._schedule,
            self._constants,
            self._limit,
            self._path,
            self._depth,
            self._parents,
            self._actions,
            **self._launch(),
        )
        return self._parents, self._actions

    def expand(self, simulation: int, rewards: Tensor, values: Tensor, logits: Tensor) -> None:
        """What the network says there: `[B]` and `[B]` float64, and policy logits `[B, K]`."""
        assert logits.is_contiguous() and logits.shape[1] == self._sizes["K"]
        cuda_kernels.grow[(len(self._depth),)](
            self._child,
            self._visits,
            self._returns,
            self._prior,
            self._log_prior,
            self._rewards,
            self._node_visits,
            self._node_returns,
            self._low,
            self._high,
            self._constants,
            self._limit,
            self._path,
            self._depth,
            rewards.contiguous(),
            values.contiguous(),
            logits,
            simulation + 1,
            **self._launch(),
        )

    def finish(self, search: FusibleSearch, whole: Sequence[int] = ()) -> None:
        """Put the roots' statistics into the search's own tree, in one transfer; of the rows
        `whole` everything, in some more.
        """
        t, (rows, _, ids) = search.tree.arrays, search.tree.arrays.child.shape
        columns = self._node_visits[:, 0], self._node_returns[:, 0], self._low, self._high
        single = torch.stack(columns, 1)
        found = torch.cat([self._visits[:, 0, :ids], self._returns[:, 0, :ids], single], 1)
        found = found[:rows].cpu().numpy()
        t.visits[:, 0], t.returns[:, 0] = found[:, :ids], found[:, ids : 2 * ids]
        t.node_visits[:, 0], t.node_returns[:, 0] = found[:, -4], found[:, -3]
        t.low[:], t.high[:] = found[:, -2], found[:, -1]

        for row in whole:
            for edges in ("child", "visits", "returns", "prior"):
                getattr(t, edges)[row] = getattr(self, f"_{edges}")[row, :, :ids].cpu().numpy()
            for nodes in ("rewards", "node_visits", "node_returns"):
                getattr(t, nodes)[row] = getattr(self, f"_{nodes}")[row].cpu().numpy()

    def _launch(self) -> dict[str, int | bool]:
        block = triton.next_power_of_2(self._sizes["K"])
        return self._sizes | dict(BLOCK=block, HALVING=self._halving, enable_fp_fusion=False)


@dataclass(frozen=True, eq=False)
class CapturedSearch:
    """A graph and the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    memory: FusedMemory
    tree: CudaTree


class CudaSimulations:
    """All simulations of a search; `Simulations` of `planner.py`. One search at a time, whatever
    the thread that asks.

    Args:
        model: the network, on a GPU; its weights may change between searches.
        simulations: `n`.
        context_steps: most real observations a root looks back on.
    """

    def __init__(self, model: PriorZeroModel, simulations: int, context_steps: int) -> None:
        self._model, self._simulations = model, simulations
        self._context = 2 * context_steps - 1
        self._ids = len(model.world_model.head_policy.head_module[2].bias)
        self._weights: FusedWeights | None = None
        self._captured: OrderedDict[tuple[int, int, bool], CapturedSearch] = OrderedDict()
        self._lock = threading.Lock()

    @torch.inference_mode()
    def run(
        self,
        contexts: ContextMemory,
        search: FusibleSearch,
        rule: FusedRule,
        inner_actions: int,
        whole: Sequence[int] = (),
    ) -> int:
        """Grow the begun `search` from the roots of `contexts`. Afterwards its tree holds the
        roots' statistics, and of the nodes below those of the rows `whole`.

        Args:
            inner_actions: ids in use.
            whole: rows whose tree is wanted, not its root alone.

        Returns:
            how many positions lay beyond the trained window.

        Raises:
            PriorZeroError: the device's memory or software does not let the search be captured.
        """
        rows = len(contexts.visible)
        with self._lock:
            self._refresh_weights()
            captured = self._search_for(rows, inner_actions, contexts, search, rule)
            _begin(captured.memory, captured.tree, contexts, search, rule)
            captured.graph.replay()
            captured.tree.finish(search, whole)
            return int(captured.memory.clamped(rows))

    def _refresh_weights(self) -> None:
        fresh = fuse(self._model, self._ids, self._context + 2 * self._simulations - 1)
        if self._weights is None:
            self._weights = fresh
        else:
            overwrite(self._weights, fresh)

    def _search_for(
        self,
        rows: int,
        ids: int,
        contexts: ContextMemory,
        search: FusibleSearch,
        rule: FusedRule,
    ) -> CapturedSearch:
        """The captured search with room for `rows` and `ids`, captured now where there is none."""
        batch = triton.next_power_of_2(rows)
        actions = min(self._ids, max(_SMALLEST_IDS, triton.next_power_of_2(ids)))
        key = batch, actions, rule.halving
        if key not in self._captured:
            if len(self._captured) == _MOST_GRAPHS:
                gone, _ = self._captured.popitem(last=False)
                logger.info("search graph dropped: %d roots, %d ids", *gone[:2])
            started = time.perf_counter()
            try:
                self._captured[key] = self._capture(batch, actions, contexts, search, rule)
            except Exception as error:
                raise PriorZeroError(
                    f"the search of {batch} roots and {actions} ids could not be captured as a "
                    f"CUDA graph ({type(error).__name__}: {error}); set "
                    "policy.search_backend=plain to search without"
                ) from error
            seconds = time.perf_counter() - started
            logger.info("search graph: %d roots, %d ids, %.1f s", batch, actions, seconds)
        self._captured.move_to_end(key)
        return self._captured[key]

    def _capture(
        self,
        batch: int,
        actions: int,
        contexts: ContextMemory,
        search: FusibleSearch,
        rule: FusedRule,
    ) -> CapturedSearch:
        weights, device = self._weights, contexts.keys.device
        policy = type(weights.policy)(*(x[..., :actions] for x in weights.policy))
        memory = FusedMemory(
            weights._replace(policy=policy),
            shape_of(self._model),
            batch,
            self._context,
            self._simulations,
        )
        tree = CudaTree(batch, self._simulations, actions, rule.halving, device)
        _begin(memory, tree, contexts, search, rule)

        # Once without a graph: kernels are compiled and libraries make themselves ready.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._simulate(memory, tree)
        torch.cuda.current_stream(device).wait_stream(stream)

        # Other threads may use the device meanwhile.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._simulate(memory, tree)
        return CapturedSearch(graph, memory, tree)

    def _simulate(self, memory: FusedMemory, tree: CudaTree) -> None:
        for simulation in range(self._simulations):
            node = memory.expand(simulation, *tree.select())
            tree.expand(simulation, node.rewards, node.values, node.logits)


def _begin(
    memory: FusedMemory,
    tree: CudaTree,
    contexts: ContextMemory,
    search: FusibleSearch,
    rule: FusedRule,
) -> None:
    memory.begin(contexts)
    tree.begin(search, rule)


def _fill(place: Tensor, numbers: np.ndarray) -> None:
    place.copy_(torch.from_numpy(np.ascontiguousarray(numbers)))
