"""A search on a GPU: walking, network and backup of all simulations captured in one CUDA graph.

A search uploads what its roots bring, replays the graph and reads the roots' statistics: one
transfer there, one back, and nothing crosses in between. A graph is captured for a number of roots
and of ids, both rounded up so that a run needs few of them; rows and ids beyond are padding that
changes nothing. Everything a graph reads stays where it is in memory, and each search overwrites
it.

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
from priorzero.search.fused.cuda_graph import Upload, capture
from priorzero.search.fused.cuda_network import CudaNetwork, CudaWeights, side_by_side
from priorzero.search.fused.rule import FusedRule, FusibleSearch
from priorzero.types import PriorZeroError
from priorzero.world_model.fused import WeightCopies, fuse, shape_of
from priorzero.world_model.inference import ContextMemory
from priorzero.world_model.model import PriorZeroModel

logger = logging.getLogger(__name__)

# Graphs that are kept; at width 768, 64 roots, 512 ids and 50 simulations one takes about 150 MB.
_MOST_GRAPHS = 8
_SMALLEST_IDS = 32
# What Triton calls the ways to multiply (`policy.search_precision`). "tf32x3" is as exact as plain
# single precision ("ieee"), which knows no tensor cores.
_PRECISIONS = dict(float32="tf32x3", tf32="tf32")


class CudaTree:
    """The trees of `B` roots on the device: the arrays of `TreeArrays`, in memory that does not
    move. `begin`, then `plant`, then `select` and `expand` once per simulation, then `finish`.

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

        # What the roots bring. The rule: its tables; discount, visit_constant, value_scale,
        # smallest_range. Ids in use.
        self._brought = Upload(
            device,
            dict(
                prior=((batch, actions), np.float64),
                valid=((batch, actions), np.int8),
                value=((batch,), np.float64),
                gumbel=((batch, actions) if halving else (1,), np.float64),
                schedule=((batch, simulations) if halving else (1,), np.int32),
                exploration=((nodes + 1,), np.float64),
                constants=((4,), np.float64),
                limit=((1,), np.int32),
            ),
        )
        self._path = zeros(batch, nodes, 2, dtype=torch.int32)
        self._depth = zeros(batch, dtype=torch.int32)
        self._parents, self._actions = (zeros(batch, dtype=torch.int64) for _ in range(2))

    def begin(self, search: FusibleSearch, rule: FusedRule) -> None:
        """Bring these roots; rows and ids beyond theirs are padding."""
        t, (rows, _, ids) = search.tree.arrays, search.tree.arrays.child.shape
        assert rule.halving == self._halving and ids <= self._sizes["K"]
        brought = self._brought.open()
        brought["limit"][:] = ids
        brought["constants"][:] = (
            search.tree.discount,
            rule.visit_constant,
            rule.value_scale,
            rule.smallest_range,
        )
        brought["exploration"][:] = rule.exploration
        if self._halving:
            brought["gumbel"][:rows, :ids] = rule.gumbel
            brought["schedule"][:rows] = rule.schedule

        # A padded row knows the id 0 alone.
        for name, numbers, first in (("prior", t.prior[:, 0], 1.0), ("valid", t.valid, 1)):
            place = brought[name]
            place[:] = 0
            place[:rows, :ids] = numbers
            place[rows:, 0] = first
        brought["value"][:rows], brought["value"][rows:] = t.node_returns[:, 0], 0.0
        self._brought.send()

    def plant(self) -> None:
        """Start from the roots that `begin` has brought."""
        brought = self._brought.device
        cuda_kernels.plant[(len(self._depth),)](
            self._child,
            self._visits,
            self._returns,
            self._prior,
            self._log_prior,
            self._node_visits,
            self._node_returns,
            self._low,
            self._high,
            brought["prior"],
            brought["value"],
            **self._launch(),
        )

    def select(self) -> tuple[Tensor, Tensor]:
        """Parent nodes `[B]` and action ids `[B]` to expand next, int64."""
        brought = self._brought.device
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
            brought["valid"],
            brought["exploration"],
            brought["gumbel"],
            brought["schedule"],
            brought["constants"],
            brought["limit"],
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
            self._brought.device["constants"],
            self._brought.device["limit"],
            self._path,
            self._depth,
            rewards.contiguous(),
            values.contiguous(),
            logits,
            simulation + 1,
            **self._launch(),
        )

    def finish(
        self, search: FusibleSearch, whole: Sequence[int] = (), also: Sequence[Tensor] = ()
    ) -> list[float]:
        """Put the roots' statistics into the search's own tree, in one transfer; of the rows
        `whole` everything, in some more.

        Args:
            also: numbers on the device that come along.

        Returns:
            those numbers.
        """
        t, (rows, _, ids) = search.tree.arrays, search.tree.arrays.child.shape
        edges = [x[:rows, 0, :ids] for x in (self._visits, self._returns)]
        roots = [x[:rows, 0] for x in (self._node_visits, self._node_returns)]
        parts = [*edges, *roots, self._low[:rows], self._high[:rows], *also]
        found = torch.cat([x.reshape(-1).double() for x in parts]).cpu().numpy()
        ends = np.cumsum([x.numel() for x in parts])[:-1]
        visits, returns, *single = np.split(found, ends)

        t.visits[:, 0], t.returns[:, 0] = visits.reshape(rows, ids), returns.reshape(rows, ids)
        t.node_visits[:, 0], t.node_returns[:, 0], t.low[:], t.high[:] = single[:4]
        for row in whole:
            for edges in ("child", "visits", "returns", "prior"):
                getattr(t, edges)[row] = getattr(self, f"_{edges}")[row, :, :ids].cpu().numpy()
            for nodes in ("rewards", "node_visits", "node_returns"):
                getattr(t, nodes)[row] = getattr(self, f"_{nodes}")[row].cpu().numpy()
        return [x.item() for x in single[4:]]

    def _launch(self) -> dict[str, int | bool]:
        block = triton.next_power_of_2(self._sizes["K"])
        return self._sizes | dict(BLOCK=block, HALVING=self._halving, enable_fp_fusion=False)


@dataclass(frozen=True, eq=False)
class CapturedSearch:
    """A graph and the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    network: CudaNetwork
    tree: CudaTree


class CudaSimulations:
    """All simulations of a search; `Simulations` of `planner.py`. One search at a time, whatever
    the thread that asks.

    Args:
        model: the network, on a GPU; its weights may change between searches.
        simulations: `n`.
        context_steps: most real observations a root looks back on.
        precision: of products, see `policy.search_precision`.
    """

    def __init__(
        self, model: PriorZeroModel, simulations: int, context_steps: int, precision: str
    ) -> None:
        self._model, self._simulations = model, simulations
        self._precision = _PRECISIONS[precision]
        self._context = 2 * context_steps - 1
        self._ids = len(model.world_model.head_policy.head_module[2].bias)
        self._weights: CudaWeights | None = None
        self._copies: WeightCopies | None = None
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
            _begin(captured.network, captured.tree, contexts, search, rule)
            captured.graph.replay()
            clamped = captured.network.clamped(rows)
            (count,) = captured.tree.finish(search, whole, also=[clamped])
            return int(count)

    def _refresh_weights(self) -> None:
        if self._weights is None:
            last = self._context + 2 * self._simulations - 1
            self._weights = side_by_side(fuse(self._model, self._ids, last))
            self._copies = WeightCopies(self._weights.fused, self._model)
        else:
            self._copies.refresh()

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
        device = contexts.keys.device
        network = CudaNetwork(
            self._weights.first_actions(actions),
            shape_of(self._model),
            batch,
            self._context,
            self._simulations,
            self._precision,
        )
        tree = CudaTree(batch, self._simulations, actions, rule.halving, device)
        _begin(network, tree, contexts, search, rule)

        graph, _ = capture(lambda: self._simulate(network, tree), device)
        return CapturedSearch(graph, network, tree)

    def _simulate(self, network: CudaNetwork, tree: CudaTree) -> None:
        tree.plant()
        for simulation in range(self._simulations):
            node = network.expand(simulation, *tree.select())
            tree.expand(simulation, node.rewards, node.values, node.logits)


def _begin(
    network: CudaNetwork,
    tree: CudaTree,
    contexts: ContextMemory,
    search: FusibleSearch,
    rule: FusedRule,
) -> None:
    network.begin(contexts)
    tree.begin(search, rule)
