"""Keys and values of prompts that were read, for prompts that begin alike.

As in an engine's prefix cache (RadixAttention, arXiv:2312.07104), for layers that never change. In
a text game most new states are a known one with a few words changed, often behind the description
of the same room.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch

from priorzero.llm.scoring.items import LayerKV

_SHORTEST = 16  # tokens in common from which on joining keys costs less than computing them


class Prefix(NamedTuple):
    """What is known of the first tokens of a body.

    Attributes:
        length: how many tokens `n`.
        hidden: `[n, D]` behind the last of the layers.
        kv: per layer keys and values, each `[1, heads, n, head_dim]`.
    """

    length: int
    hidden: torch.Tensor
    kv: LayerKV


class PrefixCache:
    """The prompts read last.

    Args:
        max_bytes: memory bound; those of no use for the longest go first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._read: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], Prefix] = OrderedDict()

    def find(self, head: tuple[int, ...], body: tuple[int, ...], limit: int) -> Prefix | None:
        """The longest known beginning of `body` behind `head`.

        Args:
            limit: at most so many tokens.

        Returns:
            None where it is too short to be worth it.
        """
        lengths = {key: _common(key[1], body) for key in self._read if key[0] == head}
        best = max(lengths, key=lengths.__getitem__, default=None)
        if best is None or (length := min(lengths[best], limit)) < _SHORTEST:
            return None
        self._read.move_to_end(best)
        _, hidden, kv = self._read[best]
        return Prefix(length, hidden[:length], [tuple(x[:, :, :length] for x in kvs) for kvs in kv])

    def keep(
        self, head: tuple[int, ...], body: tuple[int, ...], hidden: torch.Tensor, kv: LayerKV
    ) -> None:
        """Remember a whole body's numbers; see `Prefix`."""
        new = Prefix(len(body), hidden, kv)
        if _size(new) > self.max_bytes or (head, body) in self._read:
            return
        self._read[head, body] = new
        self.bytes += _size(new)
        while self.bytes > self.max_bytes:
            _, gone = self._read.popitem(last=False)
            self.bytes -= _size(gone)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of their common beginning."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _size(prefix: Prefix) -> int:
    """Bytes of keys and values; the hidden states are mostly the trunk's own."""
    return sum(x.numel() * x.element_size() for kvs in prefix.kv for x in kvs)
