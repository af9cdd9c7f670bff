"""LoRA adapters loaded beside vLLM's weights: the settings that choose it, the files, and the real
CPU engine.

The slow part starts the engine once for the module and once more after it was killed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal

import pytest
import pytest_asyncio
import torch

from priorzero.llm.engines import vllm_engine
from priorzero.llm.engines.choice import create_engine
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.engines.vllm_adapters import AdapterSlot, hot_load_rank, save_adapter
from priorzero.llm.scoring.requests import ScoreRequest, TextTokeniser
from priorzero.llm.update.trainers.builtin import (
    LLMTrainer,
    LLMTrainerSettings,
    LoraSettings,
    SFTSample,
)
from priorzero.llm.weights.canary import push_and_verify
from priorzero.settings.engine_old import EngineSettings, VLLMSettings
from priorzero.types import PriorZeroError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("setting", "rank", "device", "dtype", "expected"),
    [
        ("auto", 16, CUDA, torch.bfloat16, 16),
        (
            "auto",
            16,
            CPU,
            torch.bfloat16,
            0,
        ),  # adapters slow a CPU down by far more than a push saves
        ("auto", 16, CUDA, torch.float32, 0),  # vLLM's kernels know no float32
        ("merge", 16, CUDA, torch.bfloat16, 0),
        ("hot_load", 0, CPU, torch.float32, 0),  # all weights are trained
        ("hot_load", 4, CPU, torch.float32, 8),
        ("hot_load", 129, CUDA, torch.float16, 256),
    ],
)
def test_what_the_setting_chooses(setting, rank, device, dtype, expected):
    assert hot_load_rank(setting, rank, device, dtype) == expected


def test_impossible_choices_are_errors():
    with pytest.raises(PriorZeroError, match="'merge' or 'hot_load'"):
        VLLMSettings(lora="hotload")
    with pytest.raises(PriorZeroError, match="bfloat16"):
        hot_load_rank("hot_load", 8, CUDA, torch.float32)
    with pytest.raises(PriorZeroError, match="llm.lora.rank"):
        hot_load_rank("hot_load", 513, CPU, torch.float32)


def adapted(model, **settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            **dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") | settings
        ),
    )


def test_files_hold_the_adapters_only(tiny, tmp_path):
    from safetensors.torch import load_file

    size, modules = save_adapter(adapted(tiny()), tmp_path / "v1", torch.bfloat16)
    tensors = load_file(tmp_path / "v1" / "adapter_model.safetensors")
    assert (
        modules == 4
        and len(tensors) == 8
        and all(t.dtype == torch.bfloat16 for t in tensors.values())
    )
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in tensors
    assert size == 2 * sum(t.numel() for t in tensors.values())
    assert json.loads((tmp_path / "v1" / "adapter_config.json").read_text())["r"] == 4


def test_a_slot_takes_what_vllm_can_hold(tiny):
    slot = AdapterSlot(8)
    assert (
        slot.takes(adapted(tiny()))
        and not slot.takes(tiny())
        and not AdapterSlot(0).takes(adapted(tiny()))
    )
    for features, message in (
        (dict(use_dora=True), "use_dora"),
        (dict(alpha_pattern={"q_proj": 3}), "alpha_pattern"),
        (dict(bias="lora_only"), "bias"),
        (dict(r=16), "rank 16"),
    ):
        with pytest.raises(PriorZeroError, match=message):
            slot.takes(adapted(tiny(), **features))
    slot.clear()
    assert not slot.takes(
        adapted(tiny())
    )  # they do not belong to the full weights that were loaded


SETTINGS = EngineSettings(
    kind="vllm",
    required=True,
    cache_size=0,
    max_restarts=1,
    vllm=VLLMSettings(dtype="float32", max_model_len=1024, kv_cache_gb=0.5, lora="hot_load"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(smollm):
    model, tokenizer, resolved = smollm
    engine = await create_engine(
        SETTINGS, resolved, text=TextTokeniser(tokenizer, 1024), lora_rank=4
    )
    yield engine
    await engine.close()
    assert engine._engine.process_ids == []


@pytest.fixture(scope="module")
def asked(requests) -> list[ScoreRequest]:
    return [ScoreRequest(r.head, r.body, r.actions[:4], r.action_prefix) for r in requests]


def trainer_of(smollm, version: int = 0, **lora) -> LLMTrainer:
    model, tokenizer, _ = smollm
    settings = LLMTrainerSettings(
        learning_rate=4e-3, compute_dtype="float32", lora=LoraSettings(rank=4, **lora)
    )
    trainer = LLMTrainer(copy.deepcopy(model), tokenizer, settings)
    trainer.version = version
    return trainer


def teach(trainer: LLMTrainer, asked: list[ScoreRequest], action: int) -> None:
    target = tuple(float(i == action) for i in range(len(asked[0].actions)))
    trainer.sft_update([SFTSample(request, target) for request in asked])


async def totals(engine, requests: list[ScoreRequest]) -> list[float]:
    return [total for answer in await engine.score(requests) for total in answer.totals()]


def own_totals(trainer: LLMTrainer, requests: list[ScoreRequest]) -> list[float]:
    return [total for answer in trainer.score(requests) for total in answer.totals()]


def moved(new: list[float], old: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(new, old, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.asyncio(loop_scope="module")
class TestHotLoad:
    """In the order given: each test goes on with the engine as the one before left it."""

    async def test_without_a_push_the_published_weights_answer(self, vllm, smollm, asked):
        plain = TransformersEngine(smollm[0], vllm.text)
        assert await totals(vllm, asked) == pytest.approx(await totals(plain, asked), abs=0.005)
        prompts = [r.head + r.body for r in asked]
        assert await vllm.generate(prompts, 8, 0.0) == await plain.generate(prompts, 8, 0.0)

    @pytest.mark.parametrize("last_layers", [0, 4])
    async def test_each_push_answers_as_the_trainer(
        self, vllm, smollm, asked, last_layers, monkeypatch
    ):
        folders, make = [], vllm_engine._weights_folder
        monkeypatch.setattr(
            vllm_engine, "_weights_folder", lambda: folders.append(make()) or folders[-1]
        )
        before = await totals(vllm, asked)
        written = await vllm.generate([asked[0].head + asked[0].body], 8, 0.0)
        pushed = vllm.stats().get("adapter_pushes", 0)
        trainer = trainer_of(smollm, version=int(pushed), last_layers=last_layers)
        for action in (0, 3):
            teach(trainer, asked, action)
            report = await push_and_verify(vllm, trainer, asked[1], tolerance=0.05)
            answers = await totals(vllm, asked)
            assert answers == pytest.approx(own_totals(trainer, asked), abs=0.005)
            assert (
                moved(answers, before) > 0.5
            )  # a hundred times what the comparison allows: other adapters would show
            before = answers
            assert (
                report["bytes"] == 4 * sum(p.numel() for p in trainer.parameters)
                and report["seconds"] > 0
            )
        assert vllm.stats()["adapter_pushes"] == vllm.stats()["pushes"] == pushed + 2
        assert len(await vllm._engine._engine.list_loras()) == 1 and not any(
            f.exists() for f in folders
        )
        fresh = await vllm.generate([asked[0].head + asked[0].body], 8, 0.0)
        assert fresh == await TransformersEngine(trainer.model, vllm.text).generate(
            [asked[0].head + asked[0].body], 8, 0.0
        )
        assert fresh != written

    async def test_a_killed_engine_gets_the_adapters_again(self, vllm, smollm, asked):
        trainer = trainer_of(smollm, version=4)
        teach(trainer, asked, 2)
        await vllm.push_weights(trainer.model, trainer.version)
        for pid in vllm._engine.process_ids:
            os.kill(pid, signal.SIGKILL)
        assert await totals(vllm, asked) == pytest.approx(own_totals(trainer, asked), abs=0.005)
        assert (
            vllm.stats()["engine_restarts"] == vllm.stats()["adapter_pushes"] == 1
            and vllm.weights_version == 5
        )

    async def test_adapters_without_a_place_are_refused(self, vllm, tiny, asked):
        from transformers import GPT2Config, GPT2LMHeadModel

        before = await totals(vllm, asked)
        other = GPT2LMHeadModel(
            GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )
        with pytest.raises(PriorZeroError, match=r"c_attn.*target_modules"):
            await vllm.push_weights(
                adapted(other, target_modules=["c_attn"], fan_in_fan_out=True), 6
            )
        assert await totals(vllm, asked) == before and vllm.weights_version == 5
        deep = tiny(
            num_hidden_layers=31
        )  # one more than vLLM's model: it would load its adapters and never apply them
        with pytest.raises(PriorZeroError, match="0 of 2 adapted modules"):
            await vllm.push_weights(adapted(deep, layers_to_transform=[30]), 6)
        assert vllm.stats()["engine_restarts"] == 1

    async def test_full_weights_end_the_adapters(self, vllm, smollm, asked):
        model, tokenizer, _ = smollm
        full = LLMTrainer(
            copy.deepcopy(model),
            tokenizer,
            LLMTrainerSettings(learning_rate=1e-4, compute_dtype="float32"),
        )
        full.version = 6
        teach(full, asked, 1)
        report = await push_and_verify(vllm, full, asked[0])
        assert report["head_error"] == 0.0 and report["bytes"] > 4e8
        assert await totals(vllm, asked) == pytest.approx(own_totals(full, asked), abs=0.005)
        trainer = trainer_of(smollm, version=7)
        teach(trainer, asked, 3)
        report = await push_and_verify(
            vllm, trainer, asked[0]
        )  # merged: adapters belong to the published weights
        assert report["bytes"] > 4e8
        assert await totals(vllm, asked) == pytest.approx(own_totals(trainer, asked), abs=0.005)
