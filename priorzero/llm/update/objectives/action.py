"""`action`: the played action among the valid ones, as the search sees the LLM.

    value = log softmax(totals)_a          totals_b: sum (or mean) of the tokens of action b

With `cot_weight` the written thought's tokens are units of their own, which share that weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from priorzero.llm.update.objective import Answer
from priorzero.llm.update.rft import Units


def make(reduction: str, cot_weight: float) -> Action:
    """Plug-in contract, see the package."""
    return Action(reduction, cot_weight)


@dataclass(frozen=True)
class Action:
    """See the module."""

    reduction: str
    cot_weight: float

    def units(self, answer: Answer, action: int) -> Units:
        """`1 + W` units: the action, then the thought's tokens; without `cot_weight` one."""
        chosen = answer.policy(self.reduction)[action : action + 1]
        thought = answer.thought if self.cot_weight else answer.thought[:0]
        shares = [1.0] + [self.cot_weight / max(1, len(thought))] * len(thought)
        value = torch.cat([chosen, thought])
        return Units(
            value=value,
            drawn=torch.cat([torch.zeros_like(chosen), thought]),
            share=chosen.new_tensor(shares),
            thought=torch.arange(len(value), device=value.device) >= 1,
        )
