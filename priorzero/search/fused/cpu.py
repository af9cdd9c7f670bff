"""A search on the CPU: compiled walking and backup, and the fused network, by turns.

Letters: `B` roots, `K` action ids nodes branch over, `n` simulations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from priorzero.search.fused import cpu_kernels
from priorzero.search.fused.rule import FusedRule, FusibleSearch
from priorzero.search.roots import SearchResult
from priorzero.search.rules import softmax
from priorzero.world_model.fused import FusedMemory, fuse, shape_of
from priorzero.world_model.inference import ContextMemory
from priorzero.world_model.model import PriorZeroModel


class CpuSimulations:
    """All simulations of a search; `Simulations` of `planner.py`.

    Args:
        model: the network; its weights may change between searches.
        simulations: `n`.
    """

    def __init__(self, model: PriorZeroModel, simulations: int) -> None:
        self._model, self._simulations = model, simulations

    @torch.inference_mode()
    def run(
        self,
        contexts: ContextMemory,
        search: FusibleSearch,
        rule: FusedRule,
        inner_actions: int,
        whole: Sequence[int] = (),
    ) -> int:
        """Grow the begun `search` from the roots of `contexts`.

        Args:
            inner_actions: `K`.
            whole: see `Simulations`; here the tree grows in place, and is whole in every row.

        Returns:
            how many positions lay beyond the trained window.
        """
        batch, context = contexts.visible.shape
        weights = fuse(self._model, inner_actions, context + 2 * self._simulations - 1)
        shape = shape_of(self._model)
        memory = FusedMemory(weights, shape, batch, context, self._simulations)
        memory.begin(contexts)

        tree = CompiledTree(search, rule)
        for simulation in range(self._simulations):
            parents, actions = tree.select()
            node = memory.expand(simulation, torch.from_numpy(parents), torch.from_numpy(actions))
            tree.expand(node.rewards.numpy(), node.values.numpy(), node.logits.numpy())
        return int(memory.clamped(batch))


class CompiledTree:
    """A begun search whose tree grows by compiled kernels, in place: `SearchTree`'s three calls.

    Args:
        search: begun, and not grown yet.
        rule: its rule.
    """

    def __init__(self, search: FusibleSearch, rule: FusedRule) -> None:
        self._search, self._halving = search, rule.halving
        self._tree, self._discount = search.tree.arrays, search.tree.discount
        batch, nodes, actions = self._tree.child.shape
        self._path = np.zeros((batch, nodes, 2), dtype=np.int64)
        self._depth = np.zeros(batch, dtype=np.int64)
        self._rows, self._size = np.arange(batch), 1

        # One kernel reads logarithms of inner nodes' priors; they are taken once per node.
        self._log_prior = np.zeros((batch, nodes, actions) if rule.halving else (1, 1, 1))
        self._rule = (
            rule.halving,
            rule.exploration,
            rule.gumbel,
            rule.schedule,
            (float(rule.visit_constant), float(rule.value_scale), float(rule.smallest_range)),
        )

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        t = self._tree
        cpu_kernels.walk(
            t.child,
            t.visits,
            t.returns,
            t.prior,
            self._log_prior,
            t.node_visits,
            t.node_returns,
            t.low,
            t.high,
            t.valid,
            *self._rule,
            self._path,
            self._depth,
        )
        last = self._path[self._rows, self._depth]
        return last[:, 0], last[:, 1]

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        t = self._tree
        cpu_kernels.grow(
            t.child,
            t.visits,
            t.returns,
            t.prior,
            self._log_prior,
            t.rewards,
            t.node_visits,
            t.node_returns,
            t.low,
            t.high,
            self._halving,
            float(self._discount),
            self._path,
            self._depth,
            self._size,
            np.asarray(rewards, dtype=np.float64),
            np.asarray(values, dtype=np.float64),
            softmax(logits),
        )
        self._size += 1

    def results(self) -> list[SearchResult]:
        return self._search.results()
