"""`token`: PPO (arXiv:1707.06347) on every token of the played action, as in language-model RL.

    value_t = log P(token t | all before it)

Each token has its own ratio. The action's tokens share the weight 1, the written thought's the
weight `cot_weight`, so that neither's length changes how much it counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from priorzero.llm.update.objective import Answer
from priorzero.llm.update.rft import Units


def make(reduction: str, cot_weight: float) -> Token:
    """Plug-in contract, see the package; tokens are not reduced."""
    return Token(cot_weight)


@dataclass(frozen=True)
class Token:
    """See the module."""

    cot_weight: float

    def units(self, answer: Answer, action: int) -> Units:
        """One unit per token: the action's (terminator included), then the thought's."""
        tokens = answer.tokens(action)
        thought = answer.thought if self.cot_weight else answer.thought[:0]
        shares = [1.0 / len(tokens)] * len(tokens)
        shares += [self.cot_weight / max(1, len(thought))] * len(thought)
        value = torch.cat([tokens, thought])
        return Units(
            value=value,
            drawn=torch.cat([torch.zeros_like(tokens), thought]),
            share=tokens.new_tensor(shares),
            thought=torch.arange(len(value), device=value.device) >= len(tokens),
        )
