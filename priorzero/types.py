"""The small records that cross module boundaries. No heavy import here: game workers load this
module too.

Letters used in every shape of this project: `B` roots or batch rows, `A` valid actions of a state,
`V` size of the action vocabulary, `T` unroll steps, `E` dimension of a text embedding, `D` width of
the world model.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class PriorZeroError(Exception):
    """A fault the user can mend. The message says what is wrong, why, and what to do."""


@dataclass(frozen=True)
class HistoryItem:
    """One past step as the LLM reads it: what was seen, what was done, what it earned."""

    observation: str
    action: str
    reward: float


@dataclass(frozen=True)
class TextState:
    """Everything a text policy may know of the present state.

    ``history`` is oldest first and ends with the step that led here. ``valid_actions`` is sorted
    and free of duplicates; it may be empty only in a state that ends the episode.
    """

    observation: str
    valid_actions: tuple[str, ...]
    history: tuple[HistoryItem, ...] = ()
    goal: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class ActionScores:
    """Log-probabilities an LLM gives to the valid actions of one state, in the order of
    ``valid_actions``.

    ``token_logprobs[i][j]`` is the natural-log probability (temperature 1) of token j of action i,
    given the prompt and the action's earlier tokens; the terminator token that ends an action is
    the last one. ``reasoning`` is the generated chain of thought that preceded the actions, or "".
    ``weights_version`` tells which LLM weights answered.
    """

    token_logprobs: tuple[tuple[float, ...], ...]
    weights_version: int = 0
    reasoning: str = ""
    cached: bool = field(default=False, compare=False)

    def totals(self, reduction: str = "sum") -> list[float]:
        """One number per action: ``sum`` of its token log-probabilities, or their ``mean``."""
        if reduction == "sum":
            return [sum(t) for t in self.token_logprobs]
        if reduction == "mean":
            return [sum(t) / len(t) for t in self.token_logprobs]
        raise PriorZeroError(f"prior reduction {reduction!r} is unknown; use 'sum' or 'mean'")
