"""What playing gives: the collector's segments and the evaluator's episodes, with their metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from priorzero.data.segment import Segment


@dataclass(frozen=True)
class CollectResult:
    """What one call of the collector played.

    segments: the finished ones. steps: environment steps of this call, those of unfinished segments
    included. collect: metrics about episodes. prior: metrics about the LLM's effect on the search.
    begun: episodes that began in this call. running: those that go on after it.
    """

    segments: list[Segment]
    steps: int
    collect: dict[str, float]
    prior: dict[str, float]
    begun: int = 0
    running: int = 0

    @property
    def transitions(self) -> int:
        """Steps in the finished segments."""
        return sum(len(segment) for segment in self.segments)


@dataclass(frozen=True)
class EvalResult:
    """Episodes of one mode.

    returns, scores, lengths, kinds: `[n]`, one per episode. max_score: of the game, or nan where it
    is unknown.
    """

    mode: str
    returns: tuple[float, ...]
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    max_score: float

    def metrics(self) -> dict[str, float]:
        """mean, std, best, worst, length, share of the maximal score, and episodes per way of
        ending.
        """
        values = {
            "return_mean": float(np.mean(self.returns)),
            "return_std": float(np.std(self.returns)),
            "return_best": float(np.max(self.returns)),
            "return_worst": float(np.min(self.returns)),
            "length": float(np.mean(self.lengths)),
            "episodes": float(len(self.returns)),
            "terminated": float(sum(kind == "terminated" for kind in self.kinds)),
            "hangs": float(sum(kind == "hang" for kind in self.kinds)),
        }
        if np.isfinite(self.max_score) and self.max_score > 0:
            values["score_share"] = float(np.mean(self.scores)) / self.max_score
        return {f"{self.mode}/{name}": value for name, value in values.items()}
