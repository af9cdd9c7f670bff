"""The way of two passes: all prompts first, as plain causal attention, then the trie's nodes.

For long prompts on a GPU: there are kernels for causal attention without a mask, and a mask of
thousands by thousands costs more than sharing the head would save.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from priorzero.llm.scoring.items import TreeItem


def two_pass(causal_lm: torch.nn.Module, items: Sequence[TreeItem]) -> torch.Tensor:
    """Hidden states `[R, D]` of the rows, state after state. Heads must be part of the bodies.

    Prompts are padded on the right, where causal attention never looks. All inputs are built and
    moved before the first pass: a copy to the GPU waits for the work queued before it, and the
    second pass's many small kernels should be queued while the first one still computes.
    """
    assert not any(item.request.head_ids for item in items)
    decoder, device = causal_lm.get_decoder(), next(causal_lm.parameters()).device
    lengths = [len(item.request.body_ids) for item in items]
    width, nodes = max(lengths), max(len(item.trie.tokens) for item in items)

    # Inputs of both passes.
    ids = torch.zeros(len(items), width, dtype=torch.long)
    tokens = torch.zeros(len(items), nodes, dtype=torch.long)
    positions = torch.zeros(len(items), nodes, dtype=torch.long)
    mask = torch.zeros(len(items), 1, nodes, width + nodes, dtype=torch.bool)
    # Padding sees itself: nothing to see at all would give NaN.
    mask[:, 0, torch.arange(nodes), width + torch.arange(nodes)] = True
    for b, item in enumerate(items):
        own = len(item.trie.tokens)
        ids[b, : lengths[b]] = torch.tensor(item.request.body_ids)
        tokens[b, :own] = torch.tensor(item.trie.tokens, dtype=torch.long)
        positions[b, :own] = lengths[b] + torch.tensor(item.trie.depths, dtype=torch.long)
        mask[b, 0, :own, : lengths[b]] = True
        mask[b, 0, :own, width : width + own] = item.node_mask()

    # Where the rows lie in the first and the second pass's hidden states laid end to end.
    second_start = len(items) * width
    places: list[int] = []
    for b, item in enumerate(items):
        nodes_start = second_start + b * nodes - lengths[b]
        places += (b * width + r if r < lengths[b] else nodes_start + r for r in item.rows())
    ids, tokens, positions, mask, places = (
        x.to(device) for x in (ids, tokens, positions, mask, torch.tensor(places))
    )

    # Neither mask nor positions: either would make transformers build a mask.
    first = decoder(input_ids=ids, use_cache=nodes > 0)
    hidden = [first.last_hidden_state.flatten(0, 1)]
    if nodes:
        second = decoder(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        hidden.append(second.last_hidden_state.flatten(0, 1))
    return torch.cat(hidden)[places]
