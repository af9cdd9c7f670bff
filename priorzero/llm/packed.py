"""The states of a batch one after another in a single row, each attending to the head and to itself: nothing is padded.

Prompts of a batch differ in length by a factor of two and more, so a padded batch computes up to half its tokens for
nothing, which on a CPU is time. Here every linear layer sees the real tokens only, and attention runs state by state.
Called by `tree_forward` alone; needs a transformers model whose attention goes through the attention interface.
"""
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

if TYPE_CHECKING:
    from priorzero.llm.tree_forward import LayerKV, TreeItem

_NAME = "priorzero_packed"


@dataclass
class PackedRow:
    """Where each state lies in the row, and what it may attend to.

    spans: (start, end) per state. masks: per state additive `[S, H + S]` (0 or -inf), the head first. head: tokens of the
    head at the row's start, 0 where `head_kv` holds its keys and values. calls: layers that attended through this row.
    """

    spans: list[tuple[int, int]]
    masks: list[torch.Tensor]
    head: int = 0
    head_kv: LayerKV | None = None
    calls: int = 0


def supports_packing(causal_lm) -> bool:
    """Whether the model's attention can be replaced: it uses the interface, and is plain causal attention."""
    config = causal_lm.config
    plain = not getattr(config, "attn_logit_softcapping", None) and set(getattr(config, "layer_types", None) or ()) <= {
        "full_attention"}
    return bool(plain and getattr(causal_lm, "_supports_attention_backend", False))


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, packed: PackedRow | None = None, **kwargs):
    """Attention function of the interface: query `[1, heads, tokens, d]`; returns `[1, tokens, heads, d]`."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    packed.calls += 1
    groups = getattr(module, "num_key_value_groups", 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = []
    head_key = head_value = None
    if packed.head:
        head_key, head_value = key[:, :, : packed.head], value[:, :, : packed.head]
        outputs.append(attention(query[:, :, : packed.head], head_key, head_value, is_causal=True, scale=scaling))
    elif packed.head_kv is not None:
        head_key, head_value = (repeat_kv(x, groups) for x in packed.head_kv[module.layer_idx])
    for (start, end), mask in zip(packed.spans, packed.masks, strict=True):
        own_key, own_value = key[:, :, start:end], value[:, :, start:end]
        if head_key is not None:
            own_key, own_value = torch.cat([head_key, own_key], 2), torch.cat([head_value, own_value], 2)
        outputs.append(attention(query[:, :, start:end], own_key, own_value, attn_mask=mask, scale=scaling))
    return torch.cat([o.to(query.dtype) for o in outputs], 2).transpose(1, 2), None


AttentionInterface.register(_NAME, _attend)


@contextlib.contextmanager
def _packed_attention(decoder):
    """Let the decoder attend with `_attend` for a while."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = _NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def packed_pass(causal_lm, items: Sequence[TreeItem], head_kv: LayerKV | None, device: torch.device) -> torch.Tensor:
    """Hidden rows [R, D] whose logits are needed: the end of each prompt and each inner node, state after state.

    Without `head_kv` the items' common head is computed at the row's start, with gradients where they are on.
    """
    head_ids = items[0].request.head_ids
    inside = list(head_ids) if head_kv is None else []
    ids, positions, spans, places, masks = list(inside), list(range(len(inside))), [], [], []
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else causal_lm.dtype
    for item in items:
        start, body, nodes = len(ids), item.request.body_ids, item.trie.tokens
        ids += [*body, *nodes]
        first = len(head_ids)
        positions += [*range(first, first + len(body)), *(first + len(body) + d for d in item.trie.depths)]
        spans.append((start, len(ids)))
        places += range(start + len(body) - 1, start + len(body) - 1 + item.trie.num_rows)
        allowed = item.mask()
        masks.append(torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf")).to(device))
    row = PackedRow(spans, masks, len(inside), head_kv)
    decoder = causal_lm.get_decoder()
    with _packed_attention(decoder):
        # The mask is a stand-in: one with four dimensions keeps transformers from building its own.
        hidden = decoder(
            input_ids=torch.tensor([ids], device=device), position_ids=torch.tensor([positions], device=device),
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), use_cache=False, packed=row,
        ).last_hidden_state
    if row.calls != causal_lm.config.num_hidden_layers:
        raise RuntimeError(f"{row.calls} of {causal_lm.config.num_hidden_layers} layers attended through the packed row: this "
                           "model ignores the attention interface, and supports_packing must say so")
    return hidden[0, torch.tensor(places, device=device)]
