"""`engine="auto"`: the faster engine is kept, and one that fails is not."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from priorzero.llm.engines.base import LLMEngine, LLMEngineDead, LLMEngineError
from priorzero.llm.engines.choice import EngineSettings, create_engine
from priorzero.llm.engines.selection import faster_engine, sample_requests
from priorzero.llm.model import ResolvedModel


class Timed(LLMEngine):
    """Takes a known time per state."""

    dtype = torch.float32

    def __init__(self, text, name: str, seconds: float, fails: bool = False) -> None:
        super().__init__(text)
        self.name, self.seconds, self.fails, self.closed = name, seconds, fails, False

    async def _score_tokens(self, requests):
        if self.fails:
            raise LLMEngineError("no answer")
        await asyncio.sleep(self.seconds * len(requests))
        return [
            tuple(tuple(-1.0 for _ in a) for a in r.action_ids) for r in requests
        ], self.weights_version

    async def _generate_tokens(self, prompts, max_new_tokens, temperature, stop, seed):
        return [""] * len(prompts)

    async def push_weights(self, model, version):
        return {}

    async def close(self):
        self.closed = True


def starter(engine):
    async def start():
        if isinstance(engine, Exception):
            raise engine
        return engine

    return start


@pytest.mark.parametrize("vllm_seconds", [0.001, 0.02])
async def test_the_faster_one_is_kept_and_the_other_closed(byte_text, vllm_seconds):
    slow_or_fast, other = (
        Timed(byte_text, "vllm", vllm_seconds),
        Timed(byte_text, "transformers", 0.006),
    )
    choice = await faster_engine(starter(other), starter(slow_or_fast), prompt_tokens=40)
    winner, loser = (slow_or_fast, other) if vllm_seconds < 0.006 else (other, slow_or_fast)
    assert choice.engine is winner and loser.closed and not winner.closed and not choice.vllm_failed
    assert f"--engine {winner.name}" in choice.reason and "states/s" in choice.reason


async def test_vllm_that_does_not_start_or_answer_is_not_kept(byte_text):
    ours = Timed(byte_text, "transformers", 0.001)
    choice = await faster_engine(
        starter(ours), starter(LLMEngineDead("no such device")), prompt_tokens=40
    )
    assert choice.engine is ours and choice.vllm_failed and "no such device" in choice.reason
    mute = Timed(byte_text, "vllm", 0.001, fails=True)
    choice = await faster_engine(starter(ours), starter(mute), prompt_tokens=40)
    assert choice.engine is ours and choice.vllm_failed and mute.closed and not ours.closed


async def test_auto_without_vllm_says_so_and_counts_it(byte_model, byte_text, monkeypatch, caplog):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a)
    )
    resolved = ResolvedModel("unused", "tiny", "local", "test")
    engine = await create_engine(EngineSettings(), resolved, model=byte_model, text=byte_text)
    assert engine.name == "transformers" and engine.stats()["engine_fallbacks"] == 1
    assert "not installed" in caplog.text


def test_samples_are_distinct_and_about_as_long_as_asked(byte_text):
    started = time.perf_counter()
    requests = sample_requests(8, 200, byte_text)
    assert len({r.body for r in requests}) == 8 and len({r.head for r in requests}) == 1
    assert all(190 <= byte_text.tokenise(r).num_prompt_tokens <= 210 for r in requests)
    assert all(len(set(r.actions)) == 12 for r in requests)
    # A model that takes less than was asked for: its prompts are shorter, and its actions still
    # fit.
    longest = max(
        byte_text.tokenise(r).num_prompt_tokens for r in sample_requests(8, 10**6, byte_text)
    )
    assert longest <= 0.6 * byte_text.max_tokens
    assert time.perf_counter() - started < 1
