"""LoRA adapters and vLLM: the settings that choose how they travel, and the real CPU engine.

The slow part starts the engine once for the module and once more after it was killed.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
from types import SimpleNamespace

import pytest
import pytest_asyncio
import torch

from priorzero.llm.engines.choice import create_engine
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.engines.vllm_adapters import check_adapter, hot_load_rank
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.weights.publish import publish
from priorzero.settings.llm import LLMSettings, LoraSettings, VLLMSettings
from priorzero.types import PriorZeroError, TokenisedRequest
from tests.llm.decisions import sample, trainer_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("setting", "rank", "device", "dtype", "expected"),
    [
        ("auto", 16, CUDA, torch.bfloat16, 16),
        ("auto", 16, CPU, torch.bfloat16, 16),  # merging would lose a part of every update
        ("auto", 16, CPU, torch.float32, 0),
        ("auto", 16, CUDA, torch.float32, 0),  # vLLM's kernels know no float32
        ("merge", 16, CPU, torch.float32, 0),
        ("hot_load", 0, CPU, torch.float32, 0),  # all weights are trained
        ("hot_load", 4, CPU, torch.float32, 8),
        ("hot_load", 129, CUDA, torch.float16, 256),
    ],
)
def test_what_the_setting_chooses(setting, rank, device, dtype, expected):
    assert hot_load_rank(setting, rank, device, dtype) == expected


@pytest.mark.parametrize(
    ("setting", "rank", "device", "dtype", "message"),
    [
        ("merge", 8, CUDA, torch.bfloat16, "loses a part"),
        ("hot_load", 8, CUDA, torch.float32, "16 bits"),
        ("hot_load", 513, CPU, torch.float32, "llm.lora.rank"),
        ("auto", 513, CUDA, torch.bfloat16, "llm.lora.rank"),
    ],
)
def test_impossible_choices_are_errors(setting, rank, device, dtype, message):
    with pytest.raises(PriorZeroError, match=message):
        hot_load_rank(setting, rank, device, dtype)


def config(**fields) -> SimpleNamespace:
    return SimpleNamespace(**dict(r=4, peft_type="LORA", bias="none") | fields)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (dict(use_dora=True), "use_dora"),
        (dict(alpha_pattern={"q_proj": 3}), "alpha_pattern"),
        (dict(bias="lora_only"), "bias"),
        (dict(peft_type="LOHA"), "LOHA"),
    ],
)
def test_adapters_vllm_would_load_wrongly_are_refused(features, message):
    check_adapter(config(), 8)
    with pytest.raises(PriorZeroError, match=message):
        check_adapter(config(**features), 8)


LORA = LoraSettings(enable=True, rank=4, alpha=16)
SETTINGS = LLMSettings(
    engine="vllm",
    required=True,
    score_cache_size=0,
    max_restarts=1,
    lora=LORA,
    vllm=VLLMSettings(dtype="float32", max_model_len=1024, kv_cache_gb=0.5, lora="hot_load"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(smollm):
    _, tokenizer, resolved = smollm
    engine = await create_engine(
        SETTINGS,
        resolved,
        device="cpu",
        marker="Action:",
        seed=0,
        tokeniser=Tokeniser(tokenizer, 1024),
    )
    yield engine
    await engine.close()
    assert engine._engine.process_ids == []


@pytest.fixture(scope="module")
def asked(requests) -> list[TokenisedRequest]:
    return [TokenisedRequest(r.head_ids, r.body_ids, r.action_ids[:4]) for r in requests]


def lora_trainer(smollm, version: int, **lora):
    fields = dict(learning_rate=4e-3, dtype="float32")
    settings = LoraSettings(enable=True, rank=4, alpha=16, **lora)
    trainer = trainer_of(copy.deepcopy(smollm[0]), lora=settings, **fields)
    trainer.version = version
    return trainer


def teach(trainer, asked: list[TokenisedRequest], action: int) -> None:
    target = tuple(float(i == action) for i in range(4))
    trainer.update({"sft": [sample(r, target_policy=target) for r in asked]})


def totals(answers) -> list[float]:
    return [total for answer in answers for total in answer.totals()]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.asyncio(loop_scope="module")
class TestHotLoad:
    """In the order given: each test goes on with the engine as the one before left it."""

    async def test_without_a_push_the_published_weights_answer(self, vllm, smollm, asked):
        plain = TransformersEngine(smollm[0], vllm.tokeniser)
        got, want = totals(await vllm.score(asked)), totals(await plain.score(asked))
        assert got == pytest.approx(want, abs=0.005)

    @pytest.mark.parametrize("last_layers", [0, 4])
    async def test_each_push_answers_as_the_trainer(self, vllm, smollm, asked, last_layers):
        before = totals(await vllm.score(asked))
        pushed = int(vllm.stats().get("adapter_pushes", 0))
        trainer = lora_trainer(smollm, pushed, last_layers=last_layers)
        for action in (0, 3):
            teach(trainer, asked, action)
            report = await publish(vllm, trainer, asked[1], tolerance=0.05)
            answers = totals(await vllm.score(asked))
            assert answers == pytest.approx(totals(trainer.score(asked)), abs=0.005)
            # A hundred times what the comparison allows: other adapters would show.
            assert max(abs(a - b) for a, b in zip(answers, before, strict=True)) > 0.5
            before = answers
            trained = sum(p.numel() for p in trainer.state_dict()["model"].values())
            assert report["bytes"] == 4 * trained
        assert vllm.stats()["adapter_pushes"] == vllm.stats()["pushes"] == pushed + 2
        prompts = [asked[0].prompt_ids]
        own = TransformersEngine(trainer.weights().module, vllm.tokeniser)
        theirs, ours = await vllm.generate(prompts, 8, 0.0), await own.generate(prompts, 8, 0.0)
        assert theirs[0].ids == ours[0].ids

    async def test_a_killed_engine_gets_the_adapters_again(self, vllm, smollm, asked):
        trainer = lora_trainer(smollm, 4)
        teach(trainer, asked, 2)
        await vllm.push_weights(trainer.weights(), trainer.version)
        for pid in vllm._engine.process_ids:
            os.kill(pid, signal.SIGKILL)
        got = totals(await vllm.score(asked))
        assert got == pytest.approx(totals(trainer.score(asked)), abs=0.005)
        assert vllm.stats()["engine_restarts"] == 1 and vllm.weights_version == 5
