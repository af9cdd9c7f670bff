"""The outputs of an LLM's frozen lower layers, kept per state.

With adapters on the last layers only they never change.

A run asks for the same states again and again: each time the weights have changed, and when it
trains on what it has scored. Only the layers with adapters have to be computed anew then. Works on
packed lines (`packed.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from priorzero.llm.module import base_model
from priorzero.llm.scoring.items import LayerKV, TreeItem, headless, key_values
from priorzero.llm.scoring.layers import only_layers
from priorzero.llm.scoring.packed import lay_out, run_packed, supports_packing
from priorzero.llm.scoring.prefixes import PrefixCache
from priorzero.types import PriorZeroError

_HEADS = 8  # heads kept; a run has one or two
_PREFIX_SHARE = 4  # of the memory bound, one in so many bytes is for prompts that begin alike
# Of the check against a forward through all layers, relative to the largest hidden value.
_TOLERANCE = 1e-3


def frozen_layers(model: torch.nn.Module) -> int:
    """Decoder layers before the first one that trains.

    0 where the embedding trains too, or states cannot be packed.
    """
    causal_lm = base_model(model)
    decoder = causal_lm.get_decoder()
    apart = hasattr(decoder, "layers") and hasattr(decoder, "norm")
    if not apart or not supports_packing(causal_lm):
        return 0
    if any(p.requires_grad for p in causal_lm.get_input_embeddings().parameters()):
        return 0
    for number, layer in enumerate(decoder.layers):
        if any(p.requires_grad for p in layer.parameters()):
            return number
    return 0


class TrunkCache:
    """Hidden states `[tokens, D]` behind the first `depth` layers, for heads and for states.

    One cache serves every copy of the model whose lower layers hold the same numbers and compute in
    the same dtype: the trainer's and the engine's. Not safe for use from two threads at once: both
    hold the trainer's lock while they compute.

    Args:
        depth: layers that never change (`frozen_layers`), at least 1.
        max_bytes: memory bound for states (the few heads come on top), those not asked for the
            longest go first; of which a part is for keys and values of prompts that others begin
            like.
        dtype: autocast dtype of all who use it, None for none.
    """

    def __init__(self, depth: int, max_bytes: int, dtype: torch.dtype | None = None) -> None:
        assert depth >= 1 and max_bytes >= 1, (depth, max_bytes)
        self.depth = depth
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.tokens = 0
        self.tokens_spared = 0
        self._states: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._heads: OrderedDict[tuple[int, ...], tuple[torch.Tensor, LayerKV]] = OrderedDict()
        self._prefixes = PrefixCache(max_bytes // _PREFIX_SHARE)
        self._checked = False

    def hidden(
        self, causal_lm, items: Sequence[TreeItem], with_head: bool, device: torch.device
    ) -> torch.Tensor:
        """`[tokens, D]` of the states one after another, behind their common head if `with_head`.

        Without gradients.

        Raises:
            PriorZeroError: this model gives other numbers when its layers run in two parts.
        """
        head_ids = items[0].request.head_ids
        keys = [
            (head_ids, item.request.body_ids, item.trie.tokens, item.trie.parents) for item in items
        ]
        missing = {k: item for k, item in zip(keys, items, strict=True) if k not in self._states}
        self.hits += len(items) - len(missing)
        self.misses += len(missing)

        with torch.no_grad():
            head = self.head(causal_lm, head_ids, device) if head_ids else None
            computed = self._compute(causal_lm, list(missing.values()), head, device)
        found = dict(zip(missing, computed, strict=True))
        for key in keys:
            if key in self._states:
                self._states.move_to_end(key)
                found[key] = self._states[key]

        parts = [head[0]] if head is not None and with_head else []
        result = torch.cat([*parts, *(found[key] for key in keys)])
        for key in missing:
            self._keep(key, found[key])
        return result

    def head(
        self, causal_lm, head_ids: tuple[int, ...], device: torch.device
    ) -> tuple[torch.Tensor, LayerKV]:
        """Hidden states `[H, D]` of a head behind the trunk, and its keys and values in there."""
        if head_ids not in self._heads:
            decoder = causal_lm.get_decoder()
            with only_layers(decoder, 0, self.depth):
                out = decoder(input_ids=torch.tensor([head_ids], device=device), use_cache=True)
            if len(self._heads) >= _HEADS:
                self._heads.popitem(last=False)
            self._heads[head_ids] = (out.last_hidden_state[0], key_values(out)[: self.depth])
        return self._heads[head_ids]

    def _compute(
        self, causal_lm, items: list[TreeItem], head, device: torch.device
    ) -> list[torch.Tensor]:
        if not items:
            return []
        if not self._checked:
            self._check(causal_lm, items[0], device)

        # What is known of each state: the beginning of one that was read before.
        found = [
            self._prefixes.find(item.request.head_ids, item.request.body_ids, item.num_tokens - 1)
            for item in items
        ]
        lengths = [0 if prefix is None else prefix.length for prefix in found]
        inputs = lay_out(causal_lm, items, None if head is None else head[1], device, lengths)
        inputs.line.known = [[] if prefix is None else prefix.kv for prefix in found]
        inputs.line.recorded = [[] for _ in items]
        hidden = run_packed(causal_lm, inputs, 0, self.depth)

        results = []
        for i, (item, prefix) in enumerate(zip(items, found, strict=True)):
            own, kv = hidden[slice(*inputs.line.spans[i])].clone(), inputs.line.recorded[i]
            if prefix is not None:
                own = torch.cat([prefix.hidden, own])
                kv = [_joined(*layers) for layers in zip(prefix.kv, kv, strict=True)]
            self._remember(item, own, kv)
            results.append(own)
        self.tokens += sum(item.num_tokens for item in items)
        self.tokens_spared += sum(lengths)
        return results

    def _remember(self, item: TreeItem, hidden: torch.Tensor, kv: LayerKV) -> None:
        """Keep a state's body as a beginning of others; `kv` is of all its tokens."""
        body = item.request.body_ids
        of_body = [tuple(x[:, :, : len(body)].clone() for x in layer) for layer in kv]
        self._prefixes.keep(item.request.head_ids, body, hidden[: len(body)], of_body)

    def _check(self, causal_lm, item: TreeItem, device: torch.device) -> None:
        """Once: both parts one after the other against all layers at once, on one state.

        A model may scale its embeddings or look at its layers from outside; that must not pass
        unnoticed.
        """
        inputs = lay_out(causal_lm, [headless(item)], None, device)
        parts = run_packed(
            causal_lm, inputs, self.depth, hidden=run_packed(causal_lm, inputs, 0, self.depth)
        )
        whole = run_packed(causal_lm, inputs)
        # It ran layers that train, without gradients; what autocast remembers of their weights must
        # not serve a backward.
        torch.clear_autocast_cache()
        error, size = float((parts - whole).abs().max()), float(whole.abs().max())
        if not error <= _TOLERANCE * size:
            raise PriorZeroError(
                "this LLM's layers give other numbers when the frozen ones run apart (difference "
                f"{error:.2g} of {size:.2g}); set llm.trunk_cache_mib=0, or llm.lora.last_layers=0"
            )
        self._checked = True

    def _keep(self, key: tuple, hidden: torch.Tensor) -> None:
        room = self.max_bytes - self.max_bytes // _PREFIX_SHARE
        if hidden.numel() * hidden.element_size() > room:
            return
        self._states[key] = hidden
        self.bytes += hidden.numel() * hidden.element_size()
        while self.bytes > room:
            _, gone = self._states.popitem(last=False)
            self.bytes -= gone.numel() * gone.element_size()

    def stats(self) -> dict[str, float]:
        """Hits, misses and size since the start, and the share of the missed states' tokens that
        other states begin with, for logging.
        """
        return {
            "trunk_hits": float(self.hits),
            "trunk_misses": float(self.misses),
            "trunk_mib": (self.bytes + self._prefixes.bytes) / 2**20,
            "trunk_tokens_spared": self.tokens_spared / self.tokens if self.tokens else 0.0,
        }


def _joined(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of tokens behind others."""
    keys, values = (torch.cat(pair, 2) for pair in zip(first, second, strict=True))
    return keys, values
