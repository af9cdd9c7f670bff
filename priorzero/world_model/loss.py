"""The world model's loss: UniZero's four terms per sample and step, so that importance weights can
act on them.

With weights of one, the total equals LightZero's `WorldModel.compute_loss`
(tests/world_model/test_loss.py), on which importance weights have no effect (docs/LIGHTZERO.md).

Letters: `B` samples, `T` unroll steps, `D` width, `S` support size, `V` vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from priorzero.settings.policy import LossWeights
from priorzero.world_model.model import Unrolled


@dataclass
class WorldModelTargets:
    """What the unrolled model is compared with; masks are 1.0 where a term counts.

    latent `[B, T, D]`: the target encoder's latent of the next observation. reward, value `[B, T,
    S]`: categorical. policy `[B, T, V]`: visit distribution. mask_* `[B, T]`. used_actions `[V]`
    bool: ids that name an action so far.
    """

    latent: Tensor
    reward: Tensor
    value: Tensor
    policy: Tensor
    mask_latent: Tensor
    mask_reward: Tensor
    mask_value: Tensor
    mask_policy: Tensor
    used_actions: Tensor


def group_kl(prediction: Tensor, target: Tensor, group_size: int, epsilon: float = 1e-6) -> Tensor:
    """Mean over SimNorm groups of KL(target || prediction); `[..., D]` each -> `[...]` (UniZero,
    eq. 6).
    """
    p = prediction.unflatten(-1, (-1, group_size)) + epsilon
    t = target.unflatten(-1, (-1, group_size)) + epsilon
    return F.kl_div(p.log(), t, reduction="none").sum(-1).mean(-1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_i target_i log softmax(logits)_i over the last axis."""
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1)


def world_model_loss(
    outputs: Unrolled,
    targets: WorldModelTargets,
    sample_weights: Tensor,
    group_size: int,
    weights: LossWeights,
    average: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted loss of one unrolled batch.

    For each term l with mask m, term = sum_b w_b sum_t m_bt l_bt / sum_bt m_bt; total = sum over
    terms of weight * term. The policy's softmax runs over `used_actions` only: an id that names no
    action yet gets no gradient, so its logit is still the neutral one when the action appears.

    Args:
        outputs: what `PriorZeroModel.unroll` gave.
        group_size: of SimNorm.
        sample_weights: `[B]` importance weights (ones without prioritised replay).
        average: elementwise mean over the processes of a data-parallel run. Each term's sum_bt m_bt
            is then the mean one, so that the mean of the processes' losses is the loss of all their
            batches in one, however their masks differ.

    Returns:
        total (scalar) and the unweighted-by-term means under `latent_loss`, `reward_loss`,
        `policy_loss`, `value_loss`, `policy_entropy`.
    """
    assert outputs.latent.shape == targets.latent.shape
    assert outputs.policy.shape == targets.policy.shape
    assert outputs.value.shape == outputs.reward.shape == targets.value.shape
    assert sample_weights.shape == outputs.latent.shape[:1]

    log_policy = F.log_softmax(outputs.policy.masked_fill(~targets.used_actions, -1e9), dim=-1)
    terms = {
        "latent_loss": (group_kl(outputs.latent, targets.latent, group_size), targets.mask_latent),
        "reward_loss": (cross_entropy(outputs.reward, targets.reward), targets.mask_reward),
        "policy_loss": (-(targets.policy * log_policy).sum(-1), targets.mask_policy),
        "value_loss": (cross_entropy(outputs.value, targets.value), targets.mask_value),
        "policy_entropy": (-(log_policy.exp() * log_policy).sum(-1), targets.mask_policy),
    }

    counts = {name: mask.sum() for name, (_, mask) in terms.items()}
    if average is not None:
        counts = dict(zip(counts, average(torch.stack(list(counts.values()))), strict=True))
    means = {
        name: (sample_weights[:, None] * mask * loss).sum() / counts[name].clamp(min=1.0)
        for name, (loss, mask) in terms.items()
    }
    total = (
        weights.latent * means["latent_loss"]
        + weights.reward * means["reward_loss"]
        + weights.policy * means["policy_loss"]
        + weights.value * means["value_loss"]
        - weights.entropy * means["policy_entropy"]
    )
    return total, {name: value.detach() for name, value in means.items()}
