"""Chains of thought: how one is generated, and which token ids stay of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from priorzero.llm.scoring.requests import Tokeniser


@dataclass(frozen=True)
class Generated:
    """What an engine wrote behind a prompt.

    Attributes:
        ids: its tokens.
        logprobs: of each, natural log at temperature 1 whatever it was drawn at.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.logprobs)


@dataclass(frozen=True)
class Thought:
    """A chain of thought as it stands before the actions.

    Attributes:
        ids: what the LLM wrote, then the marker's own ids.
        logprobs: of the ids that the LLM wrote; fewer than `ids`.
        had_marker: whether it had written the marker itself, where there was room for it.
    """

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    had_marker: bool = False


@dataclass(frozen=True)
class Reasoner:
    """How a chain of thought is generated before the actions are scored.

    Attributes:
        max_new_tokens: its tokens at most.
        temperature: its sampling temperature; 0 is greedy.
        marker: text that ends it ("Action:").
        seed: of the sampling.
    """

    max_new_tokens: int
    temperature: float
    marker: str
    seed: int

    def finish(self, generated: Generated, tokeniser: Tokeniser, room: int) -> Thought:
        """The thought: what was generated up to before the marker, then the marker's own.

        The ids before the marker are those the model wrote; a token that holds the marker's
        beginning and something before it is dropped. The marker is tokenised apart, on a new line
        where the model wrote none, so that it is the same ids behind every thought.

        Args:
            generated: with or without the marker.
            room: ids the prompt still has room for; the thought loses its end where it is longer.
        """
        kept, found = before_text(generated.ids, self.marker, tokeniser)
        own = tokeniser.ids(self.marker)
        line_end = tokeniser.ids("\n" + self.marker)
        longest = max(0, room - max(len(own), len(line_end)))
        fits, kept = len(kept) <= longest, kept[:longest]
        closed = tokeniser.decode(kept).endswith("\n")
        ids = kept + (own if closed else line_end)
        return Thought(ids, generated.logprobs[: len(kept)], found and fits)


def before_text(
    ids: Sequence[int], text: str, tokeniser: Tokeniser
) -> tuple[tuple[int, ...], bool]:
    """The ids that lie wholly before the first occurrence of `text`, and whether it occurs."""
    whole = tokeniser.decode(ids)
    start = whole.find(text)
    if start < 0:
        return tuple(ids), False
    count = len(ids)
    while count:
        before = tokeniser.decode(ids[:count])
        if len(before) <= start and whole.startswith(before):
            break
        count -= 1
    return tuple(ids[:count]), True
