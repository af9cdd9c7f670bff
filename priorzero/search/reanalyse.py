"""Reanalysis: stored steps are searched again with the network as it is now (Schrittwieser et al.
2021, "Online and offline reinforcement learning by planning with a learned model",
arXiv:2104.06294).

A stored target is as old as the step, and holds what the network of that time could see. Here the
search starts from the same root (the same observations, actions and valid ids, and the answer the
LLM gave then: it is not asked again), without noise. A fresh target has the prior that the stored
one has (`policy.target_prior`). The data themselves stay as they are, the LLM's targets among them;
only this batch's change. `priorzero_policy.py` calls it between buffer and update.

Letters: `B` rows, `T` unroll steps, `V` vocabulary size, `A` valid actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from priorzero.data.batch import Revisit, WorldModelBatch
from priorzero.search.planner import Plan
from priorzero.search.roots import Root

# Visit shares may be zero where the fresh target is not; the divergence stays finite.
_SMALLEST = 1e-6


def reanalyse(
    batch: WorldModelBatch, plan: Callable[[Sequence[Root]], Sequence[Plan]], reduction: str
) -> tuple[WorldModelBatch, dict[str, float]]:
    """Search all of `batch.revisits` in one call of `plan`.

    Args:
        plan: plans from these roots without noise, in their order.
        reduction: how the LLM's token log-probabilities become one number per action.

    Returns:
        the batch with fresh `policies`, and `search_values` where rows bootstrap from a step that
        was searched; and metrics: `reanalyse_share` of the batch's policy targets that are fresh,
        `reanalyse_kl`, their mean KL(fresh || stored).
    """
    assert batch.revisits, "the buffer asks for nothing with reanalyse_ratio 0"
    plans = plan([root_of(revisit, reduction) for revisit in batch.revisits])
    policies, values = batch.policies.copy(), batch.search_values.copy()

    divergences: list[float] = []
    for revisit, planned in zip(batch.revisits, plans, strict=True):
        step, target = revisit.step, planned.taught
        for row, k in revisit.policy_of:
            policies[row, k, step.valid_ids] = target
        for row, k in revisit.value_of:
            values[row, k] = planned.result.value
        divergence = _kl(target, step.target_policy)
        divergences += [divergence] * len(revisit.policy_of)

    metrics = {
        "reanalyse_share": float(len(divergences) / batch.mask_step.sum()),
        "reanalyse_kl": float(np.mean(divergences)),
    }
    return replace(batch, policies=policies, search_values=values), metrics


def root_of(revisit: Revisit, reduction: str) -> Root:
    """The root as it was when the step was played."""
    step, context = revisit.step, revisit.context
    llm = None
    if step.scores is not None:
        llm = np.asarray(step.scores.totals(reduction), dtype=np.float64)
    return Root(
        np.stack([*(s.observation for s in context), step.observation]),
        np.array([s.action_id for s in context], dtype=np.int64),
        step.valid_ids,
        llm,
    )


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of two distributions over the same actions, in nats."""
    return float(np.sum(p * (np.log(np.maximum(p, _SMALLEST)) - np.log(np.maximum(q, _SMALLEST)))))
