"""Keys and values of the heads that prompts begin with, kept between forwards.

All prompts of a run begin with the same system text, so its tokens are computed once per state of
the weights.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from priorzero.llm.module import base_model
from priorzero.llm.scoring.items import LayerKV, key_values
from priorzero.llm.scoring.layers import multiplying_dtype, only_layers, weights_stamp
from priorzero.llm.scoring.trunk import TrunkCache

_HEADS = 4


class HeadCache:
    """Keys and values by token ids, valid for one state of the weights."""

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self._stamp: tuple = ()
        self._heads: OrderedDict[tuple[int, ...], LayerKV] = OrderedDict()
        self._weights: tuple[int, list[torch.nn.Parameter]] = (0, [])

    def clear(self) -> None:
        """Forget all heads, and which weights the model has."""
        self._heads.clear()
        self._weights = (0, [])

    def get(
        self,
        model: torch.nn.Module,
        head_ids: tuple[int, ...],
        trunk: TrunkCache | None = None,
    ) -> LayerKV:
        """Keys and values of `head_ids` under the present weights, in the present autocast.

        Everything is dropped if it was computed by another model, with other weights or in another
        dtype.
        """
        dtype = multiplying_dtype(base_model(model), next(model.parameters()).device)
        if self._weights[0] != id(model):  # looking through all modules takes as long as a layer
            self._weights = (id(model), list(model.parameters()))
        stamp = (id(model), weights_stamp(self._weights[1]), dtype)
        if stamp != self._stamp:
            self._heads.clear()
            self._stamp = stamp

        if head_ids in self._heads:
            self.hits += 1
            self._heads.move_to_end(head_ids)
            return self._heads[head_ids]
        self.misses += 1
        self._heads[head_ids] = head_key_values(model, head_ids, trunk)
        if len(self._heads) > _HEADS:
            self._heads.popitem(last=False)
        return self._heads[head_ids]

    def reset_stats(self) -> None:
        """Count from here on."""
        self.hits = self.misses = 0

    def stats(self) -> dict[str, float]:
        """Hits and misses since the start, for logging."""
        return {
            "head_cache_hits": float(self.hits),
            "head_cache_misses": float(self.misses),
        }


def head_key_values(
    model: torch.nn.Module, head_ids: tuple[int, ...], trunk: TrunkCache | None = None
) -> LayerKV:
    """Run the head alone. Gradients follow the surrounding grad mode.

    Args:
        trunk: spares the frozen layers.
    """
    causal_lm, device = base_model(model), next(model.parameters()).device
    decoder = causal_lm.get_decoder()
    if trunk is None:
        ids = torch.tensor([head_ids], device=device)
        return key_values(decoder(input_ids=ids, use_cache=True))
    hidden, lower = trunk.head(causal_lm, head_ids, device)
    with only_layers(decoder, trunk.depth, len(decoder.layers)):
        upper = key_values(decoder(inputs_embeds=hidden[None], use_cache=True))
    return lower + upper[trunk.depth :]
