"""The ways `benchmarks.prior` compares. Each is timed on states it has not seen, after as many
others to warm up (the slow ways: after one action), so that kernels and memory of that size are
ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.common import synchronize
from benchmarks.prior_states import BenchmarkModel, Inputs
from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.engines.cached import CachedEngine
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.module import store_layers_in
from priorzero.settings.llm import VLLMSettings
from priorzero.types import ActionScores, TokenisedRequest

logger = logging.getLogger("priorzero.benchmarks.prior")

USUAL = ("per_action", "vllm_per_action", "trie", "shared", "shared_pure", "cached")
FORCED = {f"shared_{way}": way for way in ("packed", "padded", "two_pass")}
METHODS = (*USUAL, *FORCED)
Totals = list[list[float]]  # per state, per action: summed log-probability
Point = tuple[str, int, int, int]


@dataclass
class Measurement:
    """One way at one point. `difference` from the float32 reference, None where it was not
    compared; no `totals` where the states are not those of the reference.
    """

    states_per_second: float
    states: int
    totals: Totals
    difference: float | None = None


async def measure(
    args, bench: BenchmarkModel, inputs: dict[Point, Inputs], say: Callable[[str], None]
) -> tuple[dict[Point, dict[str, Measurement]], dict[str, str]]:
    """All chosen ways at all points; an engine is started once and closed before the next one
    starts.

    Returns the measurements, and the reason where vLLM could not be had or died: what was measured
    then still stands.
    """
    failed: dict[str, str] = {}
    results: dict[Point, dict[str, Measurement]] = {point: {} for point in inputs}

    def keep(point: Point, name: str, measurement: Measurement) -> None:
        results[point][name] = measurement
        say(
            f"{point[0]:14}{point[1]:6} tokens {point[2]:3} actions {point[3]:3} states  {name:16}"
            f"{measurement.states_per_second:10.3f} states/s ({measurement.states} timed)"
        )

    base = next(iter(inputs))
    # First, so that the float32 copy is gone before an engine asks for memory.
    expected = reference(bench, inputs[base].states[: args.reference_states])
    if expected:
        say(f"float32 reference of {len(expected)} states computed")
    if "per_action" in args.methods:
        for point, data in inputs.items():
            keep(point, "per_action", per_action(bench, data, args.seconds))
    if {"shared", "shared_pure", "cached", *FORCED} & set(args.methods):
        await _transformers_ways(args, bench, inputs, keep)
    if {"trie", "vllm_per_action"} & set(args.methods):
        try:
            await _vllm_ways(args, bench, inputs, keep)
        except LLMEngineError as error:
            failed["vllm"] = str(error)
            logger.error("vLLM's ways are not measured (further): %s", error)
    compare(results[base], expected)
    return results, failed


def per_action(bench: BenchmarkModel, data: Inputs, seconds: float) -> Measurement:
    """The usual way in transformers: a full forward of prompt and action for each action."""
    forward_per_action(bench, bench.model, data.warm_up[0], 1)
    totals: Totals = []
    synchronize()
    started = time.perf_counter()
    for request in data.states:
        totals.append(forward_per_action(bench, bench.model, request))
        if time.perf_counter() - started > seconds:
            break
    return Measurement(len(totals) / (time.perf_counter() - started), len(totals), totals)


@torch.no_grad()
def forward_per_action(
    bench: BenchmarkModel,
    model: torch.nn.Module,
    request: TokenisedRequest,
    limit: int | None = None,
) -> list[float]:
    """Summed log-probability of each of the first `limit` actions."""
    device = next(model.parameters()).device
    totals = []
    for action in request.action_ids[:limit]:
        ids = torch.tensor([request.prompt_ids + action], device=device)
        # Logits for the action's tokens only; all of them would make this baseline look slower than
        # it must be.
        logits = model(ids, logits_to_keep=len(action) + 1).logits[0, :-1].float().log_softmax(-1)
        totals.append(float(logits.gather(1, torch.tensor(action, device=device)[:, None]).sum()))
    return totals


def reference(bench: BenchmarkModel, requests: Sequence[TokenisedRequest]) -> Totals:
    """float32, one forward per action."""
    model = bench.model
    if requests and next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model).float()
    return [forward_per_action(bench, model, request) for request in requests]


def compare(results: dict[str, Measurement], expected: Totals) -> None:
    """Fill in `difference` for every way that scored a state of the reference."""
    for measurement in results.values():
        pairs = [
            (x, y)
            for got, want in zip(measurement.totals, expected, strict=False)
            for x, y in zip(got, want, strict=True)
        ]
        measurement.difference = max((abs(x - y) for x, y in pairs), default=None)


async def timed(work: Callable[[], Awaitable[Sequence[ActionScores]]]) -> Measurement:
    synchronize()
    started = time.perf_counter()
    scores = await work()
    synchronize()
    seconds = time.perf_counter() - started
    return Measurement(len(scores) / seconds, len(scores), [s.totals() for s in scores])


async def _transformers_ways(
    args, bench: BenchmarkModel, inputs: dict[Point, Inputs], keep
) -> None:
    dtype = next(bench.model.parameters()).dtype
    names = [m for m in ("shared", "cached", *FORCED) if m in args.methods]
    if names:
        model = bench.model
        if dtype != torch.float32:
            model = copy.deepcopy(model).float()
            store_layers_in(model, dtype)
        compute = None if dtype == torch.float32 else dtype
        usual = [name for name in names if name not in FORCED]
        if usual:
            await _time_engine(_engine(args, bench, model, compute), usual, inputs, keep)
        for name in FORCED.keys() & set(names):
            with _forced(FORCED[name]):
                await _time_engine(_engine(args, bench, model, compute), [name], inputs, keep)
        del model
    if "shared_pure" in args.methods and dtype != torch.float32:
        engine = _engine(args, bench, bench.model, None)
        await _time_engine(engine, ["shared_pure"], inputs, keep)


def _engine(args, bench: BenchmarkModel, model, compute_dtype) -> CachedEngine:
    inner = TransformersEngine(
        model,
        bench.tokeniser,
        max_batch_tokens=args.max_batch_tokens,
        compute_dtype=compute_dtype,
    )
    return CachedEngine(inner, capacity=20_000)


@contextlib.contextmanager
def _forced(way: str):
    """Let all batches be computed this way for a while."""
    from priorzero.llm.engines import transformers_engine

    choose = transformers_engine.choose_way
    transformers_engine.choose_way = lambda model, items: way
    try:
        yield
    finally:
        transformers_engine.choose_way = choose


async def _time_engine(
    engine: CachedEngine, names: list[str], inputs: dict[Point, Inputs], keep
) -> None:
    try:
        for point, data in inputs.items():
            await engine.inner.score(data.warm_up)
            first = await timed(lambda data=data: engine.score(data.states))
            if names[0] != "cached":
                keep(point, names[0], first)
            if "cached" in names:
                keep(point, "cached", await timed(lambda data=data: engine.score(data.states)))
    finally:
        await engine.close()


async def _vllm_ways(args, bench: BenchmarkModel, inputs: dict[Point, Inputs], keep) -> None:
    from priorzero.llm.engines.vllm_engine import VLLMEngine

    model = next(bench.model.parameters())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # vLLM counts memory that torch keeps for itself as taken
    longest = max(p[1] for p in inputs) + 64
    settings = VLLMSettings(
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=longest,
        gpu_memory_utilization=args.gpu_memory,
        enforce_eager=True if args.enforce_eager else None,
    )
    engine = await VLLMEngine.start(
        bench.resolved, settings, tokeniser=bench.tokeniser, device=model.device
    )
    try:
        for point, data in inputs.items():
            if "trie" in args.methods:
                await engine.score(data.warm_up)
                keep(point, "trie", await timed(lambda data=data: engine.score(data.states)))
                keep(point, "trie_again", await timed(lambda data=data: engine.score(data.states)))
            if "vllm_per_action" in args.methods:
                keep(point, "vllm_per_action", await vllm_per_action(engine, data, args.seconds))
    finally:
        await engine.close()
        gc.collect()


async def vllm_per_action(engine: LLMEngine, data: Inputs, seconds: float) -> Measurement:
    """The usual way in vLLM: one request per action that asks for the log-probabilities of its
    prompt.

    All actions of as many states as are asked at once go in together, so that vLLM may batch them
    as it likes.
    """
    await _prompt_logprobs(engine, data.warm_up[0], 1)
    totals: Totals = []
    synchronize()
    started = time.perf_counter()
    first = await _prompt_logprobs(engine, data.states[0])
    totals.append(first)
    if time.perf_counter() - started < seconds:
        # Together from the second state on, if the first one says that they can be afforded.
        rest = data.states[1 : 1 + max(0, int(seconds / (time.perf_counter() - started)))]
        totals += await asyncio.gather(*(_prompt_logprobs(engine, request) for request in rest))
    return Measurement(len(totals) / (time.perf_counter() - started), len(totals), totals)


async def _prompt_logprobs(
    engine: LLMEngine, request: TokenisedRequest, limit: int | None = None
) -> list[float]:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    async def one(action: tuple[int, ...]) -> float:
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = None
        # The engine of a run has no such method, and should not get one: this is what it replaces.
        prompt = tokens_input(list(request.prompt_ids + action))
        async for output in engine._engine.generate(prompt, params, uuid.uuid4().hex):
            final = output
        rows = final.prompt_logprobs[-len(action) :]
        return sum(row[token].logprob for row, token in zip(rows, action, strict=True))

    return list(await asyncio.gather(*(one(a) for a in request.action_ids[:limit])))
