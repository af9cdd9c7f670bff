"""Supervised learning of the search's policy (SFT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from priorzero.llm.update.losses import entropy_of, sft_action_loss, sft_token_loss
from priorzero.llm.update.objective import Answer, Metrics, Objective, Score
from priorzero.llm.update.samples import LLMSample


class SFT(Objective):
    """Towards the search's policy over the valid actions.

    Metrics: cross_entropy (what is minimised), target_entropy (its floor: how undecided the search
    is, which no training of the LLM changes), loss (cross_entropy - target_entropy, 0 where the LLM
    has become the search), kl (KL(target || policy), equal to loss unless the loss is over tokens),
    accuracy (an argmax of the policy is an argmax of the target).

    Args:
        over: "actions": cross-entropy over the valid actions; "tokens": over their texts' tokens.
        reduction: how token log-probabilities become one number per action, "sum" or "mean".
        temperature: the policy is the softmax of these numbers over it.
    """

    def __init__(self, over: str, reduction: str, temperature: float = 1.0) -> None:
        assert over in ("actions", "tokens"), over
        self._over, self._reduction, self._temperature = over, reduction, temperature

    def prepare(
        self, samples: Sequence[LLMSample], score: Score
    ) -> tuple[list[tuple[float, ...]], Metrics]:
        return [s.target_policy for s in samples], {}

    def loss(self, answer: Answer, prepared: tuple[float, ...]) -> tuple[torch.Tensor, Metrics]:
        device = answer.actions.device
        target = torch.tensor(prepared, dtype=torch.float32, device=device)  # [A]
        totals = answer.totals(self._reduction)  # [A]

        action_loss = sft_action_loss(totals, target, self._temperature)
        loss = action_loss
        if self._over == "tokens":
            loss = sft_token_loss(answer.totals("sum"), target)

        floor = entropy_of(target)
        return loss, {
            "loss": loss.detach() - floor,
            "cross_entropy": loss.detach(),
            "kl": action_loss.detach() - floor,
            "target_entropy": floor,
            "accuracy": target[totals.argmax()] >= target.max() - 1e-9,
        }
