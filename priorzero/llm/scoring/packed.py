"""The states of a batch one after another in a single row, each attending to its head and to
itself: nothing is padded.

Prompts of a batch differ in length by a factor of two and more, so a padded batch computes up to
half its tokens for nothing, which on a CPU is time. Here every linear layer sees the real tokens
only, and attention runs state by state. Used by `tree_forward` and `trunk`; needs a transformers
model whose attention goes through the attention interface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from priorzero.llm.model import multiplying_dtype, only_layers, sliding_window

if TYPE_CHECKING:
    from priorzero.llm.scoring.forward import LayerKV, TreeItem
    from priorzero.llm.scoring.trunk import TrunkCache

_NAME = "priorzero_packed"


@dataclass
class PackedRow:
    """Where each state lies in the row, and what it may attend to.

    spans: (start, end) per state. masks: per state additive `[S, H + S]` (0 or -inf), its prefix
    first. head: tokens of the states' common head at the row's start; or else `prefixes`: per state
    the keys and values of its head, None without. bodies: tokens of each state's body. kept:
    filled, where it is a list, with each state's keys and values of prefix and body, layer by
    layer. calls: layers that attended through this row.
    """

    spans: list[tuple[int, int]]
    masks: list[torch.Tensor]
    bodies: list[int]
    head: int = 0
    prefixes: Sequence[LayerKV] | None = None
    kept: list[LayerKV] | None = None
    calls: int = 0


def supports_packing(causal_lm) -> bool:
    """Whether the model's attention can be replaced: it uses the interface, and is plain causal
    attention.
    """
    config = causal_lm.config
    plain = (
        not getattr(config, "attn_logit_softcapping", None)
        and not sliding_window(config)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    )
    return bool(plain and getattr(causal_lm, "_supports_attention_backend", False))


def _attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    packed: PackedRow | None = None,
    **kwargs,
):
    """Attention function of the interface: query `[1, heads, tokens, d]`; returns `[1, tokens,
    heads, d]`.
    """
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packed.calls += 1
    groups = getattr(module, "num_key_value_groups", 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    outputs = []
    if packed.head:
        before = (key[:, :, : packed.head], value[:, :, : packed.head])
        outputs.append(
            attention(
                query[:, :, : packed.head],
                *(repeat_kv(x, groups) for x in before),
                is_causal=True,
                scale=scaling,
            )
        )
    for state, ((start, end), mask) in enumerate(zip(packed.spans, packed.masks, strict=True)):
        own = (key[:, :, start:end], value[:, :, start:end])
        if packed.prefixes is not None:
            before = packed.prefixes[state][module.layer_idx]
        if packed.head or packed.prefixes is not None:
            own = tuple(torch.cat([x, y], 2) for x, y in zip(before, own, strict=True))
        if packed.kept is not None:
            prompt = mask.shape[1] - (end - start) + packed.bodies[state]
            packed.kept[state].append(
                tuple(x[:, :, :prompt].to(mask.dtype, copy=True) for x in own)
            )
        outputs.append(
            attention(
                query[:, :, start:end],
                *(repeat_kv(x, groups) for x in own),
                attn_mask=mask,
                scale=scaling,
            )
        )
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


@dataclass
class PackedInputs:
    """A laid-out row: token `ids` and `positions` [1, tokens], what attends to what, and the
    `places` of needed rows [R].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    row: PackedRow
    places: torch.Tensor


def lay_out(
    causal_lm, items: Sequence[TreeItem], prefixes: Sequence[LayerKV] | None, device: torch.device
) -> PackedInputs:
    """Put the states one after another; without `prefixes` (keys and values of each one's head)
    their common head is first.
    """
    inside = [] if prefixes is not None else list(items[0].request.head_ids)
    ids, positions, spans, places, masks = list(inside), list(range(len(inside))), [], [], []
    dtype = multiplying_dtype(causal_lm, device)
    for item in items:
        start, body, nodes = len(ids), item.request.body_ids, item.trie.tokens
        ids += [*body, *nodes]
        first = len(item.request.head_ids)
        positions += [
            *range(first, first + len(body)),
            *(first + len(body) + d for d in item.trie.depths),
        ]
        spans.append((start, len(ids)))
        places += range(start + len(body) - 1, start + len(body) - 1 + item.trie.num_rows)
        allowed = item.mask()
        masks.append(
            torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf")).to(device)
        )
    row = PackedRow(
        spans, masks, [len(item.request.body_ids) for item in items], len(inside), prefixes
    )
    return PackedInputs(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        row,
        torch.tensor(places, device=device),
    )


def run_packed(
    causal_lm,
    inputs: PackedInputs,
    first: int = 0,
    last: int | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states [tokens, D] behind the layers from `first` to before `last`.

    Args:
        hidden: [tokens, D] before layer `first`; None: the tokens' embeddings, for `first` 0.
    """
    decoder, row = causal_lm.get_decoder(), inputs.row
    total = causal_lm.config.num_hidden_layers
    last = total if last is None else last
    row.calls = 0
    source = {"input_ids": inputs.ids} if hidden is None else {"inputs_embeds": hidden[None]}
    part = (
        contextlib.nullcontext()
        if (first, last) == (0, total)
        else only_layers(decoder, first, last)
    )
    with part, _packed_attention(decoder):
        # The mask is a stand-in: one with four dimensions keeps transformers from building its own.
        out = decoder(
            **source,
            position_ids=inputs.positions,
            use_cache=False,
            packed=row,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.ids.device),
        ).last_hidden_state
    if row.calls != last - first:
        raise RuntimeError(
            f"{row.calls} of {last - first} layers attended through the packed row: this model ignores the "
            "attention interface, and supports_packing must say so"
        )
    return out[0]


def packed_pass(
    causal_lm,
    items: Sequence[TreeItem],
    prefixes: Sequence[LayerKV] | None,
    device: torch.device,
    trunk: TrunkCache | None = None,
    kept: list[LayerKV] | None = None,
) -> torch.Tensor:
    """Hidden rows [R, D] whose logits are needed: the end of each prompt and each inner node, state
    after state.

    Without `prefixes` the items' common head is computed at the row's start, with gradients where
    they are on. `trunk` gives the outputs of the frozen lower layers where it has them. `kept` is
    filled with the prompts' keys and values; it needs all layers, so no trunk.
    """
    inputs = lay_out(causal_lm, items, prefixes, device)
    if trunk is not None:
        below = trunk.rows(causal_lm, items, prefixes is None, device)
        return run_packed(causal_lm, inputs, trunk.depth, hidden=below)[inputs.places]
    if kept is not None:
        kept[:] = [[] for _ in items]
        inputs.row.kept = kept
    return run_packed(causal_lm, inputs)[inputs.places]
