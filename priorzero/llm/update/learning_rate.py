"""The learning rate of an optimiser step, from its number alone, which is all a resume needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from priorzero.settings.llm import LLMTrainSettings


def learning_rate(settings: LLMTrainSettings, step: int) -> float:
    """The rate with which step number `step` (from 1) is taken.

        warm-up    rate * step / warmup_steps                        while step <= warmup_steps
        constant   rate                                              then
        cosine     rate * (m + (1 - m) (1 + cos(pi * done)) / 2)     then, with
                   done = (step - warmup_steps) / (decay_steps - warmup_steps), at most 1

    m is `min_learning_rate_share`. The cosine is that of SGDR (arXiv:1608.03983) without restarts.

    Args:
        settings: the `llm.train` group.
    """
    assert step >= 1, step
    s = settings
    warm = min(1.0, step / s.warmup_steps) if s.warmup_steps else 1.0
    if s.schedule == "constant" or step <= s.warmup_steps:
        return s.learning_rate * warm

    done = min(1.0, (step - s.warmup_steps) / (s.decay_steps - s.warmup_steps))
    lowest = s.min_learning_rate_share
    return s.learning_rate * (lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2)
