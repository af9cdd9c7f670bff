"""States ready for a forward: the tokens of each, the trie of its actions, and what goes together.

Tree attention after SpecInfer (arXiv:2305.09781), used here to score instead of to speculate: a
node of the trie sees the prompt and its own ancestors only, and position ids count along its path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from priorzero.llm.scoring.trie import TokenTrie, build_trie
from priorzero.types import TokenisedRequest

# Per layer: keys and values, each [1, heads, H, head_dim].
LayerKV = list[tuple[torch.Tensor, torch.Tensor]]


def key_values(output) -> LayerKV:
    """Keys and values per layer of a decoder's output."""
    return [(layer.keys, layer.values) for layer in output.past_key_values.layers]


@dataclass(frozen=True)
class TreeItem:
    """One state ready for the forward: its tokens and the trie of its actions.

    A *row* is a token whose next-token distribution is asked for: those that read the end of the
    prompt and the trie's nodes (`TokenTrie`), then those before the ids of `written`.

    Attributes:
        written: where in `request.body_ids` a chain of thought stands whose log-probabilities are
            asked for too; usually nowhere.
    """

    request: TokenisedRequest
    trie: TokenTrie
    written: range = field(default=range(0))

    @property
    def num_tokens(self) -> int:
        """Tokens behind the head."""
        return len(self.request.body_ids) + len(self.trie.tokens)

    @property
    def needs_body(self) -> bool:
        """Whether a row lies in the head: then the head has to be computed with the body."""
        return not self.request.body_ids or (bool(self.written) and self.written.start == 0)

    def rows(self) -> list[int]:
        """Places of the rows among the state's own tokens (body, then nodes)."""
        end = len(self.request.body_ids) - 1
        assert end >= 0 and (not self.written or self.written.start > 0), "see `needs_body`"
        return [*range(end, end + self.trie.num_rows), *(place - 1 for place in self.written)]

    def lookups(self) -> list[tuple[int, int]]:
        """(row, token) of everything asked for: action after action, then the thought."""
        actions = [pair for lookup in self.trie.lookups for pair in lookup]
        first, body = self.trie.num_rows, self.request.body_ids
        return actions + [(first + i, body[place]) for i, place in enumerate(self.written)]

    def node_mask(self) -> torch.Tensor:
        """`[nodes, nodes]`, True where a node may attend: its ancestors and itself."""
        mask = torch.zeros(len(self.trie.tokens), len(self.trie.tokens), dtype=torch.bool)
        for node, ancestors in enumerate(self.trie.ancestors()):
            mask[node, ancestors] = True
        return mask

    def mask(self) -> torch.Tensor:
        """`[S, H + S]`: all see the head, the body itself causally, a node body and ancestors."""
        head, body = len(self.request.head_ids), len(self.request.body_ids)
        mask = torch.zeros(self.num_tokens, head + self.num_tokens, dtype=torch.bool)
        mask[:, :head] = True
        mask[:body, head : head + body] = torch.ones(body, body, dtype=torch.bool).tril()
        mask[body:, head : head + body] = True
        mask[body:, head + body :] = self.node_mask()
        return mask


def prepare(
    requests: Sequence[TokenisedRequest], written: Sequence[range] | None = None
) -> list[TreeItem]:
    """The items of `requests`, in order.

    A request that still waits for its chain of thought cannot be scored: its actions would stand
    behind another text than in the game.

    Args:
        written: per request the places in its body whose log-probabilities are asked for beside
            the actions'; None: none of any.
    """
    assert not any(r.reasoning for r in requests), "generate the chain of thought before scoring"
    places = [range(0)] * len(requests) if written is None else written
    return [TreeItem(r, build_trie(r.action_ids), w) for r, w in zip(requests, places, strict=True)]


def headless(item: TreeItem) -> TreeItem:
    """The same state with its head as part of the body."""
    head = len(item.request.head_ids)
    request = replace(item.request, head_ids=(), body_ids=item.request.prompt_ids)
    written = range(item.written.start + head, item.written.stop + head) if item.written else ()
    return TreeItem(request, item.trie, written or range(0))


def plan_batches(
    items: Sequence[TreeItem], max_batch_tokens: int, max_batch_size: int = 64
) -> list[list[int]]:
    """Indices of items that share a forward: one head, similar length, at most `max_batch_tokens`.

    Attention over the head counts, because its keys and values are copied for each state. A single
    state above the limit gets a batch of its own: it cannot be split.
    """

    def length(i: int) -> int:
        return len(items[i].request.head_ids) + items[i].num_tokens

    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[item.request.head_ids].append(i)

    batches: list[list[int]] = []
    for members in groups.values():
        batch: list[int] = []
        for i in sorted(members, key=length):  # ascending: the newest is the longest
            size = len(batch) + 1
            if batch and (size * length(i) > max_batch_tokens or size > max_batch_size):
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    return batches
