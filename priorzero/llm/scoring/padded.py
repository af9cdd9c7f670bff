"""The padded way: one line per state, body and nodes together, behind the head's keys and values.

The usual way on a GPU, where padding costs less than many small kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from priorzero.llm.scoring.items import LayerKV, TreeItem


def padded_pass(
    causal_lm: torch.nn.Module, items: Sequence[TreeItem], head_kv: LayerKV | None
) -> torch.Tensor:
    """Hidden states `[R, D]` of the rows, state after state, by one forward of all states.

    Args:
        head_kv: keys and values of the head all items share; None where they have none.
    """
    from transformers import DynamicCache

    device = next(causal_lm.parameters()).device
    ids, positions, mask = _layout(items, device)
    past = None
    if head_kv is not None:
        size = len(items)
        past = DynamicCache(
            [(k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1)) for k, v in head_kv]
        )
    hidden = causal_lm.get_decoder()(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=past,
        use_cache=past is not None,
    ).last_hidden_state  # [B, S, D]

    places = [(b, row) for b, item in enumerate(items) for row in item.rows()]
    state, position = torch.tensor(places, device=device).T
    return hidden[state, position]


def _layout(items: Sequence[TreeItem], device: torch.device):
    """Token ids `[B, S]`, position ids `[B, S]`, mask `[B, 1, S, H + S]` (True = may attend)."""
    head_len = len(items[0].request.head_ids)
    size = max(item.num_tokens for item in items)
    ids = torch.zeros(len(items), size, dtype=torch.long)
    positions = torch.zeros(len(items), size, dtype=torch.long)
    mask = torch.zeros(len(items), 1, size, head_len + size, dtype=torch.bool)

    for b, item in enumerate(items):
        body, nodes = len(item.request.body_ids), len(item.trie.tokens)
        end = body + nodes
        ids[b, :end] = torch.tensor([*item.request.body_ids, *item.trie.tokens], dtype=torch.long)
        positions[b, :body] = torch.arange(head_len, head_len + body)
        positions[b, body:end] = head_len + body + torch.tensor(item.trie.depths, dtype=torch.long)
        own = mask[b, 0]
        own[:end, : head_len + end] = item.mask()
        # A padding token sees itself only: nothing to see at all would give NaN.
        padding = torch.arange(end, size)
        own[padding, head_len + padding] = True
    return ids.to(device), positions.to(device), mask.to(device)
