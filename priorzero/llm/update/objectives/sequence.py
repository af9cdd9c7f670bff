"""`sequence`: one ratio for all that was said, normalised by its length (GSPO, arXiv:2507.18071).

    value = sum_t w_t log P(token t | all before it) / sum_t w_t

with w_t = 1 for the played action's tokens and `cot_weight` for the written thought's, so that the
ratio is GSPO's (new / old)^(1 / length), eq. 7, of the whole answer at `cot_weight` 1 and of the
action alone at 0. GSPO clips at 3e-4 and 4e-4: a mean over tokens moves less than one token does.

With a thought that is trained there are two units, as in GSPO-token (section 4.3): both have the
value of the whole answer, and each the gradient of its own tokens. Together they are GSPO, gradient
included, where their advantages are equal; only a format reward makes them differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from priorzero.llm.update.objective import Answer
from priorzero.llm.update.rft import Units


def make(reduction: str, cot_weight: float) -> Sequence:
    """Plug-in contract, see the package; the normalisation is GSPO's own."""
    return Sequence(cot_weight)


@dataclass(frozen=True)
class Sequence:
    """See the module."""

    cot_weight: float

    def units(self, answer: Answer, action: int) -> Units:
        """One unit, or two: the action's tokens, then the written thought's."""
        tokens = answer.tokens(action)
        thought = answer.thought if self.cot_weight else answer.thought[:0]
        length = len(tokens) + self.cot_weight * len(thought)
        drawn = self.cot_weight * thought.sum() / length
        value = tokens.sum() / length + drawn
        if not len(thought):
            return Units(
                value=value[None],
                drawn=drawn[None],
                share=value.new_ones(1),
                thought=torch.zeros(1, dtype=torch.bool, device=value.device),
            )

        # The number of the whole, the gradient of a part, per token of it.
        whole = value.detach()
        parts = torch.stack([part - part.detach() for part in (tokens.mean(), thought.mean())])
        action_share = len(tokens) / length
        return Units(
            value=whole + parts,
            drawn=drawn.expand(2),
            share=value.new_tensor([action_share, 1 - action_share]),
            thought=torch.tensor([False, True], device=value.device),
        )
