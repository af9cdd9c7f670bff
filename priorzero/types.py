"""The small records that cross module boundaries. No heavy import here: game workers load this
module too.

Letters used in every shape of this project: `B` roots or batch rows, `A` valid actions of a state,
`V` size of the action vocabulary, `T` unroll steps, `E` dimension of a text embedding, `D` width of
the world model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


class PriorZeroError(Exception):
    """A fault the user can mend. The message says what is wrong, why, and what to do."""


def world_text(text: str, game: str) -> str:
    """What the world model sees of an observation's text.

    Where a run plays several games, the game's name is its first line: "Taken." is not the same
    state in two games, and a name that is text needs no place in the network, so that a game
    that is not trained on is told too. It stands first, where the sentence encoder never cuts. The
    LLM does not read it; the prompt tells the game's goal.

    Args:
        text: of the observation.
        game: its plain name; empty where there is one game.
    """
    return f"Game: {game}.\n{text}" if game else text


@dataclass(frozen=True)
class HistoryItem:
    """One past step as the LLM reads it: what was seen, what was done, what it earned."""

    observation: str
    action: str
    reward: float


@dataclass(frozen=True)
class TextState:
    """Everything a text policy may know of the present state.

    `history` is oldest first and ends with the step that led here. `valid_actions` is sorted
    and free of duplicates; it may be empty only in a state that ends the episode.
    """

    observation: str
    valid_actions: tuple[str, ...]
    history: tuple[HistoryItem, ...] = ()
    goal: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class TokenisedRequest:
    """One state as the LLM is asked about it, in token ids.

    `head_ids` begin every prompt of a run (the fixed system text), `body_ids` are the rest of
    the prompt, `action_ids[a]` are the tokens of valid action a and end with the terminator.
    With `reasoning` an engine generates a chain of thought behind the prompt before it scores the
    actions; without it the actions stand right behind the prompt.
    """

    head_ids: tuple[int, ...]
    body_ids: tuple[int, ...]
    action_ids: tuple[tuple[int, ...], ...]
    reasoning: bool = False

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.head_ids + self.body_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.head_ids) + len(self.body_ids)

    def with_thought(self, thought_ids: Sequence[int]) -> TokenisedRequest:
        """The same state behind the chain of thought `thought_ids` (action marker included)."""
        return replace(self, body_ids=self.body_ids + tuple(thought_ids), reasoning=False)


@dataclass(frozen=True)
class ActionScores:
    """Log-probabilities an LLM gives to the valid actions of one state, in the order of
    `valid_actions`.

    `token_logprobs[i][j]` is the natural-log probability (temperature 1) of token j of action i,
    given the prompt and the action's earlier tokens; the terminator token that ends an action is
    the last one. `weights_version` tells which LLM weights answered. `thought_ids` is the chain
    of thought generated between prompt and actions, action marker included, or empty.
    `thought_logprobs` are those (temperature 1) of its tokens that the LLM wrote; the marker's
    ids behind them were put there, so they have none. `thought_ended` tells whether the LLM had
    written the marker too, or was cut off.
    """

    token_logprobs: tuple[tuple[float, ...], ...]
    weights_version: int = 0
    thought_ids: tuple[int, ...] = ()
    thought_logprobs: tuple[float, ...] = ()
    cached: bool = field(default=False, compare=False)
    thought_ended: bool = False

    def __post_init__(self) -> None:
        assert len(self.thought_logprobs) <= len(self.thought_ids)

    def totals(self, reduction: str = "sum") -> list[float]:
        """One number per action: `sum` of its token log-probabilities, or their `mean`."""
        assert reduction in ("sum", "mean"), reduction

        sums = [sum(tokens) for tokens in self.token_logprobs]
        if reduction == "sum":
            return sums
        return [
            total / len(tokens) for total, tokens in zip(sums, self.token_logprobs, strict=True)
        ]
