"""The vLLM engine: `AsyncLLM` in this process, weights pushed without a restart.

Good at generating chains of thought, and at models that are split over several GPUs. A state is
scored with one request per row: the prompt and the row's path, one greedy token, and the
log-probabilities of exactly the row's children (`logprob_token_ids`); vLLM's prefix cache makes
the prompt be computed once.

Written for vLLM 0.26 (CUDA) and 0.32 (CPU); what each does wrong is said where we work around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from priorzero.llm.engines.base import Ids, LLMEngine, LLMEngineDead, LLMEngineError, TokenLogprobs
from priorzero.llm.engines.gate import Gate
from priorzero.llm.engines.thoughts import Generated, Reasoner
from priorzero.llm.engines.vllm_adapters import check_adapter, hot_load_rank
from priorzero.llm.engines.vllm_worker import TRAINER_PID
from priorzero.llm.model import ResolvedModel
from priorzero.llm.module import pick_dtype
from priorzero.llm.scoring.requests import Tokeniser, model_max_tokens
from priorzero.llm.scoring.trie import build_trie
from priorzero.llm.weights.export import Weights
from priorzero.llm.weights.transports import folder_in_transit
from priorzero.settings.llm import VLLMSettings
from priorzero.types import PriorZeroError, TokenisedRequest

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_LOGPROB_IDS = 128  # vLLM's hard limit on logprob_token_ids
# Smallest block of vLLM's CPU attention; small blocks waste least at the prompt's end.
_CPU_BLOCK = 32
_HEAD_ERROR_LIMIT = 1e-6  # the comparison is exact
_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}


class VLLMEngine(LLMEngine):
    """LLM engine on vLLM. Make it with `start`."""

    name = "vllm"

    def __init__(
        self,
        engine,
        tokeniser: Tokeniser,
        settings: VLLMSettings,
        dtype: torch.dtype,
        max_len: int,
        adapter_rank: int,
        reasoner: Reasoner | None,
        lock: threading.RLock | None,
    ) -> None:
        super().__init__(tokeniser, reasoner)
        self._engine = engine
        self._settings = settings
        self._dtype = dtype
        self._max_len = max_len
        self._adapter_rank = adapter_rank
        self._adapter = None  # vLLM's LoRARequest, which every request names
        self._adapter_numbers = itertools.count(1)
        self._lock = lock or threading.RLock()
        self._gate = Gate()
        self._processes: list[psutil.Process] = []
        self._closed = False

    @classmethod
    async def start(
        cls,
        resolved: ResolvedModel,
        settings: VLLMSettings,
        *,
        device: torch.device,
        tokeniser: Tokeniser | None = None,
        reasoner: Reasoner | None = None,
        lock: threading.RLock | None = None,
        lora_rank: int = 0,
    ) -> VLLMEngine:
        """Start vLLM without blocking the loop (10 to 20 s on a CPU, 60 to 100 s with CUDA graphs).

        The main module must be guarded by `if __name__ == "__main__"`: vLLM spawns processes that
        import it.

        Args:
            resolved: the model.
            settings: of vLLM.
            device: where it runs.
            tokeniser: the trainer's; None: one of its own.
            reasoner: how chains of thought are generated.
            lock: the trainer's; held while its weights are read.
            lora_rank: of the adapters that will be pushed; 0: full weights will be.

        Raises:
            LLMEngineError: vLLM cannot be imported or does not start.
            PriorZeroError: adapters of that rank cannot be pushed as the settings ask for.
        """
        dtype = pick_dtype(settings.dtype, device)
        adapter_rank = hot_load_rank(settings.lora, lora_rank, device, dtype)
        started = time.perf_counter()
        try:
            starting = asyncio.to_thread(
                _build, resolved, settings, device, dtype, tokeniser, adapter_rank
            )
            built = await asyncio.wait_for(starting, settings.start_timeout_s)
            # Taken out of the thread's result, which outlives this call: AsyncLLM must end when we
            # let it go, because its finaliser fails at the interpreter's exit.
            engine, tokeniser, max_len = built.pop(), built.pop(), built.pop()
        except PriorZeroError:
            raise
        except Exception as error:  # anything may go wrong in there; the caller falls back
            raise LLMEngineDead(f"vLLM did not start ({type(error).__name__}: {error})") from error

        self = cls(engine, tokeniser, settings, dtype, max_len, adapter_rank, reasoner, lock)
        try:
            pids = await self._control(lambda: engine.collective_rpc("trainer_link_pids"))
        except LLMEngineError:
            await self.close()
            raise
        self._processes = [psutil.Process(pid) for pid in {p for worker in pids for p in worker}]
        adapters = f", adapters up to rank {adapter_rank} are hot-loaded" if adapter_rank else ""
        logger.info(
            "vLLM started in %.1f s (%s, %s%s)",
            time.perf_counter() - started,
            device,
            _DTYPES[dtype],
            adapters,
        )
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def max_tokens(self) -> int:
        return min(self._max_len, self.tokeniser.max_tokens)

    @property
    def answers_apart(self) -> bool:
        return not self._sleeps

    @property
    def _sleeps(self) -> bool:
        return self._settings.sleep_mode and torch.cuda.is_available()

    @property
    def process_ids(self) -> list[int]:
        """Processes of the engine that are still alive."""
        return [
            p.pid for p in self._processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        ]

    async def _guard(self, work: Awaitable[T], limit_s: float) -> T:
        """Await `work` with a time limit; notice a dead engine, whose RPCs never return."""
        task = asyncio.ensure_future(work)
        deadline = time.monotonic() + limit_s
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=0.5)
                if task.done():
                    break
                if self._closed or self._engine.errored:
                    raise LLMEngineDead("the vLLM process is gone")
                if time.monotonic() > deadline:
                    raise LLMEngineError(f"vLLM did not answer within {limit_s:g} s")
            return task.result()
        finally:
            if not task.done():
                task.cancel()

    async def _control(self, call: Callable[[], Awaitable[T]]) -> T:
        """An RPC to the engine. After a failed one its state is unknown, so every fault counts as
        death.
        """
        try:
            return await self._guard(call(), self._settings.control_timeout_s)
        except LLMEngineDead:
            raise
        except Exception as error:  # vLLM turns worker exceptions into bare ones
            raise LLMEngineDead(f"a vLLM call failed ({type(error).__name__}: {error})") from error

    async def _ask(self, ids: list[int], params):
        """One request to its final output."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        async def run():
            final = None
            asked = self._engine.generate(
                tokens_input(ids), params, uuid.uuid4().hex, lora_request=self._adapter
            )
            async for output in asked:
                final = output
            return final

        if self._closed:
            raise LLMEngineDead("the vLLM engine was closed")
        try:
            output = await self._guard(run(), self._settings.request_timeout_s)
        except EngineDeadError as error:
            raise LLMEngineDead("the vLLM process died") from error
        except (ValueError, VLLMValidationError) as error:  # 0.26 raises the first, 0.32 the second
            mend = "Lower llm.prompt.max_prompt_tokens or raise llm.vllm.max_model_len"
            raise PriorZeroError(f"vLLM refuses a request: {error}. {mend}") from error
        except LLMEngineError:
            raise
        except Exception as error:  # one failed request (EngineGenerateError); the caller retries
            raise LLMEngineError(
                f"a vLLM request failed ({type(error).__name__}: {error})"
            ) from error
        if output is None or not output.outputs:
            raise LLMEngineError("vLLM ended a request without an output")
        return output.outputs[0]

    async def _all(self, work: list[Awaitable[T]]) -> list[T]:
        """Results in order. The first failure cancels the rest, so nothing half done is left."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(w) for w in work]
        except BaseExceptionGroup as errors:
            dead = errors.subgroup(LLMEngineDead)
            raise (dead or errors).exceptions[0] from errors
        return [task.result() for task in tasks]

    async def _score_tokens(
        self, requests: list[TokenisedRequest]
    ) -> tuple[list[TokenLogprobs], int]:
        async with self._gate.request():
            version = self.weights_version
            return await self._all([self._score_state(r) for r in requests]), version

    async def _score_state(self, request: TokenisedRequest) -> TokenLogprobs:
        trie = build_trie(request.action_ids)
        prompt = list(request.prompt_ids)
        asked = [
            (row, children[start : start + _MAX_LOGPROB_IDS])
            for row, children in enumerate(trie.children())
            for start in range(0, len(children), _MAX_LOGPROB_IDS)
        ]
        answers = await self._all(
            [self._score_row(prompt + trie.path(row), children) for row, children in asked]
        )
        found = {
            (row, t): v
            for (row, _), answer in zip(asked, answers, strict=True)
            for t, v in answer.items()
        }
        return tuple(tuple(found[key] for key in lookup) for lookup in trie.lookups)

    async def _score_row(self, ids: list[int], children: list[int]) -> dict[int, float]:
        """Log-probability of each child token after `ids`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=children,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.counters["vllm_requests"] += 1
        output = await self._ask(ids, params)
        found = output.logprobs[0] if output.logprobs else {}
        missing = [c for c in children if c not in found]
        if missing:
            raise LLMEngineError(
                f"vLLM left out {len(missing)} of {len(children)} log-probabilities"
            )
        return {c: found[c].logprob for c in children}

    async def _generate_tokens(
        self,
        prompts: list[Ids],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        seed: int | None,
    ) -> list[Generated]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def params(index: int) -> SamplingParams:
            return SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                stop=list(stop) or None,
                seed=None if seed is None else seed + index,
                stop_token_ids=[self.tokeniser.terminator_id],
                logprobs=0,  # of the drawn tokens alone; taken before the temperature
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        async with self._gate.request():
            outputs = await self._all(
                [self._ask(list(p), params(i)) for i, p in enumerate(prompts)]
            )
        return [self._written(output) for output in outputs]

    def _written(self, output) -> Generated:
        """Ids and log-probabilities of a final output, without the token that ends a turn."""
        ids, found = list(output.token_ids), list(output.logprobs or ())
        if len(found) != len(ids) or any(t not in of for t, of in zip(ids, found, strict=False)):
            raise LLMEngineError(f"vLLM gave {len(found)} log-probabilities of {len(ids)} tokens")
        if ids and ids[-1] in self.tokeniser.end_ids:
            ids.pop()
        logprobs = tuple(of[t].logprob for t, of in zip(ids, found, strict=False))
        return Generated(tuple(ids), logprobs)

    async def push_weights(self, weights: Weights, version: int) -> dict[str, float]:
        """Answer with `weights`: with the adapters alone where vLLM was started for them, else with
        all weights, adapters merged. They pass through shared memory.

        Raises:
            LLMEngineDead: a step failed. The engine may then hold a mixture, so only a restart is
                safe.
            PriorZeroError: vLLM cannot take these adapters.
        """
        started = time.perf_counter()
        push = self._push_adapter if self._adapter_rank else self._push_all
        with folder_in_transit(version) as folder:
            async with self._gate.change():
                report = await push(weights, version, folder)
                self.weights_version = version
        self.counters["pushes"] += 1
        self.counters["adapter_pushes"] += bool(self._adapter_rank)
        return report | {"seconds": time.perf_counter() - started}

    async def _push_all(self, weights: Weights, version: int, folder: Path) -> dict[str, float]:
        """Let the workers load all weights, and drop everything cached under old ones."""

        def save() -> tuple[int, int]:
            with self._lock:
                return weights.save(folder, self._dtype)

        size, tensors = await asyncio.to_thread(save)

        def load() -> Awaitable[list[float]]:
            return self._engine.collective_rpc("trainer_link_load", args=(str(folder), tensors))

        head_error = max(await self._control(load))
        if not head_error < _HEAD_ERROR_LIMIT:
            raise LLMEngineDead(
                f"vLLM's output head is off by {head_error:.2g} after the weights were loaded"
            )
        # Not automatic: keys and values of the old weights would answer for the new ones. False
        # means refused.
        if not await self._control(self._engine.reset_prefix_cache):
            raise LLMEngineDead("vLLM refused to reset its prefix cache after the weights changed")
        return {"bytes": float(size), "head_error": head_error}

    async def _push_adapter(self, weights: Weights, version: int, folder: Path) -> dict[str, float]:
        """Load the adapters beside the old ones, let requests name them, then drop the old ones.

        What was cached under another name is not found any more.
        """
        from vllm.lora.request import LoRARequest

        check_adapter(weights.adapter_config, self._adapter_rank)

        def save() -> tuple[int, int]:
            with self._lock:
                return weights.save_adapter(folder, self._dtype)

        size, _ = await asyncio.to_thread(save)
        # The prefix cache is keyed by the name (0.26: by nothing else), so it must be new even for
        # an old version.
        number = next(self._adapter_numbers)
        request = LoRARequest(f"v{version}.{number}", number, str(folder))
        # At once and not with the first request that names it: a fault belongs to the push.
        if not await self._control(lambda: self._engine.add_lora(request)):
            raise LLMEngineDead("vLLM did not load the trained adapters")
        self._adapter = request
        loaded = await self._control(self._engine.list_loras)
        for other in set(loaded) - {number}:
            await self._control(lambda other=other: self._engine.remove_lora(other))
        return {"bytes": float(size)}

    async def sleep(self) -> None:
        """CUDA with `sleep_mode`: weights to host memory, keys and values dropped; else nothing."""
        if self._sleeps:
            async with self._gate.change():
                await self._control(self._engine.sleep)

    async def wake(self) -> None:
        """Undo `sleep`; push the weights afterwards if they changed."""
        if self._sleeps:
            async with self._gate.change():
                await self._control(self._engine.wake_up)

    async def close(self) -> None:
        """Stop vLLM and make sure that none of its processes is left."""
        if self._closed:
            return
        self._closed = True
        # It reports its own shutdown as a failure.
        logging.getLogger("vllm").setLevel(logging.CRITICAL)
        try:
            await asyncio.to_thread(self._engine.shutdown)
        finally:
            self._engine = None
            gc.collect()
            await asyncio.to_thread(self._end_processes)

    def _end_processes(self) -> None:
        _, alive = psutil.wait_procs(self._processes, timeout=10)
        for process in alive:
            logger.warning("vLLM process %d did not end by itself and is killed", process.pid)
            self.counters["vllm_processes_killed"] += 1
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)


@contextlib.contextmanager
def _environment(**values: str):
    """Set variables for the processes started inside, where the user has not; undone afterwards."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _build(
    resolved: ResolvedModel,
    settings: VLLMSettings,
    device: torch.device,
    dtype: torch.dtype,
    tokeniser: Tokeniser | None,
    adapter_rank: int,
) -> list:
    """Start `AsyncLLM` (blocking). Returns [longest sequence, tokeniser, engine]."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from transformers import AutoConfig, AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    # vLLM leaves its logger open to the root's level.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    limit = model_max_tokens(AutoConfig.from_pretrained(resolved.path))
    if tokeniser is None:
        tokeniser = Tokeniser(AutoTokenizer.from_pretrained(resolved.path), limit)
    max_len = min(settings.max_model_len or 8192, tokeniser.max_tokens, limit)

    cpu = device.type == "cpu"
    arguments = {
        "model": resolved.path,
        "dtype": _DTYPES[dtype],
        "max_model_len": max_len,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_prefix_caching": True,
        "enforce_eager": cpu if settings.enforce_eager is None else settings.enforce_eager,
        "worker_extension_cls": "priorzero.llm.engines.vllm_worker.TrainerLink",
        "disable_log_stats": True,
        "enable_log_requests": False,
        "use_tqdm_on_load": False,
    }
    if adapter_rank:
        # Two: the next ones are loaded before the last ones go.
        arguments |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": adapter_rank}
    if settings.block_size or cpu:
        arguments["block_size"] = settings.block_size or _CPU_BLOCK
    if cpu:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gb * 2**30)
    else:
        arguments |= {
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enable_sleep_mode": settings.sleep_mode,
        }

    cores = sorted(os.sched_getaffinity(0))
    child = {TRAINER_PID: str(os.getpid())}
    if cpu and settings.tensor_parallel_size == 1:
        # One process less, and half the start time; vLLM's "auto" would keep a core for itself.
        child |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(len(cores)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        }
    with _environment(**child):
        return [max_len, tokeniser, AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))]
