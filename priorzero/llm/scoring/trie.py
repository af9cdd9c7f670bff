"""The actions of one state as a token trie: every distinct prefix is a node, so it is computed
once. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenTrie:
    """Trie over token sequences. Only nodes with children are kept: a last token is predicted but
    never read.

    A *row* is a place whose next-token distribution is needed: row 0 is the end of the prompt, row
    `i + 1` is node `i`. Nodes are in order of first appearance, so a parent always comes before
    its children.

    `tokens[i]` token read at node i; `parents[i]` its parent node, -1 for the prompt;
    `depths[i]` 0 for the first token after the prompt. `lookups[a]` for action a: (row, token)
    of each of its tokens.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    lookups: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def num_rows(self) -> int:
        return len(self.tokens) + 1

    def children(self) -> list[list[int]]:
        """Distinct tokens asked of each row, in order of first appearance."""
        seen: list[dict[int, None]] = [{} for _ in range(self.num_rows)]
        for lookup in self.lookups:
            for row, token in lookup:
                seen[row][token] = None
        return [list(s) for s in seen]

    def path(self, row: int) -> list[int]:
        """Tokens read between the prompt and `row`, in reading order."""
        out: list[int] = []
        node = row - 1
        while node >= 0:
            out.append(self.tokens[node])
            node = self.parents[node]
        return out[::-1]

    def ancestors(self) -> list[list[int]]:
        """For each node: the nodes it may attend to, itself included."""
        out: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            out.append([*(out[parent] if parent >= 0 else []), node])
        return out


def build_trie(sequences: Sequence[Sequence[int]]) -> TokenTrie:
    """Trie of `sequences` (each at least one token; duplicates and prefixes of one another are
    welcome).
    """
    index: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    lookups: list[tuple[tuple[int, int], ...]] = []
    for sequence in sequences:
        if not sequence:
            raise ValueError("an action needs at least one token; the terminator is one")
        node, lookup = -1, []
        for position, token in enumerate(sequence):
            lookup.append((node + 1, token))
            if position == len(sequence) - 1:
                break
            key = (node, token)
            if key not in index:
                index[key] = len(tokens)
                tokens.append(token)
                parents.append(node)
                depths.append(position)
            node = index[key]
        lookups.append(tuple(lookup))
    return TokenTrie(tuple(tokens), tuple(parents), tuple(depths), tuple(lookups))
