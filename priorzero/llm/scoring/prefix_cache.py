"""Keys and values of what prompts begin with: the fixed head, and the prompts of earlier steps.

A prompt whose history only grows begins as the one before it did, up to the step that is new; what
lies before need not be computed again. Prompts go when memory is short, the least used first;
everything is dropped when the weights change.

The idea is vLLM's automatic prefix caching (arXiv:2309.06180), here per whole prompt and token
instead of per block.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch

from priorzero.llm.model import weights_stamp
from priorzero.llm.scoring.forward import LayerKV, head_key_values
from priorzero.llm.scoring.requests import TokenisedRequest
from priorzero.llm.scoring.trunk import TrunkCache

_HEADS = 4
_LEAST_GAIN = 32  # tokens beyond the head from which a kept prompt is worth its copies


class PrefixCache:
    """Keys and values by token ids, valid for one state of the weights.

    :param max_bytes: memory for prompts; 0 keeps heads only.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.tokens_reused = 0
        self._stamp: tuple = ()
        self._heads: OrderedDict[tuple[int, ...], LayerKV] = OrderedDict()
        self._prompts: OrderedDict[tuple[int, ...], tuple[np.ndarray, LayerKV]] = OrderedDict()

    def clear(self) -> None:
        self._heads.clear()
        self._prompts.clear()
        self.bytes = 0

    def head(
        self,
        model: torch.nn.Module,
        head_ids: tuple[int, ...],
        dtype: torch.dtype | None,
        trunk: TrunkCache | None = None,
    ) -> LayerKV:
        """Keys and values of ``head_ids`` under the present weights (computed when missing or
        outdated).
        """
        self.refresh(model, dtype)
        if head_ids in self._heads:
            self.hits += 1
            self._heads.move_to_end(head_ids)
            return self._heads[head_ids]
        self.misses += 1
        self._heads[head_ids] = head_key_values(model, head_ids, trunk)
        if len(self._heads) > _HEADS:
            self._heads.popitem(last=False)
        return self._heads[head_ids]

    def refresh(self, model: torch.nn.Module, dtype: torch.dtype | None) -> None:
        """Drop everything if it was computed by another model, with other weights or in another
        dtype.
        """
        stamp = (id(model), weights_stamp(model), dtype)
        if stamp != self._stamp:
            self.clear()
            self._stamp = stamp

    def recut(
        self, request: TokenisedRequest, least_share: float = 0.0
    ) -> tuple[TokenisedRequest, LayerKV] | None:
        """The request with all it shares with a kept prompt as its head, and that head's keys and
        values.

        None where no kept prompt shares enough: some tokens beyond the head, and ``least_share`` of
        the prompt. The last token of a prompt is never part of the head: its hidden state predicts
        the actions. `refresh` comes before, once for all requests of a call: it looks at every
        weight.
        """
        if not self._prompts:
            return None
        ids = np.asarray(request.prompt_ids, dtype=np.int64)
        shared, best = max(
            ((_common(ids, kept), key) for key, (kept, _) in self._prompts.items()),
            key=lambda pair: pair[0],
        )
        shared = min(shared, len(ids) - 1)
        if shared < max(len(request.head_ids) + _LEAST_GAIN, least_share * len(ids)):
            return None
        self._prompts.move_to_end(best)
        self.tokens_reused += shared - len(request.head_ids)
        cut = TokenisedRequest(
            request.prompt_ids[:shared], request.prompt_ids[shared:], request.action_ids
        )
        return cut, [(k[:, :, :shared], v[:, :, :shared]) for k, v in self._prompts[best][1]]

    def keep(self, request: TokenisedRequest, kv: LayerKV) -> None:
        """Remember the keys and values [1, heads, tokens, d] of a whole prompt."""
        size = _size(kv)
        if request.prompt_ids in self._prompts or size > self.max_bytes:
            return
        self._prompts[request.prompt_ids] = (np.asarray(request.prompt_ids, dtype=np.int64), kv)
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, (_, gone) = self._prompts.popitem(last=False)
            self.bytes -= _size(gone)

    def reset_stats(self) -> None:
        """Count from here on."""
        self.hits = self.misses = self.tokens_reused = 0

    def stats(self) -> dict[str, float]:
        """Since the start, for logging; ``prefix_tokens`` are those of prompts, heads not counted."""
        return {
            "head_cache_hits": float(self.hits),
            "head_cache_misses": float(self.misses),
            "prefix_tokens": float(self.tokens_reused),
            "prefix_mib": self.bytes / 2**20,
        }


def _size(kv: LayerKV) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for layer in kv for x in layer)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size
