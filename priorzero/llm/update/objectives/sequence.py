"""`sequence`: one ratio for all that was said, normalised by its length (GSPO, arXiv:2507.18071).

    value = sum_t w_t log P(token t | all before it) / sum_t w_t

with w_t = 1 for the played action's tokens and `cot_weight` for the written thought's, so that the
ratio is GSPO's (new / old)^(1 / length), eq. 7, of the whole answer at `cot_weight` 1 and of the
action alone at 0. GSPO clips at 3e-4 and 4e-4: a mean over tokens moves less than one token does.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        """One unit."""
        tokens = answer.tokens(action)
        thought = answer.thought if self.cot_weight else answer.thought[:0]
        length = len(tokens) + self.cot_weight * len(thought)
        drawn = self.cot_weight * thought.sum() / length
        value = tokens.sum() / length + drawn
        return Units(value=value[None], drawn=drawn[None], share=value.new_ones(1))
