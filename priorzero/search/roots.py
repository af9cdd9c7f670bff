"""What planning takes and gives: a root before the search, and the decision that comes out of it.

Made by whoever plays (the slot of an episode knows its context), read by `priorzero_policy.py`.

Letters: `B` roots, `A` valid actions, `E` dimension of an observation vector, `c` <= `C` steps of
context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from priorzero.search.root_prior import RootPrior


@dataclass(frozen=True, eq=False)
class Root:
    """One state to plan from.

    Attributes:
        observations: `[c, E]` float32, the newest real observations of the episode, oldest first;
            the last one is the root's own.
        actions: `[c - 1]` ids of the actions taken between them.
        valid_ids: `[A]` ids the search may choose from.
        llm_logprobs: `[A]` log-probabilities of these actions from the LLM, already reduced over
            tokens; None where no LLM answered.
        keep_tree: hand the finished tree out with the result.
        llm_target_prior: the prior in the LLM's training target (`llm.sft.target_prior`).
    """

    observations: np.ndarray
    actions: np.ndarray
    valid_ids: np.ndarray
    llm_logprobs: np.ndarray | None = None
    keep_tree: bool = False
    llm_target_prior: str = "mixture"

    def __post_init__(self) -> None:
        assert self.observations.ndim == 2 and len(self.observations) >= 1
        assert len(self.actions) == len(self.observations) - 1
        assert len(self.valid_ids) >= 1
        assert self.llm_logprobs is None or len(self.llm_logprobs) == len(self.valid_ids)


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Outcome of the search at one root; arrays follow the root's valid ids.

    Attributes:
        visit_counts: `[A]`.
        value: mean return seen from the root.
        target_policy: `[A]` the search's policy, from the prior it started from, sums to one.
        choice: position of the action to play, where the root policy decides that itself; None
            where it is drawn from the visit counts.
    """

    visit_counts: np.ndarray
    value: float
    target_policy: np.ndarray
    choice: int | None = None


@dataclass(frozen=True, eq=False)
class TreeNodes:
    """The finished tree of one root, as arrays `[N]` over its nodes: node 0 is the root, and every
    node comes after its parent. "The step" is the one from the parent into the node.

    Attributes:
        parent: number of the parent; -1 for the root.
        action: id of the step's action; -1 for the root.
        visits: how often the step was taken; of the root, the simulations.
        q: mean of the step's reward + discount * return below; of the root, its mean return.
        prior: probability of the step when the search began, root noise included; 1 for the root.
        reward: the network's prediction for the step; 0 for the root.
        value: the network's own value of the node, before anything was tried below it.
    """

    parent: np.ndarray
    action: np.ndarray
    visits: np.ndarray
    q: np.ndarray
    prior: np.ndarray
    reward: np.ndarray
    value: np.ndarray

    def __post_init__(self) -> None:
        assert self.parent[0] == -1 and (self.parent[1:] < np.arange(1, len(self.parent))).all()


@dataclass(frozen=True, eq=False)
class SearchOutput:
    """What planning at one root gave. Arrays `[A]` follow the root's `valid_ids`.

    Attributes:
        action_index: position of the chosen action.
        visit_counts: `[A]` of the search.
        target_policy: `[A]` the search's policy, from the mixture, sums to one; what policies are
            trained on, unless one of the next two says otherwise.
        behaviour: `[A]` probabilities the action was drawn from.
        root_value: of the search.
        predicted_value: of the network alone.
        prior: the mixture that entered at the root, without noise.
        tree: where the root asked for it and the root policy shows it.
        world_model_target, llm_target: `[A]` what this learner is trained on, where its target has
            another prior (`policy.target_prior`, `llm.sft.target_prior`); else None.
    """

    action_index: int
    visit_counts: np.ndarray
    target_policy: np.ndarray
    behaviour: np.ndarray
    root_value: float
    predicted_value: float
    prior: RootPrior
    tree: TreeNodes | None = None
    world_model_target: np.ndarray | None = None
    llm_target: np.ndarray | None = None


class ValidActions:
    """The valid actions of all roots laid end to end, so that numbers of all roots are one array
    `[M]`, M = the sum of the roots' A, and nothing is done root by root.

    Args:
        roots: `B` of them.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        self.sizes = np.array([len(root.valid_ids) for root in roots])
        self.ids = np.concatenate([root.valid_ids for root in roots])
        self.rows = np.repeat(np.arange(len(roots)), self.sizes)
        self.ends = np.cumsum(self.sizes)
        self.starts = self.ends - self.sizes

    def spread(self, numbers: np.ndarray, width: int) -> np.ndarray:
        """`[M]` -> `[B, width]` over action ids; 0 for what is not valid."""
        wide = np.zeros((len(self.sizes), width), dtype=numbers.dtype)
        wide[self.rows, self.ids] = numbers
        return wide

    def gather(self, wide: np.ndarray) -> np.ndarray:
        """`[B, K]` over action ids -> `[M]`."""
        return wide[self.rows, self.ids]

    def pad(self, numbers: np.ndarray) -> np.ndarray:
        """`[M]` -> `[B, largest A]`, each root's in its order; 0 beyond its own."""
        padded = np.zeros((len(self.sizes), self.sizes.max()), dtype=numbers.dtype)
        padded[np.arange(padded.shape[1]) < self.sizes[:, None]] = numbers
        return padded

    def split(self, numbers: np.ndarray) -> list[np.ndarray]:
        """`[M]` -> `[A]` per root."""
        return [numbers[a:b] for a, b in zip(self.starts, self.ends, strict=True)]


class Contexts(NamedTuple):
    """The contexts of `B` roots, right-padded to the longest: what the network reads.

    observations `[B, C, E]` float32, actions `[B, C]` int64, lengths `[B]` int64. Beyond
    `lengths[b]` observations, and `lengths[b] - 1` actions, row b is padding.
    """

    observations: Tensor
    actions: Tensor
    lengths: Tensor


def batch_contexts(roots: Sequence[Root], device: str | torch.device) -> Contexts:
    """The contexts of these roots as tensors, row b for `roots[b]`."""
    longest, width = max(len(r.observations) for r in roots), roots[0].observations.shape[1]
    observations = np.zeros((len(roots), longest, width), dtype=np.float32)
    actions = np.zeros((len(roots), longest), dtype=np.int64)
    lengths = np.zeros(len(roots), dtype=np.int64)
    fill_contexts(roots, observations, actions, lengths)
    return Contexts(*(torch.from_numpy(x).to(device) for x in (observations, actions, lengths)))


def fill_contexts(
    roots: Sequence[Root], observations: np.ndarray, actions: np.ndarray, lengths: np.ndarray
) -> None:
    """Write the contexts of these roots into the first rows of zeros, shaped as in `Contexts`."""
    for row, root in enumerate(roots):
        observations[row, : len(root.observations)] = root.observations
        actions[row, : len(root.actions)] = root.actions
    lengths[: len(roots)] = [len(root.observations) for root in roots]
