"""The transformers engine: scores with `tree_forward`, on the trainer's own model object or on one
of its own.

All work runs in one dedicated thread, so the event loop stays free, calls never overlap, and OpenMP
keeps one pool of workers. A lock shared with the trainer keeps an update and a forward apart.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from priorzero.llm.engines.base import LLMEngine, LLMEngineDead, TokenLogprobs
from priorzero.llm.model import base_model
from priorzero.llm.scoring.forward import (
    LayerKV,
    TreeItem,
    computing,
    plan_batches,
    prepare,
    split_actions,
    tree_logprobs,
)
from priorzero.llm.scoring.packed import supports_packing
from priorzero.llm.scoring.prefix_cache import PrefixCache
from priorzero.llm.scoring.requests import ReasoningSettings, TextTokeniser, TokenisedRequest
from priorzero.llm.scoring.trunk import TrunkCache
from priorzero.llm.weights.export import Weights
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class TransformersEngine(LLMEngine):
    """LLM engine on a Hugging Face model.

    :param compute_dtype: autocast dtype, or None to compute in the weights' dtype.
    :param max_batch_tokens: bound of padded tokens in one forward.
    :param lock: the trainer's lock when the model object, or `trunk`, is shared with it.
    :param prefix_cache_mib: memory for keys and values of earlier prompts, for those that begin
        alike; 0: heads only.
    :param trunk: outputs of layers that no update changes; the trainer's own, where it has them.
    """

    name = "transformers"

    def __init__(
        self,
        model: torch.nn.Module,
        text: TextTokeniser,
        *,
        compute_dtype: torch.dtype | None = None,
        max_batch_tokens: int = 4096,
        reasoning: ReasoningSettings | None = None,
        lock: threading.RLock | None = None,
        trunk: TrunkCache | None = None,
        prefix_cache_mib: int = 0,
    ) -> None:
        super().__init__(text, reasoning)
        self.model = model
        self.compute_dtype = compute_dtype
        self.max_batch_tokens = max_batch_tokens
        self.prefixes = PrefixCache(prefix_cache_mib << 20)
        if trunk is not None and trunk.dtype != compute_dtype:
            raise PriorZeroError(
                f"the trainer's trunk cache is for {trunk.dtype}, this engine computes in {compute_dtype}"
            )
        self.trunk = trunk
        self._lock = lock or threading.RLock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llm-transformers")
        self._closed = False

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or next(self.model.parameters()).dtype

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise LLMEngineDead("the transformers engine was closed")

        def guarded() -> T:
            started = time.perf_counter()
            with (
                self._lock,
                torch.no_grad(),
                computing(next(self.model.parameters()).device, self.compute_dtype),
            ):
                was_training = self.model.training
                self.model.eval()
                try:
                    return work()
                finally:
                    self.model.train(was_training)
                    self.counters["busy_ms"] += int(1000 * (time.perf_counter() - started))

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    async def _score_tokens(
        self, requests: list[TokenisedRequest]
    ) -> tuple[list[TokenLogprobs], int]:
        return await self._in_thread(lambda: (self._score_now(requests), self.weights_version))

    def _score_now(self, requests: Sequence[TokenisedRequest]) -> list[TokenLogprobs]:
        items = prepare(requests)
        answers: list[TokenLogprobs] = [()] * len(items)
        grown = self._grown_prompts(items)
        rest = [i for i in range(len(items)) if i not in grown]
        for group, mixed in ((list(grown), True), (rest, False)):
            members = [grown[i][0] if mixed else items[i] for i in group]
            for batch in plan_batches(members, self.max_batch_tokens, mixed_heads=mixed):
                chosen = [members[j] for j in batch]
                kept: list[LayerKV] | None = [] if self._keeps_prompts else None
                flats = self._forward(
                    chosen, [grown[group[j]][1] for j in batch] if mixed else None, kept
                )
                for j, item, flat in zip(batch, chosen, flats, strict=True):
                    answers[group[j]] = tuple(
                        tuple(a.tolist()) for a in split_actions(flat.cpu(), item.request)
                    )
                for item, kv in zip(chosen, kept or (), strict=False):
                    self.prefixes.keep(item.request, kv)
                self.counters["forwards"] += 1
                self.counters["tokens"] += sum(item.num_tokens for item in chosen)
        return answers

    def _forward(
        self, items: list[TreeItem], prefixes: list[LayerKV] | None, kept: list | None
    ) -> list[torch.Tensor]:
        head, kv = items[0].request.head_ids, None
        if head and prefixes is None:
            kv = self.prefixes.head(self.model, head, self.compute_dtype, self.trunk)
        return tree_logprobs(
            self.model, items, head_kv=kv, prefixes=prefixes, trunk=self.trunk, kept=kept
        )

    @property
    def _keeps_prompts(self) -> bool:
        """Not beside a trunk: it spares more, as long as states repeat, and keeps nothing of the
        layers above.
        """
        return (
            self.prefixes.max_bytes > 0
            and self.trunk is None
            and supports_packing(base_model(self.model))
        )

    def _grown_prompts(self, items: Sequence[TreeItem]) -> dict[int, tuple[TreeItem, LayerKV]]:
        """The items that begin as a kept prompt does, by index: cut anew, and the keys and values
        of their beginning.

        On CUDA only where that is most of the prompt: what is left is computed state by state, not
        in one large batch.
        """
        if not self._keeps_prompts:
            return {}
        least_share = 0.5 if next(self.model.parameters()).device.type == "cuda" else 0.0
        self.prefixes.refresh(self.model, self.compute_dtype)
        grown = {}
        for i, item in enumerate(items):
            found = self.prefixes.recut(item.request, least_share)
            if found is not None:
                grown[i] = (TreeItem(found[0], item.trie), found[1])
        return grown

    async def _generate_tokens(
        self,
        prompts: list[tuple[int, ...]],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        seed: int | None,
    ) -> list[str]:
        def work() -> list[str]:
            texts: list[str] = []
            longest = max(len(p) for p in prompts) + max_new_tokens
            rows = max(1, self.max_batch_tokens // longest)
            for start in range(0, len(prompts), rows):
                chunk_seed = None if seed is None else seed + start
                texts += self._sample(
                    prompts[start : start + rows], max_new_tokens, temperature, stop, chunk_seed
                )
            return texts

        return await self._in_thread(work)

    def _sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        seed: int | None,
    ) -> list[str]:
        """Sample a left-padded batch token by token, with a generator of its own (the global one
        stays untouched).
        """
        from transformers import DynamicCache

        causal_lm = base_model(self.model)
        device = next(self.model.parameters()).device
        generator = torch.Generator(device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        size = max(len(p) for p in prompts)
        ids = torch.tensor([(0,) * (size - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (size - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache, step_ids = DynamicCache(), ids
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ends = {self.text.terminator_id, self.text.tokenizer.eos_token_id}
        written: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        open_rows = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            logits = (
                causal_lm(
                    input_ids=step_ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
            )
            if temperature > 0:
                tokens = torch.multinomial(
                    (logits / temperature).softmax(-1), 1, generator=generator
                )
            else:
                tokens = logits.argmax(-1, keepdim=True)
            for i in sorted(open_rows):
                token = int(tokens[i])
                if token in ends:
                    open_rows.discard(i)
                    continue
                written[i].append(token)
                texts[i] = self.text.decode(written[i])
                cut = cut_at_stop(texts[i], stop)
                if cut is not None:
                    texts[i] = cut
                    open_rows.discard(i)
            if not open_rows:
                break
            step_ids, positions = tokens, positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], -1)
        return texts

    async def push_weights(self, weights: Weights, version: int) -> dict[str, float]:
        """Take over ``weights``: nothing to move when the object is shared, else copied in
        place.
        """
        moved = 0

        def work() -> None:
            nonlocal moved
            shared = weights.module is not None and (
                base_model(weights.module) is base_model(self.model)
            )
            if not shared:
                moved = weights.copy_into(self.model, merge=True)
            self.prefixes.clear()
            self.weights_version = version

        started = time.perf_counter()
        await self._in_thread(work)
        return {"seconds": time.perf_counter() - started, "bytes": float(moved)}

    async def close(self) -> None:
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def stats(self) -> dict[str, float]:
        return super().stats() | self.prefixes.stats()

    def reset_stats(self) -> None:
        super().reset_stats()
        self.prefixes.reset_stats()


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """``text`` up to and including the earliest stop string, or None where none occurs."""
    ends = [text.index(s) + len(s) for s in stop if s and s in text]
    return text[: min(ends)] if ends else None
