"""Chains of thought: how one is generated, and which token ids stay of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from priorzero.llm.scoring.requests import Tokeniser


@dataclass(frozen=True)
class Reasoner:
    """How a chain of thought is generated before the actions are scored.

    Attributes:
        max_new_tokens: Its tokens at most.
        temperature: Its sampling temperature; 0 is greedy.
        marker: Text that ends it ("Action:").
        seed: Of the sampling.
    """

    max_new_tokens: int
    temperature: float
    marker: str
    seed: int

    def finish(
        self, generated: Sequence[int], tokeniser: Tokeniser, room: int
    ) -> tuple[tuple[int, ...], bool]:
        """The thought's ids: what was generated up to before the marker, then the marker's own.

        The ids before the marker are those the model wrote; a token that holds the marker's
        beginning and something before it is dropped. The marker is tokenised apart, on a new line
        where the model wrote none, so that it is the same ids behind every thought.

        Args:
            generated: Ids, with or without the marker.
            room: Ids the prompt still has room for; the thought loses its end where it is longer.

        Returns:
            The ids, and whether the model had written the marker itself.
        """
        kept, found = before_text(generated, self.marker, tokeniser)
        own = tokeniser.ids(self.marker)
        line_end = tokeniser.ids("\n" + self.marker)
        kept = kept[: max(0, room - max(len(own), len(line_end)))]
        closed = tokeniser.decode(kept).endswith("\n")
        return kept + (own if closed else line_end), found


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
