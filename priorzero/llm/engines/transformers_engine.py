"""The transformers engine: on the trainer's own model object, or on a copy of its own.

All work runs in one dedicated thread, so the event loop stays free, calls never overlap, and OpenMP
keeps one pool of workers. A lock shared with the trainer keeps an update and a forward apart where
both work on the same objects.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from priorzero.compute import thread_pool
from priorzero.llm.engines.base import Ids, LLMEngine, LLMEngineDead, LLMEngineError, TokenLogprobs
from priorzero.llm.engines.thoughts import Generated, Reasoner
from priorzero.llm.module import base_model
from priorzero.llm.scoring.forward import choose_way, computing, tree_logprobs
from priorzero.llm.scoring.head_cache import HeadCache
from priorzero.llm.scoring.items import TreeItem, plan_batches, prepare
from priorzero.llm.scoring.layers import is_out_of_memory
from priorzero.llm.scoring.logits import split_actions
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.scoring.trunk import TrunkCache
from priorzero.llm.weights.export import Weights
from priorzero.types import TokenisedRequest

T = TypeVar("T")

_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}


class TransformersEngine(LLMEngine):
    """LLM engine on a Hugging Face model.

    Args:
        model: the trainer's, or a copy.
        tokeniser: of the model.
        max_batch_tokens: bound of padded tokens in one forward; 0: what suits the device.
        compute_dtype: autocast dtype, or None to compute in the weights' dtype.
        reasoner: how chains of thought are generated; None where no request asks for one.
        lock: the trainer's lock. Held while the trainer's weights are read, and in every call where
            the model object, or `trunk`, is shared with it.
        trunk: outputs of layers that no update changes; the trainer's own, where it has them.
        own_weights: the model is a copy, which the trainer does not touch.
    """

    name = "transformers"

    def __init__(
        self,
        model: torch.nn.Module,
        tokeniser: Tokeniser,
        *,
        max_batch_tokens: int = 0,
        compute_dtype: torch.dtype | None = None,
        reasoner: Reasoner | None = None,
        lock: threading.RLock | None = None,
        trunk: TrunkCache | None = None,
        own_weights: bool = False,
    ) -> None:
        super().__init__(tokeniser, reasoner)
        assert trunk is None or trunk.dtype == compute_dtype, (trunk.dtype, compute_dtype)
        self.model = model
        self.compute_dtype = compute_dtype
        self.max_batch_tokens = (
            max_batch_tokens or _BATCH_TOKENS[next(model.parameters()).device.type]
        )
        self.trunk = trunk
        self.heads = HeadCache()
        self._trainer_lock = lock or threading.RLock()
        alone = own_weights and trunk is None
        self._lock = threading.RLock() if alone else self._trainer_lock
        self._own_weights = own_weights
        self._thread = thread_pool(1, "llm-transformers")
        self._closed = False

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or next(self.model.parameters()).dtype

    @property
    def answers_apart(self) -> bool:
        return self._own_weights

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in the engine's thread, under the lock, without gradients.

        Raises:
            LLMEngineDead: the engine was closed.
            LLMEngineError: there was not enough memory.
        """
        if self._closed:
            raise LLMEngineDead("the transformers engine was closed")

        def guarded() -> T:
            started = time.perf_counter()
            device = next(self.model.parameters()).device
            with self._lock, torch.no_grad(), computing(device, self.compute_dtype):
                was_training = self.model.training
                if was_training:
                    self.model.eval()
                try:
                    return work()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise LLMEngineError(f"out of memory: {error}") from None
                finally:
                    if was_training:
                        self.model.train()
                    self.counters["busy_ms"] += int(1000 * (time.perf_counter() - started))

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    async def _score_tokens(
        self, requests: list[TokenisedRequest]
    ) -> tuple[list[TokenLogprobs], int]:
        return await self._in_thread(lambda: (self._score_now(requests), self.weights_version))

    def _score_now(self, requests: Sequence[TokenisedRequest]) -> list[TokenLogprobs]:
        """Batch by batch; one that does not fit into memory is split in halves."""
        items = prepare(requests)
        answers: list[TokenLogprobs] = [()] * len(items)
        left = plan_batches(items, self.max_batch_tokens)[::-1]
        while left:
            batch = left.pop()
            scored = self._forward([items[i] for i in batch])
            if scored is None:
                if len(batch) == 1:
                    tokens = items[batch[0]].request.num_prompt_tokens
                    raise LLMEngineError(f"no memory for a single state of {tokens} tokens")
                half = len(batch) // 2
                left += [batch[half:], batch[:half]]
                self.counters["oom_splits"] += 1
                continue
            for i, answer in zip(batch, scored, strict=True):
                answers[i] = answer
        return answers

    def _forward(self, items: list[TreeItem]) -> list[TokenLogprobs] | None:
        """One batch; None where there is not enough memory for it."""
        try:
            way = choose_way(self.model, items)
            flats = tree_logprobs(self.model, items, heads=self.heads, trunk=self.trunk, way=way)
            parts = [split_actions(f.cpu(), i.request) for f, i in zip(flats, items, strict=True)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            parts = None
        if parts is None:
            # Only here, when the error and the tensors its frames held are gone.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None

        self.counters["forwards"] += 1
        self.counters["tokens"] += sum(item.num_tokens for item in items)
        self.counters["plain_states"] += len(items) if way == "plain" else 0
        return [tuple(tuple(action.tolist()) for action in state) for state in parts]

    async def _generate_tokens(
        self,
        prompts: list[Ids],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        seed: int | None,
    ) -> list[Generated]:
        def work() -> list[Generated]:
            written: list[Generated] = []
            longest = max(len(p) for p in prompts) + max_new_tokens
            together = max(1, self.max_batch_tokens // longest)
            for start in range(0, len(prompts), together):
                chunk = prompts[start : start + together]
                chunk_seed = None if seed is None else seed + start
                written += self._sample(chunk, max_new_tokens, temperature, stop, chunk_seed)
            return written

        return await self._in_thread(work)

    def _sample(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        seed: int | None,
    ) -> list[Generated]:
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
        cache, step_ids = DynamicCache(config=causal_lm.config), ids
        positions = (mask.cumsum(-1) - 1).clamp(min=0)

        written: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            out = causal_lm(
                input_ids=step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = out.logits[:, -1].float()
            if temperature > 0:
                chances = (logits / temperature).softmax(-1)
                tokens = torch.multinomial(chances, 1, generator=generator)
            else:
                tokens = logits.argmax(-1, keepdim=True)
            values = logits.log_softmax(-1).gather(-1, tokens)[:, 0].tolist()

            for i in sorted(unfinished):
                token = int(tokens[i])
                if token in self.tokeniser.end_ids:
                    unfinished.discard(i)
                    continue
                written[i].append(token)
                logprobs[i].append(values[i])
                if stop and any(s in self.tokeniser.decode(written[i]) for s in stop):
                    unfinished.discard(i)
            if not unfinished:
                break
            step_ids, positions = tokens, positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], -1)
        return [Generated(tuple(w), tuple(p)) for w, p in zip(written, logprobs, strict=True)]

    async def push_weights(self, weights: Weights, version: int) -> dict[str, float]:
        """Take over `weights`: nothing moves when the object is shared, else they are copied.

        A copy that computes in 16 bits keeps adapters unmerged, as the trainer does; merging would
        round a part of them away.
        """

        def work() -> int:
            shared = weights.module is not None and (
                base_model(weights.module) is base_model(self.model)
            )
            moved = 0
            if not shared:
                with self._trainer_lock:
                    moved = weights.copy_into(self.model, merge=self.dtype == torch.float32)
            self.heads.clear()
            self.weights_version = version
            return moved

        started = time.perf_counter()
        moved = await self._in_thread(work)
        return {"seconds": time.perf_counter() - started, "bytes": float(moved)}

    async def close(self) -> None:
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def stats(self) -> dict[str, float]:
        return super().stats() | self.heads.stats()

    def reset_stats(self) -> None:
        super().reset_stats()
        self.heads.reset_stats()
