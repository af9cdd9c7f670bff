"""The vLLM engine: in-process `AsyncLLM`, trie scoring with prefix caching, weights pushed without
a restart.

Written for vLLM 0.26 (CUDA) and 0.32 (CPU); what each does wrong is said where we work around it.
One state costs one request per trie row: the prompt and the row's path, one greedy token, and the
log-probabilities of exactly the row's children (``logprob_token_ids``). The prefix cache makes the
prompt be computed once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from priorzero.llm.engines.base import LLMEngine, LLMEngineDead, LLMEngineError, TokenLogprobs
from priorzero.llm.engines.vllm_adapters import AdapterSlot, hot_load_rank, refusal
from priorzero.llm.engines.vllm_worker import TRAINER_PID
from priorzero.llm.model import ResolvedModel, pick_dtype
from priorzero.llm.scoring.requests import (
    PromptTooLongError,
    TextTokeniser,
    TokenisedRequest,
    model_max_tokens,
)
from priorzero.llm.scoring.trie import build_trie
from priorzero.llm.weights.export import Weights
from priorzero.settings.engine_old import EngineSettings
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_LOGPROB_IDS = 128  # vLLM's hard limit on logprob_token_ids
_CPU_BLOCK = (
    32  # smallest block of vLLM's CPU attention; small blocks waste least at the prompt's end
)
_HEAD_ERROR_LIMIT = 1e-6  # the comparison is exact
_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}


class _Gate:
    """Many requests at a time, or one change of weights: no answer may mix two versions."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.asynccontextmanager
    async def request(self):
        async with self._condition:
            await self._condition.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            async with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextlib.asynccontextmanager
    async def change(self):
        async with self._condition:
            await self._condition.wait_for(lambda: not self._closed)
            self._closed = True
            await self._condition.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            async with self._condition:
                self._closed = False
                self._condition.notify_all()


class VLLMEngine(LLMEngine):
    """LLM engine on vLLM. Make it with `start`."""

    name = "vllm"

    def __init__(
        self,
        engine,
        text: TextTokeniser,
        settings: EngineSettings,
        dtype: torch.dtype,
        max_len: int,
        lock: threading.RLock | None,
        adapter_rank: int = 0,
    ) -> None:
        super().__init__(text, settings.reasoning)
        self._engine = engine
        self._settings = settings.vllm
        self._dtype = dtype
        self._max_len = max_len
        self._lock = lock or threading.RLock()
        self._gate = _Gate()
        self._adapters = AdapterSlot(adapter_rank)
        self._processes: list[psutil.Process] = []
        self._closed = False

    @classmethod
    async def start(
        cls,
        resolved: ResolvedModel,
        settings: EngineSettings,
        *,
        text: TextTokeniser | None = None,
        lock: threading.RLock | None = None,
        device: torch.device | None = None,
        lora_rank: int = 0,
    ) -> VLLMEngine:
        """Start vLLM without blocking the loop (10 to 20 s on a CPU, 60 to 100 s with CUDA graphs).

        The main module must be guarded by ``if __name__ == "__main__"``: vLLM spawns processes that
        import it.

        :param lora_rank: of the adapters that will be pushed; 0: full weights will be.
        :raises LLMEngineError: vLLM cannot be imported or does not start.
        :raises PriorZeroError: adapters of that rank cannot be hot-loaded, and the setting asks for
            it.
        """
        device = device or torch.device("cpu")
        dtype = pick_dtype(settings.vllm.dtype, device)
        adapter_rank = hot_load_rank(settings.vllm.lora, lora_rank, device, dtype)
        started = time.perf_counter()
        try:
            starting = asyncio.to_thread(
                _build, resolved, settings, device, dtype, text, adapter_rank
            )
            built = await asyncio.wait_for(starting, settings.vllm.start_timeout_s)
            # Taken out of the thread's result, which outlives this call: AsyncLLM must end when we
            # let it go, because its finaliser fails at the interpreter's exit.
            engine, text, max_len = built.pop(), built.pop(), built.pop()
        except PriorZeroError:
            raise
        except (
            Exception
        ) as error:  # anything may go wrong in there; the caller falls back or reports
            raise LLMEngineDead(f"vLLM did not start ({type(error).__name__}: {error})") from error
        self = cls(engine, text, settings, dtype, max_len, lock, adapter_rank)
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
    def prompt_alignment(self) -> int:
        """The cache's block: tokens after the prompt's last full block are computed again for every
        trie row.
        """
        return self._settings.block_size or (_CPU_BLOCK if not torch.cuda.is_available() else 16)

    @property
    def process_ids(self) -> list[int]:
        """Processes of the engine that are still alive."""
        return [
            p.pid for p in self._processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        ]

    async def _guard(self, work: Awaitable[T], limit_s: float) -> T:
        """Await ``work`` with a time limit, and notice a dead engine: a pending RPC of a killed one
        never returns.
        """
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
                tokens_input(ids), params, uuid.uuid4().hex, lora_request=self._adapters.request
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
            mend = "Shorten the prompt or raise max_model_len"
            raise PriorZeroError(f"vLLM refuses a request: {error}. {mend}") from error
        except LLMEngineError:
            raise
        except (
            Exception
        ) as error:  # one failed request (EngineGenerateError and kin); the caller retries
            raise LLMEngineError(
                f"a vLLM request failed ({type(error).__name__}: {error})"
            ) from error
        if output is None or not output.outputs:
            raise LLMEngineError("vLLM ended a request without an output")
        return output.outputs[0]

    async def _all(self, work: list[Awaitable[T]]) -> list[T]:
        """Results in order. The first failure cancels the rest, so nothing half done is left in the
        engine.
        """
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
        for request in requests:
            needed = request.num_prompt_tokens + max(len(a) for a in request.action_ids)
            if needed > self._max_len:
                raise PromptTooLongError(
                    f"prompt and action take {needed} tokens, vLLM was started for {self._max_len}; drop the oldest "
                    "history first, or raise max_model_len"
                )
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
        """Log-probability of each child token after ``ids``."""
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
        row = output.logprobs[0] if output.logprobs else {}
        missing = [c for c in children if c not in row]
        if missing:
            raise LLMEngineError(
                f"vLLM left out {len(missing)} of {len(children)} log-probabilities"
            )
        return {c: row[c].logprob for c in children}

    async def _generate_tokens(
        self,
        prompts: list[tuple[int, ...]],
        max_new_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        seed: int | None,
    ) -> list[str]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def params(index: int) -> SamplingParams:
            return SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                stop=list(stop) or None,
                include_stop_str_in_output=True,
                seed=None if seed is None else seed + index,
                stop_token_ids=[self.text.terminator_id],
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        async with self._gate.request():
            outputs = await self._all(
                [self._ask(list(p), params(i)) for i, p in enumerate(prompts)]
            )
        return [output.text for output in outputs]

    async def push_weights(self, weights: Weights, version: int) -> dict[str, float]:
        """Answer with ``model``'s weights: with its adapters alone where vLLM was started for them,
        else with all of them, adapters merged. They pass through shared memory.

        :raises LLMEngineDead: any step failed. The engine may then hold a mixture, so only a
            restart is safe.
        :raises PriorZeroError: vLLM has no place for these adapters.
        """
        started = time.perf_counter()
        alone = self._adapters.takes(weights.module)
        transit = _weights_folder()
        folder = transit / f"v{version}"  # a new path each time: vLLM has had caches keyed by it
        try:
            async with self._gate.change():
                report = await (self._push_adapter if alone else self._push_all)(
                    weights, version, folder
                )
                self.weights_version = version
        finally:
            # Adapters too are read once: vLLM keeps what it loaded until another takes its place.
            shutil.rmtree(transit, ignore_errors=True)
        self.counters["pushes"] += 1
        self.counters["adapter_pushes"] += alone
        report["seconds"] = time.perf_counter() - started
        if alone:
            logger.info(
                "vLLM hot-loaded the adapters of weights %d: %.2f MB in %.3f s",
                version,
                report["bytes"] / 1e6,
                report["seconds"],
            )
        return report

    async def _push_all(
        self, weights: Weights, version: int, folder: Path
    ) -> dict[str, float]:
        """Let the worker load all weights, and drop everything cached under old ones."""

        def save() -> tuple[int, int]:
            with self._lock:
                return weights.save(folder, self._dtype)

        size, tensors = await asyncio.to_thread(save)
        self._adapters.clear()
        load = lambda: self._engine.collective_rpc("trainer_link_load", args=(str(folder), tensors))  # noqa: E731
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

    async def _push_adapter(
        self, weights: Weights, version: int, folder: Path
    ) -> dict[str, float]:
        """Let the worker load the adapters in place of the last ones; requests name them from now
        on, and what was cached under another name is not found any more.
        """

        def save() -> tuple[int, int]:
            with self._lock:
                return weights.save_adapter(folder, self._dtype)

        size, modules = await asyncio.to_thread(save)
        request = self._adapters.next_request(version, folder)
        # At once and not with the first request that names it: a fault belongs to the push.
        arguments = (request.lora_name, request.lora_int_id, request.lora_path, modules)
        load = lambda: self._engine.collective_rpc("trainer_link_adapter", args=arguments)  # noqa: E731
        if refused := refusal(await self._control(load)):
            raise PriorZeroError(refused)
        self._adapters.request = request
        return {"bytes": float(size)}

    async def sleep(self) -> None:
        """CUDA with ``sleep_mode``: weights to host memory, keys and values dropped. Otherwise
        nothing.
        """
        if self._settings.sleep_mode and torch.cuda.is_available():
            async with self._gate.change():
                await self._control(self._engine.sleep)

    async def wake(self) -> None:
        """Undo `sleep`; push the weights afterwards if they changed."""
        if self._settings.sleep_mode and torch.cuda.is_available():
            async with self._gate.change():
                await self._control(self._engine.wake_up)

    async def close(self) -> None:
        """Stop vLLM and make sure that none of its processes is left."""
        if self._closed:
            return
        self._closed = True
        logging.getLogger("vllm").setLevel(
            logging.CRITICAL
        )  # it reports its own shutdown as a failure
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


def _weights_folder() -> Path:
    """A new folder for weights in transit, in shared memory where there is some."""
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="priorzero-weights-", dir=base))


@contextlib.contextmanager
def _environment(**values: str):
    """Set variables for the processes started inside, where the user has not set them; undone
    afterwards.
    """
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _build(
    resolved: ResolvedModel,
    settings: EngineSettings,
    device: torch.device,
    dtype: torch.dtype,
    text: TextTokeniser | None,
    adapter_rank: int,
) -> list:
    """Start `AsyncLLM` (blocking). Returns [longest sequence, tokeniser, engine]."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from transformers import AutoConfig, AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    logging.getLogger("vllm").setLevel(
        os.environ["VLLM_LOGGING_LEVEL"]
    )  # vLLM leaves it open to the root's level
    own = settings.vllm
    limit = model_max_tokens(AutoConfig.from_pretrained(resolved.path), settings.max_prompt_tokens)
    if text is None:
        text = TextTokeniser(AutoTokenizer.from_pretrained(resolved.path), limit)
    max_len = min(own.max_model_len or 8192, text.max_tokens, limit)
    cpu = device.type == "cpu"
    arguments = {
        "model": resolved.path,
        "dtype": _DTYPES[dtype],
        "max_model_len": max_len,
        "enable_prefix_caching": True,
        "enforce_eager": cpu if own.enforce_eager is None else own.enforce_eager,
        "worker_extension_cls": "priorzero.llm.engines.vllm_worker.TrainerLink",
        "disable_log_stats": True,
        "enable_log_requests": False,
        "use_tqdm_on_load": False,
    }
    if adapter_rank:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter_rank}
    if own.block_size or cpu:
        arguments["block_size"] = own.block_size or _CPU_BLOCK
    if cpu:
        arguments["kv_cache_memory_bytes"] = int(own.kv_cache_gb * 2**30)
    else:
        arguments |= {
            "gpu_memory_utilization": own.gpu_memory_utilization,
            "enable_sleep_mode": own.sleep_mode,
        }
    cores = sorted(os.sched_getaffinity(0))
    child = {TRAINER_PID: str(os.getpid())}
    if cpu:
        # One process less, and half the start time; vLLM's "auto" would keep a core for itself.
        child |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(len(cores)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        }
    with _environment(**child):
        return [max_len, text, AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))]
