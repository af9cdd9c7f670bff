"""The transformers engine, the score cache, and what happens when an engine fails."""

from __future__ import annotations

import asyncio
import copy
import math
import threading

import pytest
import torch

from priorzero.llm.engines import transformers_engine
from priorzero.llm.engines.base import LLMEngine, LLMEngineDead, LLMEngineError
from priorzero.llm.engines.cached import CachedEngine
from priorzero.llm.engines.resilient import ResilientEngine
from priorzero.llm.engines.thoughts import Reasoner
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.prior import LLMPrior
from priorzero.llm.weights.export import Weights
from priorzero.llm.weights.publish import publish
from priorzero.settings.llm import LoraSettings
from priorzero.types import PriorZeroError, TextState
from tests.llm.decisions import REQUESTS as ROOMS
from tests.llm.decisions import request, sample, trainer_of

REQUESTS = [
    request("A dark room.\nAction:", ("go north", "go north east", "look", "go north")),
    request("A bright hall with a très long name.\nAction:", ("öffne Tür", "", "打开门")),
    request("The end.", ()),
    request("One way out.\nAction:", ("leave",)),
    request("A market.\nAction:", tuple(f"buy item {i}" for i in range(200))),
]


def weights_of(model) -> Weights:
    return Weights(model)


async def test_scores_equal_reference_in_order(byte_model, tokeniser, reference):
    engine = TransformersEngine(byte_model, tokeniser, max_batch_tokens=300)
    answers = await engine.score([*REQUESTS, REQUESTS[0]])
    for asked, answer in zip([*REQUESTS, REQUESTS[0]], answers, strict=True):
        expected = reference(byte_model, asked)
        assert len(answer.token_logprobs) == len(expected)
        for got, want in zip(answer.token_logprobs, expected, strict=True):
            assert got == pytest.approx(want, abs=1e-4)
    assert answers[0].token_logprobs[0] == answers[0].token_logprobs[3]
    assert answers[2].token_logprobs == () and answers[2].totals() == []
    # The repeated state and the empty one cost nothing.
    assert engine.stats()["states_computed"] == 4
    assert await engine.score([]) == []
    await engine.close()
    with pytest.raises(LLMEngineDead, match="closed"):
        await engine.score(REQUESTS[:1])


async def test_event_loop_stays_free_while_scoring(byte_model, tokeniser):
    """The forward waits for something that only a running loop can do."""
    loop, seen = asyncio.get_running_loop(), asyncio.Event()

    async def see():
        seen.set()

    def ask_the_loop(*_):
        asyncio.run_coroutine_threadsafe(see(), loop).result(timeout=5)

    byte_model.get_decoder().register_forward_pre_hook(ask_the_loop)
    await TransformersEngine(byte_model, tokeniser).score(REQUESTS[:1])
    assert seen.is_set()


async def test_generation_stops_and_is_reproducible(byte_model, tokeniser):
    engine = TransformersEngine(byte_model, tokeniser)
    prompts = [tokeniser.ids("A dark room."), tokeniser.ids("x")]
    first = await engine.generate(prompts, 12, 1.0, seed=3)
    assert first == await engine.generate(prompts, 12, 1.0, seed=3)
    assert first != await engine.generate(prompts, 12, 1.0, seed=4)
    assert await engine.generate([], 12) == []

    # Greedy decoding of each prompt alone, through full forwards: padding must not matter.
    greedy = await engine.generate(prompts, 8, 0.0)
    for prompt, answer in zip(prompts, greedy, strict=True):
        ids, written = list(prompt), []
        for _ in range(8):
            token = int(byte_model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in tokeniser.end_ids:
                break
            ids.append(token)
            written.append(token)
        assert answer.ids == tuple(written)

    # A stop text ends the answer with the token that completes it.
    text = tokeniser.decode(first[0].ids)
    letter = next(c for c in text if c.isascii())
    stopped = await engine.generate(prompts, 12, 1.0, (letter,), seed=3)
    assert tokeniser.decode(stopped[0].ids) == text[: text.index(letter) + 1]


async def test_written_tokens_come_with_their_log_probabilities(byte_model, tokeniser):
    """At temperature 1, whatever they were drawn at, as a full forward of each prompt gives."""
    engine = TransformersEngine(byte_model, tokeniser)
    prompts = [tokeniser.ids("A dark room."), tokeniser.ids("x")]
    for temperature in (0.0, 2.5):
        for prompt, answer in zip(
            prompts, await engine.generate(prompts, 6, temperature, seed=1), strict=True
        ):
            logits = (
                byte_model(torch.tensor([prompt + answer.ids])).logits[0].detach().log_softmax(-1)
            )
            expected = [
                float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer.ids)
            ]
            assert answer.ids and list(answer.logprobs) == pytest.approx(expected, abs=1e-4)


async def test_cache_answers_repeats_and_is_emptied_by_new_weights(
    byte_model, tokeniser, tiny, reference
):
    engine = CachedEngine(TransformersEngine(byte_model, tokeniser), capacity=2)
    first = (await engine.score(REQUESTS[:1]))[0]
    again = (await engine.score(REQUESTS[:1]))[0]
    assert again.cached and not first.cached and again.token_logprobs == first.token_logprobs
    assert engine.stats()["cache_hit_rate"] == 0.5

    other = tiny(seed=5, vocab=262)
    report = await engine.push_weights(weights_of(other), 1)
    fresh = (await engine.score(REQUESTS[:1]))[0]
    assert not fresh.cached and fresh.weights_version == 1 and report["bytes"] > 0
    expected = reference(other, REQUESTS[0])
    assert list(fresh.token_logprobs[0]) == pytest.approx(expected[0], abs=1e-4)
    await engine.score(REQUESTS[1:4])
    assert engine.stats()["cache_size"] == 2  # capacity


# ---- memory ----------------------------------------------------------------------------------


def short_of_memory(monkeypatch, most: int, error: Exception) -> None:
    """Forwards of more than `most` states do not fit into memory."""
    real = transformers_engine.tree_logprobs

    def limited(model, items, **kwargs):
        if len(items) > most:
            raise error
        return real(model, items, **kwargs)

    monkeypatch.setattr(transformers_engine, "tree_logprobs", limited)


CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate"
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CPU_ERROR])
async def test_a_batch_that_does_not_fit_is_split(byte_model, tokeniser, monkeypatch, error):
    expected = await TransformersEngine(byte_model, tokeniser).score(ROOMS)
    short_of_memory(monkeypatch, 2, error)
    engine = TransformersEngine(byte_model, tokeniser)
    got = await engine.score(ROOMS)
    for a, b in zip(got, expected, strict=True):
        assert a.totals() == pytest.approx(b.totals(), abs=1e-4)
    assert engine.stats()["oom_splits"] == 3 and engine.stats()["forwards"] == 4  # 6: 3 3: 1 2 1 2


async def test_a_state_that_does_not_fit_is_planned_without_the_llm(
    byte_model, tokeniser, monkeypatch
):
    """`llm.required=False`: counted and said, not the end of the run."""
    short_of_memory(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    engine = CachedEngine(TransformersEngine(byte_model, tokeniser), capacity=9)
    for required in (False, True):
        prior = LLMPrior(engine, lambda s: ("", s.observation, False), required=required)
        asked = prior.requests([TextState("A room.", ("go",))], [("go",)])
        if required:
            with pytest.raises(PriorZeroError, match="no memory for a single state"):
                await prior.ask(asked)
        else:
            assert await prior.ask(asked) == [None]
        assert prior.counters["failures"] == 1


async def test_another_error_of_a_forward_is_not_taken_for_it(byte_model, tokeniser, monkeypatch):
    short_of_memory(monkeypatch, 0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        await TransformersEngine(byte_model, tokeniser).score(ROOMS)


# ---- failing engines -------------------------------------------------------------------------


class BrokenEngine(LLMEngine):
    """Answers with what it is told to, or raises it."""

    name = "broken"
    dtype = torch.float32

    def __init__(self, tokeniser, answers, push_error: Exception | None = None):
        super().__init__(tokeniser)
        self.answers, self.push_error = list(answers), push_error
        self.closed, self.pushed = False, []

    async def _score_tokens(self, requests):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return [answer(r) for r in requests], self.weights_version
        answers = [tuple(tuple(answer for _ in a) for a in r.action_ids) for r in requests]
        return answers, self.weights_version

    async def _generate_tokens(self, prompts, max_new_tokens, temperature, stop, seed):
        return [()] * len(prompts)

    async def push_weights(self, weights, version):
        if self.push_error is not None:
            raise self.push_error
        self.pushed.append(version)
        self.weights_version = version
        return {}

    async def close(self):
        self.closed = True


@pytest.mark.parametrize("bad", [math.nan, -math.inf, None, 0.5])
async def test_unusable_numbers_never_leave_an_engine(tokeniser, bad):
    with pytest.raises(LLMEngineError, match="log-probability"):
        await BrokenEngine(tokeniser, [bad]).score(REQUESTS[:1])


async def test_missing_numbers_never_leave_an_engine(tokeniser):
    with pytest.raises(LLMEngineError, match="asked were"):
        await BrokenEngine(tokeniser, [lambda request: ((-1.0,),)]).score(REQUESTS[:1])


def _resilient(tokeniser, first, more, fallback=None, max_restarts=2) -> tuple:
    """The engine, and those it makes anew: answers, or a whole engine."""
    made = []

    async def restart():
        new = more.pop(0)
        made.append(new if isinstance(new, LLMEngine) else BrokenEngine(tokeniser, new))
        return made[-1]

    engine = ResilientEngine(
        BrokenEngine(tokeniser, first),
        restart,
        fallback,
        max_restarts=max_restarts,
        attempts=3,
        first_pause_s=0.001,
    )
    return engine, made


async def test_a_passing_fault_is_retried(tokeniser):
    engine, made = _resilient(tokeniser, [math.nan, LLMEngineError("late"), -1.0], [])
    assert (await engine.score(REQUESTS[:1]))[0].token_logprobs[0][0] == -1.0
    assert not made and engine.stats()["engine_retries"] == 2


async def test_a_dead_engine_is_restarted_with_the_latest_weights(tokeniser, byte_model):
    engine, made = _resilient(tokeniser, [LLMEngineDead("gone")], [[-2.0]])
    await engine.push_weights(weights_of(byte_model), 7)
    answer = (await engine.score(REQUESTS[:1]))[0]
    assert answer.weights_version == 7 and made[0].pushed == [7]
    assert engine.stats()["engine_restarts"] == 1 and engine.stats()["engine_fallbacks"] == 0


async def test_a_fresh_engine_that_does_not_take_the_weights_is_closed(tokeniser, byte_model):
    """It would hold the GPU's memory, and the next one would not start."""
    deaf = BrokenEngine(tokeniser, [], push_error=LLMEngineDead("gone at the push"))
    engine, made = _resilient(tokeniser, [LLMEngineDead("gone")], [deaf, [-2.0]])
    await engine.push_weights(weights_of(byte_model), 7)
    assert (await engine.score(REQUESTS[:1]))[0].weights_version == 7
    assert deaf.closed and not made[1].closed and engine.stats()["engine_restarts"] == 2


async def test_concurrent_calls_share_one_restart(tokeniser):
    engine, made = _resilient(tokeniser, [LLMEngineDead("gone")] * 4, [[-2.0] * 4])
    await asyncio.gather(*(engine.score([REQUESTS[i]]) for i in (0, 1, 3, 4)))
    assert len(made) == 1


async def test_fallback_takes_over_after_the_last_restart(byte_model, tokeniser):
    async def fallback():
        return TransformersEngine(byte_model, tokeniser)

    dead = [LLMEngineDead("gone")]
    engine, made = _resilient(tokeniser, dead, [list(dead), list(dead)], fallback)
    answer = (await engine.score(REQUESTS[:1]))[0]
    assert engine.name == "transformers" and len(made) == 2 and all(m.closed for m in made)
    assert answer == (await TransformersEngine(byte_model, tokeniser).score(REQUESTS[:1]))[0]
    assert engine.stats()["engine_fallbacks"] == 1


async def test_a_failing_fallback_leaves_the_decision_to_the_caller(tokeniser):
    async def fallback():
        return BrokenEngine(tokeniser, [LLMEngineDead("no memory"), -1.0])

    engine, _ = _resilient(tokeniser, [LLMEngineDead("gone")], [], fallback, max_restarts=0)
    with pytest.raises(LLMEngineError, match="no memory"):
        await engine.score(REQUESTS[:1])
    assert (await engine.score(REQUESTS[:1]))[0].token_logprobs[0][0] == -1.0


async def test_without_fallback_the_error_says_what_to_do(tokeniser):
    engine, _ = _resilient(tokeniser, [LLMEngineDead("gone")], [], max_restarts=0)
    with pytest.raises(PriorZeroError, match="llm.required=False"):
        await engine.score(REQUESTS[:1])


# ---- adapters in a copy ----------------------------------------------------------------------


def totals(answers) -> torch.Tensor:
    return torch.tensor([total for answer in answers for total in answer.totals()])


async def test_a_16_bit_copy_sees_small_updates_of_adapters(tiny, tokeniser):
    """Merged into bfloat16 weights, a part of every small update was rounded away."""
    from priorzero.llm.module import store_layers_in

    lora = LoraSettings(enable=True, rank=4, alpha=8)
    trainer = trainer_of(tiny(vocab=262), lora=lora, dtype="bfloat16", learning_rate=2e-4)
    own = tiny(vocab=262)
    store_layers_in(own, torch.bfloat16)
    engine = TransformersEngine(own, tokeniser, compute_dtype=torch.bfloat16)
    before = totals(trainer.score(ROOMS))
    for _ in range(2):
        trainer.update({"sft": [sample(r) for r in ROOMS]})
        report = await engine.push_weights(trainer.weights(), trainer.version)
        after = totals(trainer.score(ROOMS))
        assert (after - before).abs().max() > 1e-3  # small, and there
        torch.testing.assert_close(totals(await engine.score(ROOMS)), after, rtol=0, atol=1e-6)
    # The adapters alone travel, in what the copy multiplies in.
    adapters = sum(p.numel() for p in trainer.state_dict()["model"].values())
    assert report["bytes"] == 2 * adapters


@pytest.mark.parametrize("way", ["packed", "padded", "two_pass"])
async def test_a_copy_that_is_16_bit_throughout_follows_the_adapters(
    tiny, tokeniser, monkeypatch, way
):
    """The engine's copy on a GPU, which computes without autocast; the canary is compared too."""
    monkeypatch.setattr(transformers_engine, "choose_way", lambda model, items: way)
    lora = LoraSettings(enable=True, rank=4, alpha=8)
    trainer = trainer_of(tiny(vocab=262), lora=lora, dtype="bfloat16", learning_rate=1e-2)
    engine = TransformersEngine(tiny(vocab=262).to(torch.bfloat16), tokeniser, own_weights=True)
    before = totals(await engine.score(ROOMS))
    for _ in range(2):
        trainer.update({"sft": [sample(r) for r in ROOMS]})
        await publish(engine, trainer, ROOMS[0])
        after = totals(await engine.score(ROOMS))
        torch.testing.assert_close(after, totals(trainer.score(ROOMS)), rtol=0, atol=0.1)
        assert (after - before).abs().max() > 0.5
        before = after


async def test_a_resumed_run_draws_the_thoughts_that_would_have_come(byte_model, tokeniser):
    """The number of calls is part of each draw's seed; wrappers pass it through."""

    def engine():
        reasoner = Reasoner(max_new_tokens=6, temperature=1.0, marker="Action:", seed=3)
        inner = TransformersEngine(byte_model, tokeniser, reasoner=reasoner)
        resilient = ResilientEngine(inner, None, None, max_restarts=0, attempts=1)
        return CachedEngine(resilient, 8)

    asked = tokeniser.requests([("You see a door.", "")], [["go", "look"]], reasoning=True)
    one, two = engine(), engine()
    thoughts = [(await one.score(asked))[0].thought_ids for _ in range(3)]
    assert len(set(thoughts)) == 3 and one.thought_calls == 3

    two.thought_calls = 2
    assert (await two.score(asked))[0].thought_ids == thoughts[2]
    assert two.thought_calls == 3
    for made in (one, two):
        await made.close()


# ---- beside the trainer --------------------------------------------------------------------------


@pytest.mark.parametrize("own_weights", [True, False])
async def test_only_a_copy_answers_while_the_trainer_works(byte_model, tokeniser, own_weights):
    """The trainer holds its lock for a whole phase. A copy waits for it with new weights alone."""
    lock = threading.RLock()
    engine = TransformersEngine(byte_model, tokeniser, lock=lock, own_weights=own_weights)
    wrapped = ResilientEngine(
        CachedEngine(engine, capacity=9), None, None, max_restarts=0, attempts=1
    )
    assert wrapped.answers_apart is own_weights
    training, done = threading.Event(), threading.Event()

    def train():
        with lock:
            training.set()
            assert done.wait(30)

    trainer = threading.Thread(target=train)
    trainer.start()
    assert training.wait(30)
    asked = asyncio.create_task(engine.score(ROOMS))
    if own_weights:
        await asked
        weights = Weights(copy.deepcopy(byte_model))
        asked = asyncio.create_task(engine.push_weights(weights, 1))
    await asyncio.sleep(0.2)
    assert not asked.done()
    done.set()
    await asked
    trainer.join()
    await engine.close()
