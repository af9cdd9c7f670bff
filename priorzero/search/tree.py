"""Batched Monte Carlo tree search: a tree, and our inference behind it.

The tree is `puct.PuctTree` or LightZero's C++ `mz_tree` (`SearchSettings.tree`). With the latter,
`tests/search/test_tree.py` checks that this loop visits the same nodes as LightZero's
`UniZeroMCTSCtree` does with the same network. What differs from LightZero in both: nodes are known
by index instead of by a hash of their latent, and only ids that name an action are children of
inner nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from priorzero.quiet import quiet_base
from priorzero.search.puct import PuctTree
from priorzero.search.root_prior import RootPrior
from priorzero.types import PriorZeroError
from priorzero.world_model.inference import SearchMemory
from priorzero.world_model.model import PriorZeroModel

with quiet_base():
    from lzero.mcts.ctree.ctree_muzero import mz_tree
    from lzero.policy import InverseScalarTransform


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search; defaults are LightZero's.

    num_simulations: expansions per root. discount: per step. pb_c_base, pb_c_init: PUCT constants.
    value_delta_max: smallest range used to normalise values. root_dirichlet_alpha,
    root_noise_weight: exploration noise, collect only. tree: "puct" (ours, reproducible) or
    "lightzero" (its C++ tree).
    """

    num_simulations: int = 25
    discount: float = 0.997
    pb_c_base: int = 19652
    pb_c_init: float = 1.25
    value_delta_max: float = 0.01
    root_dirichlet_alpha: float = 0.3
    root_noise_weight: float = 0.25
    tree: str = "puct"

    def __post_init__(self) -> None:
        if self.tree not in ("puct", "lightzero"):
            raise PriorZeroError(f"search tree {self.tree!r} is unknown; use 'puct' or 'lightzero'")


@dataclass(frozen=True)
class SearchResult:
    """Outcome of the search at one root: visit counts `[A]` in the order of the valid ids, and the
    root's value.
    """

    visit_counts: np.ndarray
    value: float


class _Tree(Protocol):
    """What the loop needs of a tree."""

    def select(self) -> tuple[np.ndarray, np.ndarray]: ...

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None: ...

    def results(self) -> list[SearchResult]: ...


def search(
    model: PriorZeroModel,
    memory: SearchMemory,
    priors: list[RootPrior],
    valid_ids: list[list[int]],
    vocabulary_size: int,
    scalar_of: InverseScalarTransform,
    settings: SearchSettings,
    noise: np.random.Generator | None = None,
    values: np.ndarray | None = None,
) -> list[SearchResult]:
    """Plan from `B` prepared roots.

    Args:
        memory: its `root` has been called for these roots.
        priors: mixture per root; its `log_mixed` is what the tree starts from.
        valid_ids: action ids per root, same order as the priors' arrays.
        vocabulary_size: ids below it may be children of inner nodes.
        scalar_of: turns categorical logits into scalars.
        noise: source of the Dirichlet noise mixed into the root's prior; None for none.
        values: `[B]` network values of the roots (the C++ tree has no use for them); None: zeros.
    """
    draws = None
    if noise is not None:
        draws = [noise.dirichlet([settings.root_dirichlet_alpha] * len(ids)) for ids in valid_ids]
    root_values = (
        np.zeros(len(valid_ids)) if values is None else np.asarray(values, dtype=np.float64)
    )
    make = _OurTree if settings.tree == "puct" else _LightZeroTree
    tree: _Tree = make(priors, valid_ids, vocabulary_size, root_values, draws, settings)
    device = next(model.parameters()).device
    for simulation in range(settings.num_simulations):
        parents, actions = tree.select()
        node = memory.expand(
            simulation,
            torch.as_tensor(parents, device=device),
            torch.as_tensor(actions, device=device),
        )
        rewards, leaf_values = _scalars(node.reward_logits, node.value_logits, scalar_of)
        tree.expand(rewards, leaf_values, node.policy_logits[:, :vocabulary_size].cpu().numpy())
    return tree.results()


class _OurTree:
    """`PuctTree` from log-priors and logits."""

    def __init__(
        self,
        priors: list[RootPrior],
        valid_ids: list[list[int]],
        vocabulary_size: int,
        values: np.ndarray,
        draws: list[np.ndarray] | None,
        settings: SearchSettings,
    ) -> None:
        probabilities = np.zeros((len(priors), vocabulary_size))
        valid = np.zeros(probabilities.shape, dtype=bool)
        for row, (prior, ids) in enumerate(zip(priors, valid_ids, strict=True)):
            p = np.exp(prior.log_mixed)
            if draws is not None:
                p = (1.0 - settings.root_noise_weight) * p + settings.root_noise_weight * draws[row]
            probabilities[row, ids] = p
            valid[row, ids] = True
        self._ids = valid_ids
        self._tree = PuctTree(
            probabilities,
            valid,
            values,
            settings.num_simulations + 1,
            settings.discount,
            settings.pb_c_init,
            settings.pb_c_base,
            settings.value_delta_max,
        )

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        return self._tree.select()

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        self._tree.expand(rewards, values, p / p.sum(axis=1, keepdims=True))

    def results(self) -> list[SearchResult]:
        visits, values = self._tree.root_visits, self._tree.root_values
        return [
            SearchResult(visits[row, ids], float(values[row])) for row, ids in enumerate(self._ids)
        ]


class _LightZeroTree:
    """LightZero's C++ tree behind the same three calls."""

    def __init__(
        self,
        priors: list[RootPrior],
        valid_ids: list[list[int]],
        vocabulary_size: int,
        values: np.ndarray,
        draws: list[np.ndarray] | None,
        settings: SearchSettings,
    ) -> None:
        batch = len(valid_ids)
        policies = np.zeros(
            (batch, max(vocabulary_size, 1 + max(max(ids) for ids in valid_ids))), dtype=np.float32
        )
        for row, (prior, ids) in enumerate(zip(priors, valid_ids, strict=True)):
            policies[row, ids] = prior.log_mixed
        self._settings, self._to_play, self._simulation = settings, [-1] * batch, 0
        self._roots = mz_tree.Roots(batch, [list(ids) for ids in valid_ids])
        zeros = [0.0] * batch
        if draws is None:
            self._roots.prepare_no_noise(zeros, policies.tolist(), self._to_play)
        else:
            self._roots.prepare(
                settings.root_noise_weight,
                [d.astype(np.float32).tolist() for d in draws],
                zeros,
                policies.tolist(),
                self._to_play,
            )
        self._stats = mz_tree.MinMaxStatsList(batch)
        self._stats.set_delta(settings.value_delta_max)

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        s = self._settings
        self._walk = mz_tree.ResultsWrapper(num=len(self._to_play))
        parents, _, actions, self._virtual = mz_tree.batch_traverse(
            self._roots,
            s.pb_c_base,
            s.pb_c_init,
            s.discount,
            self._stats,
            self._walk,
            list(self._to_play),
        )
        return np.asarray(parents), np.asarray(actions)

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        self._simulation += 1
        mz_tree.batch_backpropagate(
            self._simulation,
            self._settings.discount,
            rewards.tolist(),
            values.tolist(),
            logits.tolist(),
            self._stats,
            self._walk,
            self._virtual,
        )

    def results(self) -> list[SearchResult]:
        return [
            SearchResult(np.asarray(counts, dtype=np.float64), float(value))
            for counts, value in zip(
                self._roots.get_distributions(), self._roots.get_values(), strict=True
            )
        ]


def _scalars(
    reward_logits: Tensor, value_logits: Tensor, scalar_of: InverseScalarTransform
) -> tuple[np.ndarray, np.ndarray]:
    """Both heads in one transform, one transfer from the device."""
    both = scalar_of(torch.cat([reward_logits, value_logits])).view(2, -1).double().cpu().numpy()
    return both[0], both[1]
