"""Planning, from roots to what the search found: network, mixture, tree search.

The one way into the search for collection, evaluation and reanalysis. The tree behind it is a root
policy (`root_policies/`). Its simulations run plain (`simulate`, the reference) or fused
(`fused/`), see `policy.search_backend`. `tests/search/test_planner.py` checks that with LightZero's
tree the plain loop visits the same nodes as LightZero's own does.

Letters: `B` roots, `A` valid actions of a root, `K` action ids nodes branch over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from priorzero.compute import torch_threads
from priorzero.plugins import load
from priorzero.search.exploration import with_noise_at
from priorzero.search.fused.rule import FusedRule, FusibleSearch
from priorzero.search.root_prior import RootPrior, mix_root_priors, prior_in_target
from priorzero.search.roots import Root, SearchResult, TreeNodes, batch_contexts
from priorzero.settings.policy import PolicySettings, RootPriorSettings
from priorzero.types import PriorZeroError
from priorzero.world_model.inference import ContextMemory, SearchMemory, read_contexts
from priorzero.world_model.model import PriorZeroModel

logger = logging.getLogger(__name__)

# Categorical logits `[n, S]` -> scalars `[n, 1]`.
ScalarOf = Callable[[Tensor], Tensor]


class SearchTree(Protocol):
    """What the simulations need of a root policy's tree."""

    def select(self) -> tuple[np.ndarray, np.ndarray]:
        """Parent nodes `[B]` and action ids `[B]` to expand next."""

    def expand(self, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        """What the network says there: `[B]`, `[B]`, and policy logits `[B, K]`."""

    def results(self) -> list[SearchResult]:
        """One per root."""

    def nodes(self, row: int) -> TreeNodes | None:
        """The tree of one root; None from a tree that does not show it. Asked after `results`, and
        only where somebody wants to see it.
        """


@dataclass(frozen=True, eq=False)
class Plan:
    """A root after planning: the search's result, the network's own value, the mixture, and the
    tree where the root asked for it. world_model_target, llm_target: as in `SearchOutput`.
    """

    result: SearchResult
    predicted_value: float
    prior: RootPrior
    tree: TreeNodes | None = None
    world_model_target: np.ndarray | None = None
    llm_target: np.ndarray | None = None

    @property
    def taught(self) -> np.ndarray:
        """`[A]` what the world model's policy is trained on."""
        own = self.world_model_target
        return self.result.target_policy if own is None else own

    @property
    def favourite(self) -> int:
        """Position of the action that is played where nothing is drawn: the root policy's own
        choice, else the most visited. Ties go to the action the mixture prefers, not to the first
        in the alphabet.
        """
        if self.result.choice is not None:
            return self.result.choice
        return int(np.lexsort((self.prior.log_mixed, self.result.visit_counts))[-1])


class Simulations(Protocol):
    """All simulations of a search, fused: one implementation per kind of device."""

    def run(
        self,
        contexts: ContextMemory,
        search: FusibleSearch,
        rule: FusedRule,
        inner_actions: int,
        whole: Sequence[int],
    ) -> int:
        """Grow the begun `search` from the roots of `contexts`; `rule` is its own. Afterwards its
        tree holds the roots' statistics, and below the roots `whole` every node.

        Returns:
            how many positions lay beyond the trained window.
        """


class Planner:
    """Plans batches of roots with one network.

    Args:
        model: the network; its weights may change between calls.
        settings: search and threads.
        scalar_of: the network's transform of values and rewards.
        device: where the network lives.

    Raises:
        PriorZeroError: a fused search was asked for and cannot be had.
    """

    def __init__(
        self, model: PriorZeroModel, settings: PolicySettings, scalar_of: ScalarOf, device: str
    ) -> None:
        self._model, self._settings, self._scalar_of = model, settings, scalar_of
        self._device = device
        self._policy = load("priorzero.search.root_policies", settings.root_policy)
        self._fused = fused_simulations(model, settings, self._policy, device)
        self._read = reader_of(model, settings, device, captured=self._fused is not None)
        self.positions_clamped = 0

    def plan(
        self,
        roots: Sequence[Root],
        inner_actions: int,
        root_prior: RootPriorSettings,
        env_steps: int,
        noise: np.random.Generator | None,
    ) -> list[Plan]:
        """Plan from `B` roots.

        Args:
            inner_actions: `K`; ids below it are tried in nodes below the roots.
            root_prior: how the LLM enters.
            env_steps: of the training so far, for the schedules of mixture and noise.
            noise: source of exploration noise; None for none.
        """
        if self._model.training:  # eval() walks through all modules, in every plan
            self._model.eval()
        with torch_threads(self._settings.search_threads):
            # 1. The network looks at the roots.
            contexts = self._read(roots)
            values, logits = self._fetch(contexts)

            # 2. Its policy and the LLM's are mixed.
            priors = mix_root_priors(
                [logits[row, root.valid_ids] for row, root in enumerate(roots)],
                [root.llm_logprobs for root in roots],
                root_prior,
                env_steps,
            )

            # 3. The tree grows by one node per root and simulation.
            settings = with_noise_at(self._settings, env_steps)
            search = self._policy.begin(roots, priors, values, inner_actions, settings, noise)
            shown = [row for row, root in enumerate(roots) if root.keep_tree]
            results = self._grow(contexts, search, inner_actions, shown)
        trees = [search.nodes(row) if root.keep_tree else None for row, root in enumerate(roots)]

        # 4. What each learner is taught, where its target has a prior of its own.
        own = [self._settings.target_prior] * len(roots)
        wm_targets = self._targets(search, roots, priors, own)
        llm_targets = self._targets(search, roots, priors, [r.llm_target_prior for r in roots])
        columns = results, values.tolist(), priors, trees, wm_targets, llm_targets
        return [Plan(*row) for row in zip(*columns, strict=True)]

    def _fetch(self, contexts: ContextMemory) -> tuple[np.ndarray, np.ndarray]:
        """The roots' values `[B]`, float64, and policy logits `[B, V]`, in one transfer."""
        values = self._scalar_of(contexts.root.value_logits).view(-1, 1)
        found = torch.cat([values, contexts.root.policy_logits], dim=1).cpu().numpy()
        return found[:, 0].astype(np.float64), found[:, 1:]

    def _targets(
        self,
        search: SearchTree,
        roots: Sequence[Root],
        priors: Sequence[RootPrior],
        names: Sequence[str],
    ) -> list[np.ndarray | None]:
        """The finished search's targets with these priors; None where that is the mixture, whose
        target is the search's own.

        Raises:
            PriorZeroError: the root policy's target is no operator on a prior.
        """
        if all(name == "mixture" for name in names):
            return [None] * len(roots)
        if not hasattr(self._policy, "targets"):
            raise PriorZeroError(
                f"root policy {self._settings.root_policy!r} knows no target with another prior "
                "than its own: set policy.target_prior and llm.sft.target_prior to mixture, or "
                "give its file a function targets (priorzero/search/root_policies/__init__.py)"
            )
        found = self._policy.targets(
            search,
            [
                np.exp(prior_in_target(name, prior, root.llm_logprobs))
                for name, prior, root in zip(names, priors, roots, strict=True)
            ],
        )
        return [
            None if name == "mixture" else target for name, target in zip(names, found, strict=True)
        ]

    def _grow(
        self, contexts: ContextMemory, search: SearchTree, inner_actions: int, shown: Sequence[int]
    ) -> list[SearchResult]:
        """All simulations of a begun search. shown: rows whose tree somebody wants to see."""
        if self._fused is not None:
            rule = self._policy.fused(search)
            self.positions_clamped += self._fused.run(contexts, search, rule, inner_actions, shown)
            return search.results()

        simulations = self._settings.num_simulations
        memory = SearchMemory(self._model, simulations)
        memory.begin(contexts)
        results = simulate(
            search, memory, simulations, inner_actions, self._scalar_of, self._device
        )
        self.positions_clamped += memory.positions_clamped
        return results


def fused_simulations(
    model: PriorZeroModel, settings: PolicySettings, root_policy: ModuleType, device: str
) -> Simulations | None:
    """Who runs a fused search on this device; None where it is to run plain.

    Raises:
        PriorZeroError: `policy.search_backend` is fused, and the root policy has no such form; or
            the device lacks what it needs.
    """
    backend = settings.search_backend
    if not hasattr(root_policy, "fused"):
        if backend == "fused":
            raise PriorZeroError(
                f"policy.search_backend is fused, but root policy {settings.root_policy!r} has no "
                "fused form: take search_backend auto or plain, or root_policy puct or gumbel"
            )
        if backend == "auto":
            logger.info("root policy %s has no fused form: plain search", settings.root_policy)
        return None
    if backend == "plain":
        return None

    # Each needs a compiler that the other device has no use for.
    if torch.device(device).type == "cuda":
        try:
            from priorzero.search.fused.cuda import CudaSimulations
        except ImportError as error:
            raise PriorZeroError(
                f"a fused search on a GPU needs Triton ({error}): install the CUDA lock, or set "
                "policy.search_backend=plain"
            ) from error
        return CudaSimulations(
            model, settings.num_simulations, settings.context_steps, settings.search_precision
        )

    from priorzero.search.fused.cpu import CpuSimulations

    return CpuSimulations(model, settings.num_simulations)


def reader_of(
    model: PriorZeroModel, settings: PolicySettings, device: str, captured: bool
) -> Callable[[Sequence[Root]], ContextMemory]:
    """How the network looks at roots: on a GPU where the search is `captured`, captured too."""
    if captured and torch.device(device).type == "cuda":
        from priorzero.search.fused.cuda_roots import CudaRoots

        return CudaRoots(model, settings.context_steps, device).read
    return lambda roots: read_contexts(model, *batch_contexts(roots, device))


def simulate(
    tree: SearchTree,
    memory: SearchMemory,
    simulations: int,
    inner_actions: int,
    scalar_of: ScalarOf,
    device: str | torch.device,
) -> list[SearchResult]:
    """Grow a begun tree; `memory` has begun with its roots."""
    for simulation in range(simulations):
        parents, actions = tree.select()
        node = memory.expand(
            simulation,
            torch.as_tensor(parents, device=device),
            torch.as_tensor(actions, device=device),
        )
        # Both heads in one transform, and in one transfer from the device.
        both = scalar_of(torch.cat([node.reward_logits, node.value_logits]))
        rewards, values = both.view(2, -1).double().cpu().numpy()
        tree.expand(rewards, values, node.policy_logits[:, :inner_actions].cpu().numpy())
    return tree.results()
