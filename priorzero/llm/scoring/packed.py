"""The packed way: the states of a batch one after another in a single line, nothing padded.

Prompts of a batch differ in length by a factor of two and more, so a padded batch computes up to
half its tokens for nothing, which on a CPU is time. Here every linear layer sees the real tokens
only, and attention runs state by state: each sees its head and itself. Needs a transformers model
whose attention goes through the attention interface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from priorzero.llm.scoring.items import LayerKV, TreeItem
from priorzero.llm.scoring.layers import (
    last_product,
    multiplying_dtype,
    only_layers,
    sliding_window,
)

_NAME = "priorzero_packed"
_WRITTEN_OUT = 1 << 18  # pairs of tokens up to which attention with gradients is written out


@dataclass
class PackedLine:
    """Where each state lies in the line, and what it may attend to.

    Attributes:
        spans: (start, end) per state.
        masks: per state additive `[S, H + S]` (0 or -inf), its head first.
        head: tokens of the states' common head at the line's start, 0 without.
        head_kv: keys and values of the common head where it is not in the line.
        known: per state keys and values of the body's first tokens where these are not in the line;
            an empty list where all are.
        recorded: per state keys and values of its own tokens, layer after layer; None: nobody asks.
        calls: layers that attended through this line.
    """

    spans: list[tuple[int, int]]
    masks: list[torch.Tensor]
    head: int = 0
    head_kv: LayerKV | None = None
    known: Sequence[LayerKV] = ()
    recorded: list[LayerKV] | None = None
    calls: int = 0


def supports_packing(causal_lm: torch.nn.Module) -> bool:
    """Whether the model's attention uses the interface, and is plain causal attention."""
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
    packed: PackedLine | None = None,
    **kwargs,
):
    """Attention function of the interface.

    Args:
        query: `[1, heads, tokens, d]`; `key` and `value` alike, with fewer heads.

    Returns:
        `[1, tokens, heads, d]`, and no attention weights.
    """
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packed.calls += 1
    groups = getattr(module, "num_key_value_groups", 1)
    outputs = []

    # The head, in the line or computed before.
    before = packed.head_kv[module.layer_idx] if packed.head_kv is not None else None
    if packed.head:
        before = (key[:, :, : packed.head], value[:, :, : packed.head])
        outputs.append(_attention(query[:, :, : packed.head], *before, None, scaling, groups))

    # Each state: its head, what is known of it, and itself.
    for i, ((start, end), mask) in enumerate(zip(packed.spans, packed.masks, strict=True)):
        own = (key[:, :, start:end], value[:, :, start:end])
        if packed.recorded is not None:
            packed.recorded[i].append(tuple(x.to(value.dtype, copy=True) for x in own))
        known = packed.known[i][module.layer_idx] if packed.known and packed.known[i] else None
        parts = [x for x in (before, known, own) if x is not None]
        if len(parts) > 1:
            own = tuple(torch.cat(some, 2) for some in zip(*parts, strict=True))
        outputs.append(_attention(query[:, :, start:end], *own, mask, scaling, groups))
    return torch.cat([o.to(query.dtype) for o in outputs], 2).transpose(1, 2), None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    groups: int,
) -> torch.Tensor:
    """Attention of one state.

    Args:
        query: `[1, heads, S, d]`; `key` and `value` `[1, heads / groups, T, d]`.
        mask: additive `[S, T]`; None: causal, with S = T.
        scale: of the products; None: 1 / sqrt(d).

    Returns:
        `[1, heads, S, d]`.
    """
    # Queries and keys may be float32 where values are not: positions are turned in float32.
    dtype, size = value.dtype, query.shape[2] * key.shape[2]
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    small = query.device.type == "cpu" and size <= _WRITTEN_OUT
    if trains and small and dtype != torch.float32:
        return _written_out(query, key, value, mask, scale)

    query, key = query.to(dtype), repeat_kv(key.to(dtype), groups)
    value = repeat_kv(value, groups)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """`_attention` as two products in float32. torch's kernel for 16 bits on a CPU takes far longer
    for its backward than for its forward.
    """
    _, heads, length, width = query.shape
    _, few, total, _ = key.shape
    if mask is None:
        mask = torch.full((length, total), float("-inf")).triu_(1)

    with torch.autocast("cpu", enabled=False):
        # The heads of a group share keys, so they are rows of one product.
        rows = query.float().reshape(few, -1, width)
        scores = torch.baddbmm(
            mask.float().repeat(heads // few, 1)[None],
            rows,
            key[0].float().transpose(1, 2),
            alpha=width**-0.5 if scale is None else scale,
        )
        return torch.bmm(scores.softmax(-1), value[0].float()).view(1, heads, length, width)


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
    """A laid-out line: `ids` and `positions` `[1, tokens]`, what attends to what, and the `places`
    of the rows `[R]`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    line: PackedLine
    places: torch.Tensor


def lay_out(
    causal_lm: torch.nn.Module,
    items: Sequence[TreeItem],
    head_kv: LayerKV | None,
    device: torch.device,
    known: Sequence[int] | None = None,
) -> PackedInputs:
    """Put the states one after another; without `head_kv` their common head comes first.

    Args:
        known: per state how many of its first tokens are left out of the line; `PackedLine.known`
            has them. Rows among them have no place.
    """
    known = [0] * len(items) if known is None else known
    inside = [] if head_kv is not None else list(items[0].request.head_ids)
    dtype = multiplying_dtype(causal_lm, device)

    ids, positions, spans, places, masks = list(inside), list(range(len(inside))), [], [], []
    for item, out in zip(items, known, strict=True):
        start, body, nodes = len(ids), item.request.body_ids, item.trie.tokens
        first = len(item.request.head_ids)
        own = [*range(first, first + len(body))]
        own += (first + len(body) + depth for depth in item.trie.depths)
        ids += [*body, *nodes][out:]
        positions += own[out:]
        spans.append((start, len(ids)))
        places += (start + row - out for row in item.rows() if row >= out)
        allowed = item.mask()[out:]
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
        masks.append(mask.to(device))

    return PackedInputs(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        PackedLine(spans, masks, len(inside), head_kv),
        torch.tensor(places, device=device),
    )


def run_packed(
    causal_lm: torch.nn.Module,
    inputs: PackedInputs,
    first: int = 0,
    last: int | None = None,
    hidden: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states `[tokens, D]` behind the layers from `first` to before `last`.

    Args:
        hidden: `[tokens, D]` before layer `first`; None: the tokens' embeddings, for `first` 0.
        rows: the tokens `[R]` whose outputs matter; what the others give is undefined then. None:
            all.
    """
    decoder, line = causal_lm.get_decoder(), inputs.line
    total = causal_lm.config.num_hidden_layers
    last = total if last is None else last
    line.calls = 0
    source = {"input_ids": inputs.ids} if hidden is None else {"inputs_embeds": hidden[None]}
    some = (first, last) != (0, total)
    part = only_layers(decoder, first, last) if some else contextlib.nullcontext()

    asked = contextlib.nullcontext() if rows is None else last_product(decoder, rows)
    with asked, part, _packed_attention(decoder):
        # The mask is a stand-in: one with four dimensions keeps transformers from building its own.
        out = decoder(
            **source,
            position_ids=inputs.positions,
            use_cache=False,
            packed=line,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.ids.device),
        ).last_hidden_state
    if line.calls != last - first:
        raise RuntimeError(f"{line.calls} of {last - first} layers use the attention interface")
    return out[0]


def packed_pass(
    causal_lm: torch.nn.Module,
    items: Sequence[TreeItem],
    head_kv: LayerKV | None,
    all_tokens: bool = False,
) -> torch.Tensor:
    """Hidden states `[R, D]` of the rows (`TreeItem.rows`), state after state.

    Args:
        head_kv: keys and values of the items' common head; None: it is computed at the line's
            start, with gradients where they are on.
        all_tokens: compute the last layer as a whole too, not only what the rows need of it.
    """
    inputs = lay_out(causal_lm, items, head_kv, next(causal_lm.parameters()).device)
    rows = None if all_tokens else inputs.places
    return run_packed(causal_lm, inputs, rows=rows)[inputs.places]
