"""Batched Monte Carlo tree search: LightZero's C++ tree, with our inference behind it.

The selection and backup are LightZero's (`mz_tree`); `tests/search/test_tree.py` checks that this loop visits the same
nodes as LightZero's `UniZeroMCTSCtree` does with the same network. What differs: nodes are known by index instead
of by a hash of their latent, and only ids that name an action are children of inner nodes.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from priorzero.quiet import quiet_base
from priorzero.search.root_prior import RootPrior
from priorzero.world_model.inference import SearchMemory
from priorzero.world_model.model import PriorZeroModel

with quiet_base():
    from lzero.mcts.ctree.ctree_muzero import mz_tree
    from lzero.policy import InverseScalarTransform


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search; defaults are LightZero's.

    num_simulations: expansions per root. discount: per step. pb_c_base, pb_c_init: PUCT constants. value_delta_max:
    smallest range used to normalise values. root_dirichlet_alpha, root_noise_weight: exploration noise, collect only.
    """

    num_simulations: int = 25
    discount: float = 0.997
    pb_c_base: int = 19652
    pb_c_init: float = 1.25
    value_delta_max: float = 0.01
    root_dirichlet_alpha: float = 0.3
    root_noise_weight: float = 0.25


@dataclass(frozen=True)
class SearchResult:
    """Outcome of the search at one root: visit counts `[A]` in the order of the valid ids, and the root's value."""

    visit_counts: np.ndarray
    value: float


def search(model: PriorZeroModel, memory: SearchMemory, priors: list[RootPrior], valid_ids: list[list[int]],
           vocabulary_size: int, scalar_of: InverseScalarTransform, settings: SearchSettings,
           noise: np.random.Generator | None = None) -> list[SearchResult]:
    """Plan from `B` prepared roots.

    Args:
        memory: its `root` has been called for these roots.
        priors: mixture per root; its `log_mixed` is what the tree starts from.
        valid_ids: action ids per root, same order as the priors' arrays.
        vocabulary_size: ids below it may be children of inner nodes.
        scalar_of: turns categorical logits into scalars.
        noise: source of the Dirichlet noise mixed into the root's prior; None for none.
    """
    batch = len(valid_ids)
    policies = np.zeros((batch, model.action_space_size), dtype=np.float32)
    for row, (prior, ids) in enumerate(zip(priors, valid_ids, strict=True)):
        policies[row, ids] = prior.log_mixed
    roots = mz_tree.Roots(batch, valid_ids)
    to_play = [-1] * batch
    zeros = [0.0] * batch
    if noise is None:
        roots.prepare_no_noise(zeros, policies.tolist(), to_play)
    else:
        draws = [noise.dirichlet([settings.root_dirichlet_alpha] * len(ids)).astype(np.float32).tolist()
                 for ids in valid_ids]
        roots.prepare(settings.root_noise_weight, draws, zeros, policies.tolist(), to_play)
    stats = mz_tree.MinMaxStatsList(batch)
    stats.set_delta(settings.value_delta_max)
    device = next(model.parameters()).device
    for simulation in range(settings.num_simulations):
        results = mz_tree.ResultsWrapper(num=batch)
        parents, _, actions, virtual_to_play = mz_tree.batch_traverse(
            roots, settings.pb_c_base, settings.pb_c_init, settings.discount, stats, results, list(to_play))
        node = memory.expand(simulation, torch.as_tensor(parents, device=device), torch.as_tensor(actions, device=device))
        rewards, values = _scalars(node.reward_logits, node.value_logits, scalar_of)
        mz_tree.batch_backpropagate(simulation + 1, settings.discount, rewards, values,
                                    node.policy_logits[:, :vocabulary_size].tolist(), stats, results, virtual_to_play)
    return [SearchResult(np.asarray(counts, dtype=np.float64), float(value))
            for counts, value in zip(roots.get_distributions(), roots.get_values(), strict=True)]


def _scalars(reward_logits: Tensor, value_logits: Tensor, scalar_of: InverseScalarTransform) -> tuple[list, list]:
    """Both heads in one transform, one transfer from the device."""
    both = scalar_of(torch.cat([reward_logits, value_logits])).view(2, -1).tolist()
    return both[0], both[1]
