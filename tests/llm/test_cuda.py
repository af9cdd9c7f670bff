"""What only a GPU can show; skipped without one. On a GPU host: pytest tests/llm/test_cuda.py
(about two minutes).
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util

import pytest
import torch

from priorzero.llm.engines.choice import create_engine
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.scoring.forward import TWO_PASS_TOKENS, prepare, tree_logprobs
from priorzero.llm.scoring.requests import ScoreRequest, TextTokeniser
from priorzero.llm.update.trainers.builtin import (
    LLMTrainer,
    LLMTrainerSettings,
    LoraSettings,
    SFTSample,
)
from priorzero.llm.weights.canary import push_and_verify
from priorzero.settings.engine_old import EngineSettings, VLLMSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)


@pytest.fixture
def requests() -> list[ScoreRequest]:
    rooms = [
        f" You are in room {i}, where a {noun} lies."
        for i, noun in enumerate("lamp rope box key egg".split())
    ]
    return [
        ScoreRequest(
            "You play.",
            "".join(rooms[: n + 1]) + " Now?",
            ("go", "go on", "take lamp", "look"),
            " ",
        )
        for n in range(5)
    ]


@pytest.fixture
def long_requests(requests) -> list[ScoreRequest]:
    """One story that grows from step to step, longer than what one pass takes."""
    story = " ".join(r.body for r in requests)
    return [
        ScoreRequest(r.head, story * (12 + n), r.actions, r.action_prefix)
        for n, r in enumerate(requests[:3])
    ]


@pytest.mark.parametrize("way", ["packed", "padded", "two_passes"])
def test_all_ways_equal_the_cpu(way, smollm, requests):
    model, tokenizer, _ = smollm
    items = prepare(TextTokeniser(tokenizer, 2048).tokenise_all(requests))
    with torch.no_grad():
        expected = tree_logprobs(model, items)
        got = tree_logprobs(copy.deepcopy(model).cuda(), items, way=way)
    for a, b in zip(got, expected, strict=True):
        assert a.tolist() == pytest.approx(b.tolist(), abs=2e-3)


def test_grown_prompts_equal_fresh_ones(smollm, long_requests):
    model, tokenizer, _ = smollm
    model, text = copy.deepcopy(model).cuda(), TextTokeniser(tokenizer, 8192)
    assert text.tokenise(long_requests[0]).num_prompt_tokens > TWO_PASS_TOKENS

    async def run() -> None:
        growing = TransformersEngine(model, text, max_batch_tokens=32768, prefix_cache_mib=1024)
        fresh = TransformersEngine(model, text, max_batch_tokens=32768)
        for request in long_requests:
            got, want = (await growing.score([request]))[0], (await fresh.score([request]))[0]
            assert got.totals() == pytest.approx(want.totals(), abs=5e-3)
        assert growing.stats()["prefix_tokens"] > 2 * TWO_PASS_TOKENS
        assert growing.counters["tokens"] < 0.7 * fresh.counters["tokens"]
        await growing.close()
        await fresh.close()

    asyncio.run(run())


def test_bfloat16_stays_near_float32(smollm, requests, long_requests):
    model, tokenizer, _ = smollm
    model, text = copy.deepcopy(model).cuda(), TextTokeniser(tokenizer, 8192)

    async def run() -> None:
        exact, rounded = (
            TransformersEngine(model, text),
            TransformersEngine(model, text, compute_dtype=torch.bfloat16),
        )
        for asked in (requests, long_requests):
            for got, want in zip(await rounded.score(asked), await exact.score(asked), strict=True):
                assert got.totals() == pytest.approx(want.totals(), abs=0.3)

    asyncio.run(run())


def _settings(**vllm) -> EngineSettings:
    return EngineSettings(
        kind="vllm",
        required=True,
        cache_size=0,
        vllm=VLLMSettings(max_model_len=1024, enforce_eager=True, **vllm),
    )


@needs_vllm
def test_sleeping_engine_leaves_its_memory_to_the_trainer(smollm, requests):
    """Asleep it holds next to nothing, the trainer trains there, and awake it answers with the
    pushed weights.
    """
    model, tokenizer, resolved = smollm

    def free_gib() -> float:
        return torch.cuda.mem_get_info()[0] / 2**30

    async def run() -> None:
        trainer = LLMTrainer(
            copy.deepcopy(model).cuda(),
            tokenizer,
            LLMTrainerSettings(learning_rate=1e-4, compute_dtype="float32"),
        )
        before = free_gib()
        engine = await create_engine(
            _settings(dtype="float32", gpu_memory_utilization=0.6, sleep_mode=True),
            resolved,
            text=trainer.text,
            lock=trainer.lock,
            device="cuda",
        )
        try:
            awake = free_gib()
            assert before - awake > 30
            await engine.sleep()
            asleep = free_gib()
            print(
                f"free GiB: {before:.1f} before vLLM, {awake:.1f} with it, {asleep:.1f} while it sleeps"
            )
            assert before - asleep < 5
            room = torch.empty(
                int((asleep - awake) * 0.8 * 2**30), dtype=torch.uint8, device="cuda"
            )
            trainer.sft_update([SFTSample(r, (1.0, 0.0, 0.0, 0.0)) for r in requests])
            del room
            torch.cuda.empty_cache()
            await engine.wake()
            report = await push_and_verify(engine, trainer, requests[0])
            assert report["canary_diff"] < 0.02
            for got, want in zip(
                await engine.score(requests), trainer.score(requests), strict=True
            ):
                assert got.totals() == pytest.approx(want.totals(), abs=0.05)
        finally:
            await engine.close()

    asyncio.run(run())


@needs_vllm
def test_adapters_are_hot_loaded_and_survive_sleep(smollm, requests):
    model, tokenizer, resolved = smollm

    async def run() -> None:
        trainer = LLMTrainer(
            copy.deepcopy(model).cuda(),
            tokenizer,
            LLMTrainerSettings(learning_rate=2e-3, lora=LoraSettings(rank=8)),
        )
        engine = await create_engine(
            _settings(gpu_memory_utilization=0.4, sleep_mode=True),
            resolved,
            text=trainer.text,
            lock=trainer.lock,
            device="cuda",
            lora_rank=8,
        )
        try:
            before = await engine.score(requests)
            for target in ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)):
                await engine.sleep()
                trainer.sft_update([SFTSample(r, target) for r in requests])
                await engine.wake()
                report = await push_and_verify(engine, trainer, requests[0])
                print("push", {k: round(v, 4) for k, v in report.items()})
                after = await engine.score(requests)
                moved = max(
                    abs(a - b)
                    for x, y in zip(after, before, strict=True)
                    for a, b in zip(x.totals(), y.totals(), strict=True)
                )
                assert moved > 2
                before = after
            assert engine.stats()["adapter_pushes"] == 2
        finally:
            await engine.close()

    asyncio.run(run())


@needs_vllm
def test_auto_measures_both_engines(smollm, requests, caplog):
    _, tokenizer, resolved = smollm
    caplog.set_level("INFO")

    async def run() -> None:
        settings = EngineSettings(
            kind="auto",
            max_batch_tokens=32768,
            vllm=VLLMSettings(max_model_len=2048, enforce_eager=True, gpu_memory_utilization=0.4),
        )
        engine = await create_engine(
            settings, resolved, text=TextTokeniser(tokenizer, 2048), device="cuda"
        )
        try:
            assert (
                engine.name in ("transformers", "vllm") and engine.stats()["engine_fallbacks"] == 0
            )
            assert len(await engine.score(requests)) == len(requests)
        finally:
            await engine.close()

    asyncio.run(run())
    chosen = [r.getMessage() for r in caplog.records if "it was faster just now" in r.getMessage()]
    assert len(chosen) == 1
    print(chosen[0])
