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
from priorzero.llm.scoring.forward import (
    TWO_PASS_TOKENS,
    choose_way,
    computing,
    tree_logprobs,
)
from priorzero.llm.scoring.items import prepare
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.weights.publish import publish
from priorzero.settings.llm import LLMSettings, LoraSettings, PromptSettings, VLLMSettings
from priorzero.types import TokenisedRequest
from tests.llm.decisions import sample, trainer_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
ACTIONS = ("go", "go on", "take lamp", "look")


@pytest.fixture
def bodies() -> list[str]:
    rooms = [
        f" You are in room {i}, where a {noun} lies."
        for i, noun in enumerate("lamp rope box key egg".split())
    ]
    return ["".join(rooms[: n + 1]) + " Now?" for n in range(5)]


def tokenised(smollm, bodies: list[str]) -> list[TokenisedRequest]:
    tokeniser = Tokeniser(smollm[1], 8192)
    return tokeniser.requests([("You play.", b) for b in bodies], [ACTIONS] * len(bodies))


@pytest.fixture
def requests(smollm, bodies) -> list[TokenisedRequest]:
    return tokenised(smollm, bodies)


@pytest.fixture
def long_requests(smollm, bodies) -> list[TokenisedRequest]:
    """Longer than what one pass takes."""
    story = " ".join(bodies)
    return tokenised(smollm, [story * (12 + n) for n in range(3)])


@pytest.mark.parametrize("way", ["packed", "padded", "two_pass", "plain"])
def test_all_ways_equal_the_cpu(way, smollm, requests):
    model, items = smollm[0], prepare(requests)
    with torch.no_grad():
        expected = tree_logprobs(model, items)
        got = tree_logprobs(copy.deepcopy(model).cuda(), items, way=way)
    for a, b in zip(got, expected, strict=True):
        assert a.tolist() == pytest.approx(b.tolist(), abs=2e-3)


def test_long_prompts_take_two_passes(smollm, requests, long_requests):
    model = copy.deepcopy(smollm[0]).cuda()
    assert long_requests[0].num_prompt_tokens > TWO_PASS_TOKENS
    assert choose_way(model, prepare(requests)) == "padded"
    assert choose_way(model, prepare(long_requests)) == "two_pass"


def test_checkpointing_gives_the_same_gradients_from_less_memory(smollm, long_requests):
    """Long prompts, which take two passes without it, in the number format of a run."""
    model, items = copy.deepcopy(smollm[0]).cuda(), prepare(long_requests)
    trained = [p for p in model.parameters() if p.requires_grad]
    found, peaks = [], []
    for on in (False, True):
        for _ in range(2):  # the first looks at each way once
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with computing(torch.device("cuda"), torch.bfloat16):
                flat = torch.cat(tree_logprobs(model, items, checkpointing=on))
            gradients = torch.autograd.grad(flat.sum(), trained)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append(torch.cat([g.flatten().double() for g in gradients]))
        del flat, gradients
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.99
    assert float(found[0].norm()) == pytest.approx(float(found[1].norm()), rel=0.05)
    assert peaks[1] < 0.5 * peaks[0], peaks


def test_bfloat16_stays_near_float32(smollm, requests, long_requests):
    model, tokenizer, _ = smollm
    model, tokeniser = copy.deepcopy(model).cuda(), Tokeniser(tokenizer, 8192)

    async def run() -> None:
        exact = TransformersEngine(model, tokeniser)
        rounded = TransformersEngine(model, tokeniser, compute_dtype=torch.bfloat16)
        for asked in (requests, long_requests):
            for got, want in zip(await rounded.score(asked), await exact.score(asked), strict=True):
                assert got.totals() == pytest.approx(want.totals(), abs=0.3)
        assert rounded.stats()["plain_states"] == 0

    asyncio.run(run())


def test_a_batch_too_large_for_the_gpu_is_split(smollm, long_requests):
    """Real memory runs out: a process may take little more than the model."""
    model, tokeniser = copy.deepcopy(smollm[0]).cuda(), Tokeniser(smollm[1], 8192)
    expected = asyncio.run(TransformersEngine(model, tokeniser).score(long_requests))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    room = torch.cuda.memory_allocated() + 1500 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        engine = TransformersEngine(model, tokeniser, max_batch_tokens=10**6)
        asked = [long_requests[i % 3].with_thought((5 + i,)) for i in range(24)]
        answers = asyncio.run(engine.score(asked + long_requests))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.stats()["oom_splits"] > 0
    for got, want in zip(answers[24:], expected, strict=True):
        assert got.totals() == pytest.approx(want.totals(), abs=0.01)


def _settings(lora: LoraSettings | None = None, **vllm) -> LLMSettings:
    return LLMSettings(
        engine="vllm",
        required=True,
        score_cache_size=0,
        lora=lora or LoraSettings(),
        vllm=VLLMSettings(max_model_len=1024, enforce_eager=True, **vllm),
    )


async def _start(settings: LLMSettings, smollm, trainer):
    return await create_engine(
        settings,
        smollm[2],
        device="cuda",
        marker="Action:",
        seed=0,
        tokeniser=Tokeniser(smollm[1], 2048),
        lock=trainer.lock,
    )


def test_the_engine_of_a_run_follows_its_adapters(smollm, requests):
    """As settings have it here: a copy that is bfloat16 throughout, and what the trainer adds."""
    lora = LoraSettings(enable=True, rank=8, alpha=16)

    async def run() -> None:
        trainer = trainer_of(
            copy.deepcopy(smollm[0]).cuda(), lora=lora, learning_rate=2e-3, dtype="auto"
        )
        engine = await _start(LLMSettings(lora=lora, score_cache_size=0), smollm, trainer)
        assert engine.name == "transformers" and engine.answers_apart
        before = [a.totals() for a in await engine.score(requests)]
        target = (1.0, 0.0, 0.0, 0.0)
        for _ in range(2):
            trainer.update({"sft": [sample(r, target_policy=target) for r in requests]})
            await publish(engine, trainer, requests[0])
        for got, want, old in zip(
            await engine.score(requests), trainer.score(requests), before, strict=True
        ):
            assert got.totals() == pytest.approx(want.totals(), abs=0.6)
            assert max(abs(a - b) for a, b in zip(got.totals(), old, strict=True)) > 2
        await engine.close()

    asyncio.run(run())


@needs_vllm
def test_sleeping_engine_leaves_its_memory_to_the_trainer(smollm, requests):
    """Asleep it holds next to nothing, the trainer trains there, and awake it answers with the
    pushed weights.
    """

    def free_gib() -> float:
        return torch.cuda.mem_get_info()[0] / 2**30

    async def run() -> None:
        trainer = trainer_of(copy.deepcopy(smollm[0]).cuda(), learning_rate=1e-4, dtype="float32")
        before = free_gib()
        settings = _settings(dtype="float32", gpu_memory_utilization=0.6, sleep_mode=True)
        engine = await _start(settings, smollm, trainer)
        try:
            awake = free_gib()
            assert before - awake > 30
            await engine.sleep()
            asleep = free_gib()
            assert before - asleep < 5
            room = torch.empty(
                int((asleep - awake) * 0.8 * 2**30), dtype=torch.uint8, device="cuda"
            )
            target = (1.0, 0.0, 0.0, 0.0)
            trainer.update({"sft": [sample(r, target_policy=target) for r in requests]})
            del room
            torch.cuda.empty_cache()
            await engine.wake()
            report = await publish(engine, trainer, requests[0])
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
    lora = LoraSettings(enable=True, rank=8, alpha=16)

    async def run() -> None:
        trainer = trainer_of(
            copy.deepcopy(smollm[0]).cuda(), lora=lora, learning_rate=2e-3, dtype="bfloat16"
        )
        settings = _settings(lora, gpu_memory_utilization=0.4, sleep_mode=True)
        engine = await _start(settings, smollm, trainer)
        try:
            before = await engine.score(requests)
            for target in ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)):
                await engine.sleep()
                trainer.update({"sft": [sample(r, target_policy=target) for r in requests]})
                await engine.wake()
                await publish(engine, trainer, requests[0])
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
def test_chains_of_thought_get_vllm(smollm, requests, caplog):
    caplog.set_level("INFO")

    async def run() -> None:
        settings = LLMSettings(
            prompt=PromptSettings(use_cot=True),
            vllm=VLLMSettings(max_model_len=2048, enforce_eager=True, gpu_memory_utilization=0.4),
        )
        trainer = trainer_of(copy.deepcopy(smollm[0]).cuda())
        engine = await _start(settings, smollm, trainer)
        try:
            assert engine.name == "vllm" and engine.stats()["engine_fallbacks"] == 0
            asked = [TokenisedRequest(r.head_ids, r.body_ids, r.action_ids, True) for r in requests]
            answers = await engine.score(asked)
            assert all(a.thought_ids and len(a.token_logprobs) == 4 for a in answers)
        finally:
            await engine.close()

    asyncio.run(run())
    assert "vllm, because chains of thought" in caplog.text
