"""The transformers engine, the score cache, and what happens when an engine fails."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from priorzero.llm.engines.base import LLMEngine, LLMEngineDead, LLMEngineError
from priorzero.llm.engines.cached import CachedEngine
from priorzero.llm.engines.choice import EngineSettings, create_engine
from priorzero.llm.engines.resilient import ResilientEngine
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.model import ResolvedModel
from priorzero.llm.scoring.requests import ReasoningSettings, ScoreRequest
from priorzero.types import PriorZeroError

REQUESTS = [
    ScoreRequest(
        "You play. ",
        "A dark room.\nAction:",
        ("go north", "go north east", "look", "go north"),
        " ",
    ),
    ScoreRequest(
        "You play. ",
        "A bright hall with a très long name.\nAction:",
        ("öffne Tür", "", "打开门"),
        " ",
    ),
    ScoreRequest("You play. ", "The end.", ()),
    ScoreRequest("You play. ", "One way out.\nAction:", ("leave",), " "),
    ScoreRequest(
        "You play. ", "A market.\nAction:", tuple(f"buy item {i}" for i in range(200)), " "
    ),
]


async def test_scores_equal_reference_in_order(byte_model, byte_text, reference):
    engine = TransformersEngine(byte_model, byte_text, max_batch_tokens=300)
    answers = await engine.score([*REQUESTS, REQUESTS[0]])
    for request, answer in zip([*REQUESTS, REQUESTS[0]], answers, strict=True):
        expected = reference(byte_model, byte_text.tokenise(request)) if request.actions else []
        assert len(answer.token_logprobs) == len(expected)
        for got, want in zip(answer.token_logprobs, expected, strict=True):
            assert got == pytest.approx(want, abs=1e-4)
    assert answers[0].token_logprobs[0] == answers[0].token_logprobs[3]
    assert answers[2].token_logprobs == () and answers[2].totals() == []
    assert (
        engine.stats()["states_computed"] == 4
    )  # the repeated state and the empty one cost nothing
    assert await engine.score([]) == []
    await engine.close()
    with pytest.raises(LLMEngineDead, match="closed"):
        await engine.score(REQUESTS[:1])


async def test_event_loop_stays_free_while_scoring(byte_model, byte_text):
    engine, gate = TransformersEngine(byte_model, byte_text), asyncio.Event()
    original = engine._score_now

    def slow(requests):
        asyncio.run_coroutine_threadsafe(_set(gate), loop).result(
            timeout=5
        )  # needs a running loop to return
        return original(requests)

    async def _set(event):
        event.set()

    loop, engine._score_now = asyncio.get_running_loop(), slow
    await engine.score(REQUESTS[:1])
    assert gate.is_set()


async def test_generation_stops_and_is_reproducible(byte_model, byte_text):
    engine = TransformersEngine(byte_model, byte_text)
    prompts = ["A dark room.", "x"]
    first = await engine.generate(prompts, 12, 1.0, seed=3)
    assert first == await engine.generate(prompts, 12, 1.0, seed=3)
    assert first != await engine.generate(prompts, 12, 1.0, seed=4)
    greedy = await engine.generate(prompts, 8, 0.0)
    # Greedy decoding of each prompt alone, through full forwards: padding must not matter.
    for prompt, text in zip(prompts, greedy, strict=True):
        ids, written = list(byte_text.prompt_ids(prompt)), []
        for _ in range(8):
            token = int(byte_model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == byte_text.terminator_id:
                break
            ids.append(token)
            written.append(token)
        assert byte_text.decode(written) == text
    letter = first[0][2]
    stopped = await engine.generate(prompts, 12, 1.0, (letter,), seed=3)
    assert stopped[0] == first[0][: first[0].index(letter) + 1]


async def test_reasoning_precedes_the_actions(byte_model, byte_text, reference):
    engine = TransformersEngine(
        byte_model, byte_text, reasoning=ReasoningSettings(max_new_tokens=5, temperature=0.0)
    )
    request = ScoreRequest("", "A dark room.", ("go", "look"), " ", reasoning=True)
    answer = (await engine.score([request]))[0]
    assert answer.reasoning.endswith("\nAction:")
    assert engine.stats()["reasoning_without_marker"] == 1
    expected = reference(byte_model, byte_text.tokenise(request.with_reasoning(answer.reasoning)))
    assert [list(t) for t in answer.token_logprobs] == [
        pytest.approx(e, abs=1e-4) for e in expected
    ]


async def test_cache_answers_repeats_and_is_emptied_by_new_weights(
    byte_model, byte_text, tiny, reference
):
    engine = CachedEngine(TransformersEngine(byte_model, byte_text), capacity=2)
    first = (await engine.score(REQUESTS[:1]))[0]
    again = (await engine.score(REQUESTS[:1]))[0]
    assert again.cached and not first.cached and again.token_logprobs == first.token_logprobs
    assert engine.stats()["cache_hit_rate"] == 0.5

    other = tiny(seed=5, vocab=262)
    report = await engine.push_weights(other, 1)
    fresh = (await engine.score(REQUESTS[:1]))[0]
    assert not fresh.cached and fresh.weights_version == 1 and report["bytes"] > 0
    expected = reference(other, byte_text.tokenise(REQUESTS[0]))
    assert list(fresh.token_logprobs[0]) == pytest.approx(expected[0], abs=1e-4)
    await engine.score(REQUESTS[1:4])
    assert engine.stats()["cache_size"] == 2  # capacity


class BrokenEngine(LLMEngine):
    """Answers with what it is told to, or raises it."""

    name = "broken"

    def __init__(self, text, answers):
        super().__init__(text)
        self.answers, self.closed, self.pushed = list(answers), False, []

    dtype = torch.float32

    async def _score_tokens(self, requests):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [
            tuple(tuple(answer for _ in a) for a in r.action_ids) for r in requests
        ], self.weights_version

    async def _generate_tokens(self, prompts, max_new_tokens, temperature, stop, seed):
        return [""] * len(prompts)

    async def push_weights(self, model, version):
        self.pushed.append(version)
        self.weights_version = version
        return {}

    async def close(self):
        self.closed = True


@pytest.mark.parametrize("bad", [math.nan, -math.inf, None, 0.5])
async def test_unusable_numbers_never_leave_an_engine(byte_text, bad):
    with pytest.raises(LLMEngineError, match="log-probability"):
        await BrokenEngine(byte_text, [bad]).score(REQUESTS[:1])


async def test_missing_numbers_never_leave_an_engine(byte_text):
    engine = BrokenEngine(byte_text, [])

    async def short(requests):
        return [((-1.0,),) for _ in requests], 0

    engine._score_tokens = short
    with pytest.raises(LLMEngineError, match="asked were"):
        await engine.score(REQUESTS[:1])


def _resilient(text, first, more, fallback=None, **kwargs) -> tuple[ResilientEngine, list]:
    made = []

    async def restart():
        made.append(BrokenEngine(text, more.pop(0)))
        return made[-1]

    return ResilientEngine(
        BrokenEngine(text, first), restart, fallback, first_pause_s=0.001, **kwargs
    ), made


async def test_a_passing_fault_is_retried(byte_text):
    engine, made = _resilient(byte_text, [math.nan, LLMEngineError("late"), -1.0], [])
    assert (await engine.score(REQUESTS[:1]))[0].token_logprobs[0][0] == -1.0
    assert not made and engine.stats()["engine_retries"] == 2


async def test_a_dead_engine_is_restarted_with_the_latest_weights(byte_text):
    engine, made = _resilient(byte_text, [LLMEngineDead("gone")], [[-2.0]])
    await engine.push_weights(object(), 7)
    answer = (await engine.score(REQUESTS[:1]))[0]
    assert answer.weights_version == 7 and made[0].pushed == [7]
    assert engine.stats()["engine_restarts"] == 1 and engine.stats()["engine_fallbacks"] == 0


async def test_concurrent_calls_share_one_restart(byte_text):
    engine, made = _resilient(byte_text, [LLMEngineDead("gone")] * 4, [[-2.0] * 4])
    await asyncio.gather(*(engine.score([REQUESTS[i]]) for i in (0, 1, 3, 4)))
    assert len(made) == 1


async def test_fallback_takes_over_after_the_last_restart(byte_model, byte_text):
    async def fallback():
        return TransformersEngine(byte_model, byte_text)

    dead = [LLMEngineDead("gone")]
    engine, made = _resilient(byte_text, dead, [list(dead), list(dead)], fallback, max_restarts=2)
    answer = (await engine.score(REQUESTS[:1]))[0]
    assert engine.name == "transformers" and len(made) == 2 and all(m.closed for m in made)
    assert answer == (await TransformersEngine(byte_model, byte_text).score(REQUESTS[:1]))[0]
    assert engine.stats()["engine_fallbacks"] == 1


async def test_without_fallback_the_error_says_what_to_do(byte_text):
    engine, _ = _resilient(byte_text, [LLMEngineDead("gone")], [], max_restarts=0)
    with pytest.raises(PriorZeroError, match="llm_required=False"):
        await engine.score(REQUESTS[:1])


@pytest.fixture
def without_vllm(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a)
    )


async def test_missing_vllm_falls_back_with_a_message(byte_model, byte_text, without_vllm, caplog):
    resolved = ResolvedModel("unused", "tiny", "local", "test")
    engine = await create_engine(
        EngineSettings(kind="vllm"), resolved, model=byte_model, text=byte_text
    )
    assert engine.name == "transformers" and engine.stats()["engine_fallbacks"] == 1
    assert "falls back" in caplog.text and "not installed" in caplog.text
    with pytest.raises(PriorZeroError, match="llm_required"):
        await create_engine(
            EngineSettings(kind="vllm", required=True), resolved, model=byte_model, text=byte_text
        )


def test_contradictory_settings_are_refused():
    with pytest.raises(PriorZeroError, match="change one"):
        EngineSettings(kind="transformers", required=True)
    with pytest.raises(PriorZeroError, match="unknown"):
        EngineSettings(kind="tgi")
