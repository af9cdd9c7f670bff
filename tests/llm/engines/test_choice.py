"""Which engine a run gets, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from priorzero.llm.engines.choice import choose_engine, create_engine
from priorzero.llm.model import ResolvedModel
from priorzero.settings.llm import LLMSettings, PromptSettings
from priorzero.types import PriorZeroError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RESOLVED = ResolvedModel("unused", "tiny", "local", "test")


@pytest.mark.parametrize(
    ("engine", "use_cot", "device", "expected"),
    [
        ("auto", False, CPU, "transformers"),
        ("auto", True, CPU, "transformers"),
        ("auto", False, CUDA, "transformers"),
        ("auto", True, CUDA, "vllm"),  # generation is what vLLM is good at
        ("vllm", False, CPU, "vllm"),
        ("transformers", True, CUDA, "transformers"),
    ],
)
def test_the_rule(engine, use_cot, device, expected):
    settings = LLMSettings(engine=engine, prompt=PromptSettings(use_cot=use_cot))
    name, reason = choose_engine(settings, device)
    assert name == expected and reason


@pytest.fixture
def without_vllm(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a)
    )


async def start(settings, model, tokeniser):
    return await create_engine(
        settings,
        RESOLVED,
        device="cpu",
        marker="Action:",
        seed=0,
        model=model,
        tokeniser=tokeniser,
    )


async def test_missing_vllm_falls_back_with_a_message(byte_model, tokeniser, without_vllm, caplog):
    engine = await start(LLMSettings(engine="vllm"), byte_model, tokeniser)
    assert engine.name == "transformers" and engine.stats()["engine_fallbacks"] == 1
    assert "falls back" in caplog.text and "not installed" in caplog.text
    with pytest.raises(PriorZeroError, match="llm.required"):
        await start(LLMSettings(engine="vllm", required=True), byte_model, tokeniser)


async def test_auto_says_why(byte_model, tokeniser, caplog):
    caplog.set_level("INFO")
    engine = await start(LLMSettings(), byte_model, tokeniser)
    assert engine.name == "transformers" and engine.stats()["engine_fallbacks"] == 0
    assert "transformers, because there is no GPU" in caplog.text
