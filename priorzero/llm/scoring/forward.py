"""Log-probabilities of all actions of many states with every token computed once, with or without
gradients.

Each state is one row: its prompt body, then the inner nodes of its actions' token trie. A 4D mask
lets a node see the prompt and its own ancestors only, and position ids count along its path, so the
row equals one full forward per action (tests/llm compare them). The head, common to many states, is
computed once as a row of its own; its keys and values are shared by all rows: kept across calls for
scoring (`prefix_cache.py`), with gradients flowing into it in training.

Letters: `B` states of a batch, `H` tokens of the head, `S` padded tokens of a row (body and nodes),
`P` padded tokens of a prompt (head and body), `T` padded nodes, `R` rows of logits that are needed
(end of prompt and inner nodes, all states together), `N` vocabulary, `D` hidden width.

On a CPU the states of a batch are packed into one row instead of padded to one length
(`packed.py`).

Long prompts on a GPU take two passes: all of the prompts first, as plain causal attention, for
which there are kernels without a mask; then the nodes on their keys and values. Sharing the head
would save less than a mask of 4,000 x 4,000 costs.

Tree attention after SpecInfer (arXiv:2305.09781), used here to score instead of to speculate.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from priorzero.llm.model import base_model, multiplying_dtype, only_layers, sliding_window
from priorzero.llm.scoring.requests import TokenisedRequest
from priorzero.llm.scoring.trie import TokenTrie, build_trie
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.llm.scoring.trunk import TrunkCache

TWO_PASS_TOKENS = 1024  # body tokens from which a GPU takes two passes
LayerKV = list[
    tuple[torch.Tensor, torch.Tensor]
]  # per layer: keys, values, each [1, heads, H, head_dim]


@dataclass(frozen=True)
class TreeItem:
    """One state ready for the forward: its tokens and the trie of its actions."""

    request: TokenisedRequest
    trie: TokenTrie

    @property
    def num_tokens(self) -> int:
        return len(self.request.body_ids) + len(self.trie.tokens)

    def node_mask(self) -> torch.Tensor:
        """`[T, T]`, True where a node may attend: its ancestors and itself."""
        mask = torch.zeros(len(self.trie.tokens), len(self.trie.tokens), dtype=torch.bool)
        for node, ancestors in enumerate(self.trie.ancestors()):
            mask[node, ancestors] = True
        return mask

    def mask(self) -> torch.Tensor:
        """`[S, H + S]`: the body head and body causally, each node the whole prompt and its own
        ancestors.
        """
        head, body = len(self.request.head_ids), len(self.request.body_ids)
        mask = torch.zeros(self.num_tokens, head + self.num_tokens, dtype=torch.bool)
        mask[:, :head] = True
        mask[:body, head : head + body] = torch.ones(body, body, dtype=torch.bool).tril()
        mask[body:, head : head + body] = True
        mask[body:, head + body :] = self.node_mask()
        return mask


@contextlib.contextmanager
def computing(device: torch.device, dtype: torch.dtype | None):
    """Context of every forward: autocast to ``dtype`` (None: the weights' own), and on CUDA no
    attention of cuDNN's.

    cuDNN makes a plan for every new shape, and every batch of prompts has one. On an H100 a plan
    took 80 ms (the first one 1.2 s), and its kernel saves 16 ms on 16 prompts of 4,000 tokens.
    """
    with contextlib.ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(device.type, dtype=dtype))
        if device.type == "cuda":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(kernels))
        yield


def head_key_values(
    model: torch.nn.Module, head_ids: tuple[int, ...], trunk: TrunkCache | None = None
) -> LayerKV:
    """Run the head alone. Gradients follow the surrounding grad mode. `trunk` spares the frozen
    layers.
    """
    causal_lm, device = base_model(model), next(model.parameters()).device
    decoder = causal_lm.get_decoder()
    if trunk is None:
        return key_values(
            decoder(input_ids=torch.tensor([head_ids], device=device), use_cache=True)
        )
    hidden, lower = trunk.head(causal_lm, head_ids, device)
    with only_layers(decoder, trunk.depth, len(decoder.layers)):
        upper = key_values(decoder(inputs_embeds=hidden[None], use_cache=True))
    return lower + upper[trunk.depth :]


def key_values(output) -> LayerKV:
    """Keys and values per layer of a decoder's output."""
    return [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def prepare(requests: Sequence[TokenisedRequest]) -> list[TreeItem]:
    return [TreeItem(r, build_trie(r.action_ids)) for r in requests]


def plan_batches(
    items: Sequence[TreeItem],
    max_batch_tokens: int,
    max_batch_size: int = 64,
    *,
    mixed_heads: bool = False,
) -> list[list[int]]:
    """Indices of items that share a forward: similar length, ``B * (H + S)`` at most
    ``max_batch_tokens``, and the same head unless ``mixed_heads``.

    A single state above the limit gets a batch of its own: it cannot be split. Attention over the
    head counts, because its keys and values are copied for each row.
    """

    def length(i: int) -> int:
        return len(items[i].request.head_ids) + items[i].num_tokens

    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[() if mixed_heads else item.request.head_ids].append(i)
    batches: list[list[int]] = []
    for members in groups.values():
        batch: list[int] = []
        for i in sorted(members, key=length):  # ascending: the newest is the longest
            rows = len(batch) + 1
            if batch and (rows * length(i) > max_batch_tokens or rows > max_batch_size):
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    return batches


def _layout(items: Sequence[TreeItem], device: torch.device):
    """Token ids [B, S], position ids [B, S], mask [B, 1, S, H + S] (True = may attend)."""
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
        row = mask[b, 0]
        row[:end, : head_len + end] = item.mask()
        # A padding token sees itself only: an empty row of the mask would give NaN.
        padding = torch.arange(end, size)
        row[padding, head_len + padding] = True
    return ids.to(device), positions.to(device), mask.to(device)


def _check_sliding(config, length: int) -> None:
    """The tree mask is the full mask; a sliding window shorter than the row would need another one."""
    window = sliding_window(config)
    if window and length > window:
        raise PriorZeroError(
            f"this LLM attends over a sliding window of {window} tokens and the row has {length}; "
            "shorten the prompts, or use the vLLM engine"
        )


def tree_logprobs(
    model: torch.nn.Module,
    items: Sequence[TreeItem],
    *,
    head_kv: LayerKV | None = None,
    prefixes: Sequence[LayerKV] | None = None,
    logit_rows: int = 512,
    way: str | None = None,
    trunk: TrunkCache | None = None,
    kept: list[LayerKV] | None = None,
) -> list[torch.Tensor]:
    """Log-probabilities (natural log, temperature 1, float32) of all action tokens of one batch of
    states.

    All items share one head, unless ``prefixes`` holds the keys and values of each one's own. One
    flat tensor per item: the tokens of its actions one after another, with the lengths of
    ``request.action_ids``. Gradients follow the surrounding grad mode; without ``head_kv`` and
    ``prefixes`` the head is computed here, once for the batch, with gradients too. ``logit_rows``
    bounds the rows of logits [R, N] held at a time (without gradients; autograd keeps them all).
    ``way``: "packed", "padded" or "two_passes", see the module; None decides by device, model and
    length. ``trunk`` holds outputs of frozen layers; used where states are packed. ``kept`` is
    filled with each prompt's keys and values where that is possible.
    """
    causal_lm = base_model(model)
    device = next(model.parameters()).device
    head_ids = items[0].request.head_ids
    if prefixes is None and any(item.request.head_ids != head_ids for item in items):
        raise ValueError(
            "the states of one batch need the same head, or each its prefix; use plan_batches"
        )
    way = way or ("packed" if prefixes is not None else choose_way(causal_lm, items, device))
    # An empty body leaves no token in the row that ends the prompt, so the head goes into the row
    # instead.
    if head_ids and (way == "two_passes" or any(not item.request.body_ids for item in items)):
        items = [headless(item) for item in items]
        head_ids, head_kv = (), None
    if way == "two_passes":
        needed = _two_passes(causal_lm, items, device, kept)
    elif way == "packed":
        from priorzero.llm.scoring.packed import packed_pass

        if prefixes is None and head_kv is not None:
            prefixes = [head_kv] * len(items)
        needed = packed_pass(causal_lm, items, prefixes, device, trunk, kept)
    else:
        if head_ids and head_kv is None:
            head_kv = head_key_values(model, head_ids)
        needed = _padded_pass(causal_lm, items, head_kv, device)
    return _gather(causal_lm, needed, items, logit_rows)


def choose_way(causal_lm, items: Sequence[TreeItem], device: torch.device) -> str:
    """How to compute these states together: by device, model and length."""
    if device.type == "cuda":
        # On a GPU padding costs less than the many small kernels of a packed row.
        longest = max(len(item.request.body_ids) for item in items)
        return "two_passes" if longest >= TWO_PASS_TOKENS else "padded"
    from priorzero.llm.scoring.packed import supports_packing

    return "packed" if supports_packing(causal_lm) else "padded"


def _padded_pass(
    causal_lm, items: Sequence[TreeItem], head_kv: LayerKV | None, device: torch.device
) -> torch.Tensor:
    """Needed hidden rows [R, D]: prompt bodies and nodes together, on the head's keys and values."""
    from transformers import DynamicCache

    ids, positions, mask = _layout(items, device)
    _check_sliding(causal_lm.config, mask.shape[-1])
    past = None
    if head_kv is not None:
        rows = len(items)
        past = DynamicCache(
            [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in head_kv]
        )
    hidden = causal_lm.get_decoder()(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=past,
        use_cache=past is not None,
    ).last_hidden_state  # [B, S, D]
    places = [
        (b, len(item.request.body_ids) - 1 + row)
        for b, item in enumerate(items)
        for row in range(item.trie.num_rows)
    ]
    state, position = torch.tensor(places, device=device).T
    return hidden[state, position]


def _two_passes(
    causal_lm, items: Sequence[TreeItem], device: torch.device, kept: list[LayerKV] | None = None
) -> torch.Tensor:
    """Needed hidden rows [R, D]: prompts first, padded on the right, where causal attention never
    looks; then the nodes.

    All inputs are built and moved before the first pass: a copy to the GPU waits for the work
    queued before it, and the second pass's many small kernels should be queued while the first one
    still computes.
    """
    decoder = causal_lm.get_decoder()
    lengths = [len(item.request.body_ids) for item in items]
    width, nodes = max(lengths), max(len(item.trie.tokens) for item in items)
    _check_sliding(causal_lm.config, width + nodes)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    tokens = torch.zeros(len(items), nodes, dtype=torch.long)
    positions = torch.zeros(len(items), nodes, dtype=torch.long)
    mask = torch.zeros(len(items), 1, nodes, width + nodes, dtype=torch.bool)
    mask[:, 0, torch.arange(nodes), width + torch.arange(nodes)] = (
        True  # padding sees itself: an empty row gives NaN
    )
    for b, item in enumerate(items):
        own = len(item.trie.tokens)
        ids[b, : lengths[b]] = torch.tensor(item.request.body_ids)
        tokens[b, :own] = torch.tensor(item.trie.tokens, dtype=torch.long)
        positions[b, :own] = lengths[b] + torch.tensor(item.trie.depths, dtype=torch.long)
        mask[b, 0, :own, : lengths[b]] = True
        mask[b, 0, :own, width : width + own] = item.node_mask()
    # The rows that are read, in the first and the second pass's hidden states laid end to end.
    ends = [b * width + length - 1 for b, length in enumerate(lengths)]
    second_start = len(items) * width
    places = [
        p
        for b, item in enumerate(items)
        for p in (
            ends[b],
            *range(second_start + b * nodes, second_start + b * nodes + len(item.trie.tokens)),
        )
    ]
    ids, tokens, positions, mask, places = (
        x.to(device) for x in (ids, tokens, positions, mask, torch.tensor(places))
    )
    # Neither mask nor positions: either would make transformers build a mask.
    first = decoder(input_ids=ids, use_cache=nodes > 0 or kept is not None)
    hidden = [first.last_hidden_state.flatten(0, 1)]
    if kept is not None:
        dtype = multiplying_dtype(causal_lm, device)
        layers = key_values(first)
        # Copies: a view would hold the whole batch's memory as long as one of its prompts is kept.
        kept[:] = [
            [
                tuple(x[b : b + 1, :, :length].to(dtype, copy=True) for x in layer)
                for layer in layers
            ]
            for b, length in enumerate(lengths)
        ]
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


def headless(item: TreeItem) -> TreeItem:
    """The same state with its head as part of the body."""
    return TreeItem(
        TokenisedRequest((), item.request.prompt_ids, item.request.action_ids), item.trie
    )


def _gather(
    causal_lm, needed: torch.Tensor, items: Sequence[TreeItem], logit_rows: int
) -> list[torch.Tensor]:
    """Apply the output head to the needed hidden rows [R, D] and read the asked tokens'
    log-probabilities.
    """
    lookups: list[tuple[int, int]] = []  # (row of `needed`, token)
    counts: list[int] = []
    first = 0
    for item in items:
        wanted = [(first + row, token) for lookup in item.trie.lookups for row, token in lookup]
        first += item.trie.num_rows
        lookups.extend(wanted)
        counts.append(len(wanted))
    row, token = torch.tensor(lookups, dtype=torch.long, device=needed.device).reshape(-1, 2).T
    head = causal_lm.get_output_embeddings()
    softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
    flat = torch.empty(len(lookups), dtype=torch.float32, device=needed.device)
    step = max(1, logit_rows)
    for start in range(0, len(needed), step):
        inside = ((row >= start) & (row < start + step)).nonzero()[:, 0]
        logits = head(needed[start : start + step]).float()
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        picked = (
            logits[row[inside] - start, token[inside]] - logits.logsumexp(-1)[row[inside] - start]
        )
        flat = flat.index_copy(0, inside, picked)
    return list(flat.split(counts))


def split_actions(flat: torch.Tensor, request: TokenisedRequest) -> list[torch.Tensor]:
    """The flat token log-probabilities of one state, cut into one tensor per action."""
    return list(flat.split([len(a) for a in request.action_ids]))


def action_totals(
    flat: torch.Tensor, request: TokenisedRequest, reduction: str = "sum"
) -> torch.Tensor:
    """One number per action [A]: sum (or mean) of its tokens' log-probabilities; as
    `ActionScores.totals`.
    """
    lengths = torch.tensor([len(a) for a in request.action_ids], device=flat.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=flat.device), lengths)
    totals = torch.zeros(len(lengths), dtype=flat.dtype, device=flat.device).index_add(
        0, owner, flat
    )
    if reduction == "sum":
        return totals
    if reduction == "mean":
        return totals / lengths
    raise PriorZeroError(f"prior reduction {reduction!r} is unknown; use 'sum' or 'mean'")
