"""Engines on the real embedded LLM and the text of a real game, against one full float32 forward
per action.

Slow parts: the reference itself, and vLLM's CPU engine, which is started once for the module, once
more after it was killed, and once in bfloat16. That it ends with a process that is killed:
tests/test_entry_vllm.py.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from priorzero.llm.engines.choice import create_engine
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.weights.publish import publish
from priorzero.settings.llm import LLMSettings, LoraSettings, ReasoningSettings, VLLMSettings
from priorzero.types import TokenisedRequest
from tests.llm.decisions import policy, rft_settings, sample, says, trainer_of

ROOT = Path(__file__).resolve().parents[2]


def check(answer, expected, limit: float) -> None:
    """Summed log-probabilities agree, and clearly separated actions keep their order."""
    got, want = answer.totals(), [sum(e) for e in expected]
    assert got == pytest.approx(want, abs=limit)
    for i in range(len(got)):
        for j in range(len(got)):
            if want[i] > want[j] + 2 * limit:
                assert got[i] > got[j]


def first_actions(request: TokenisedRequest, count: int) -> TokenisedRequest:
    return dataclasses.replace(request, action_ids=request.action_ids[:count])


async def start(settings: LLMSettings, smollm):
    _, tokenizer, resolved = smollm
    return await create_engine(
        settings,
        resolved,
        device="cpu",
        marker="Action:",
        seed=0,
        tokeniser=Tokeniser(tokenizer, 1024),
    )


async def test_transformers_float32_and_bfloat16(smollm, requests, reference):
    model, tokenizer, _ = smollm
    few = [first_actions(r, 3) for r in requests]
    expected = [reference(model, r) for r in few]
    for dtype, limit in ((None, 0.001), (torch.bfloat16, 0.3)):
        engine = TransformersEngine(model, Tokeniser(tokenizer, 2048), compute_dtype=dtype)
        answers = await engine.score(few)
        for answer, want in zip(answers, expected, strict=True):
            check(answer, want, limit)
        assert [len(a.token_logprobs) for a in answers] == [3, 3]
        await engine.close()


@pytest.mark.parametrize(
    ("residual", "stored"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
async def test_residual_dtype_of_the_engines_copy(residual, stored, smollm, requests):
    """Its copy is stored as asked, and either way near the float32 engine."""
    few = [first_actions(r, 3) for r in requests]
    settings = LLMSettings(
        engine="transformers", dtype="bfloat16", residual_dtype=residual, score_cache_size=0
    )
    engine = await start(settings, smollm)
    assert engine.model.model.norm.weight.dtype == stored and engine.dtype == torch.bfloat16
    assert engine.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    exact = TransformersEngine(smollm[0], engine.tokeniser)
    for got, want in zip(await engine.score(few), await exact.score(few), strict=True):
        assert got.totals() == pytest.approx(want.totals(), abs=0.3)
    await engine.close()
    await exact.close()


def short_requests(smollm) -> list[TokenisedRequest]:
    """Two states in a few words: training is to be seen here, and long prompts take minutes."""
    rooms = ("A dark cellar. There are stairs.", "A small kitchen. The door is open.")
    return Tokeniser(smollm[1], 256).requests(
        [("You play a text adventure.\n", f"{room}\nAction:") for room in rooms],
        [("go up", "look", "take lamp")] * 2,
    )


def thoughtful(smollm, asked: TokenisedRequest, **fields):
    """A decision behind a thought that the real model may have written."""
    marker = tuple(smollm[1]("\nAction:", add_special_tokens=False)["input_ids"])
    written = tuple(smollm[1](" The door is north.", add_special_tokens=False)["input_ids"])
    return sample(
        asked.with_thought(written + marker),
        thought_tokens=len(written + marker),
        thought_logprobs=(-1.0,) * len(written),
        **fields,
    )


def reinforced(smollm, **rft):
    """A trainer on a copy of the real model: two passes, adapters on the last layers."""
    torch.manual_seed(0)  # of the adapters
    return trainer_of(
        copy.deepcopy(smollm[0]),
        rft=rft_settings(epochs=2, advantage="raw", **rft),
        lora=LoraSettings(enable=True, rank=8, last_layers=4),
        learning_rate=3e-4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "surrogate"),
    # Each once; all pairs of them on tiny models: tests/llm/update/test_objectives.py.
    [("action", "clipped"), ("token", "reinforce"), ("sequence", "clipped")],
)
def test_reinforcement_of_the_real_model(objective, surrogate, smollm):
    """A good action gets likelier, a bad one less; a written thought goes with the good one."""
    few = short_requests(smollm)
    good = thoughtful(smollm, few[0], value_target=1.0)
    bad = sample(few[1], action_index=1, value_target=-1.0)
    trainer = reinforced(smollm, objective=objective, surrogate=surrogate, cot_weight=1.0)

    def now() -> tuple[float, float, float]:
        with torch.no_grad():
            thought = says(trainer.weights().module, good)[1].sum()
        return policy(trainer, good.request)[0], policy(trainer, bad.request)[1], thought

    before = now()
    metrics = trainer.update({"rft": [good, bad]})
    after = now()
    assert after[0] > before[0] and after[1] < before[1] and after[2] > before[2]
    assert metrics["rft_ratio"] != 1.0 and metrics["rft_epochs"] == 2.0


@pytest.mark.slow
def test_the_real_models_thought_without_weight_is_prompt(smollm):
    """The weights become to the last bit those of training where the thought was given to it."""
    asked = short_requests(smollm)[0]
    drawn = thoughtful(smollm, asked, value_target=1.0)
    given = sample(drawn.request, value_target=1.0)
    ends = []
    for one, cot in ((drawn, 0.0), (given, 0.0), (drawn, 1.0)):
        trainer = reinforced(smollm, objective="token", cot_weight=cot)
        trainer.update({"rft": [one]})
        ends.append(trainer.state_dict()["model"])
    same = [all(torch.equal(end[n], w) for n, w in ends[0].items()) for end in ends]
    assert same == [True, True, False]


@pytest.mark.slow
def test_the_real_models_thoughts_learn_to_end(smollm):
    """Of two thoughts, as good as expected, the one that the LLM ended gets likelier."""
    few = short_requests(smollm)
    ended = thoughtful(smollm, few[0], thought_ended=True)
    cut = thoughtful(smollm, few[1])
    trainer = reinforced(smollm, objective="token", cot_weight=1.0, format_reward=1.0)

    def thoughts() -> list[float]:
        with torch.no_grad():
            return [says(trainer.weights().module, one)[1].sum().item() for one in (ended, cut)]

    before = thoughts()
    metrics = trainer.update({"rft": [ended, cut]})
    gained = [b - a for a, b in zip(before, thoughts(), strict=True)]
    assert metrics["rft_reasoning_ended"] == 0.5 and metrics["rft_advantage_raw"] == 0.0
    assert gained[0] > gained[1]


@pytest.mark.slow
def test_checkpointing_of_the_real_model(smollm):
    """The same step, adapters below and above."""
    asked, ends = short_requests(smollm), []
    for on in (False, True):
        torch.manual_seed(0)  # of the adapters
        trainer = trainer_of(
            copy.deepcopy(smollm[0]),
            lora=LoraSettings(enable=True, rank=4),
            learning_rate=1e-4,
            gradient_checkpointing=on,
        )
        metrics = trainer.update({"sft": [sample(r) for r in asked]})
        ends.append((metrics["sft_grad_norm"], policy(trainer, asked[0])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-3)
    assert ends[0][1].tolist() == pytest.approx(ends[1][1].tolist(), abs=1e-3)


def _trained(smollm, requests):
    """A trainer on a copy of the real model after one update; its tied head differs from the
    published one.
    """
    trainer = trainer_of(copy.deepcopy(smollm[0]), learning_rate=1e-4, dtype="auto")
    target = (1.0,) + (0.0,) * (len(requests[0].action_ids) - 1)
    trainer.update({"sft": [sample(requests[0], target_policy=target)]})
    return trainer


vllm_tests = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.asyncio(loop_scope="module"),
]
SETTINGS = LLMSettings(
    engine="vllm",
    required=True,
    score_cache_size=0,
    max_restarts=1,
    reasoning=ReasoningSettings(max_new_tokens=8, temperature=0.0),
    vllm=VLLMSettings(dtype="float32", max_model_len=1024, kv_cache_gb=0.5),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(smollm):
    engine = await start(SETTINGS, smollm)
    yield engine
    await engine.close()
    assert engine._engine.process_ids == []


class TestVLLM:
    pytestmark = vllm_tests

    async def test_equals_reference_with_and_without_reasoning(
        self, vllm, smollm, requests, reference
    ):
        model, t = smollm[0], vllm.tokeniser
        thinking = dataclasses.replace(first_actions(requests[1], 2), reasoning=True)
        buys = tuple(f"{w}{i}" for i in range(50) for w in ("buy ", "sell ", "", "x"))
        odd, many, none = t.requests(
            [("", "Go."), ("", "Pick."), ("", "The end.")],
            [("öffne Tür", "", "go", "go north", "go"), buys, ()],
        )
        answers = await vllm.score([requests[0], thinking, odd, many, none])
        few = first_actions(requests[0], 4)
        check((await vllm.score([few]))[0], reference(model, few), 0.005)
        assert t.decode(answers[1].thought_ids).endswith("\nAction:")
        thought = thinking.with_thought(answers[1].thought_ids)
        check(answers[1], reference(model, thought), 0.005)
        assert answers[2].token_logprobs[2] == answers[2].token_logprobs[4]
        others = await TransformersEngine(model, t).score([requests[0], odd, many])
        for answer, other in zip((answers[0], answers[2], answers[3]), others, strict=True):
            assert answer.totals() == pytest.approx(other.totals(), abs=0.005)
        assert answers[4].token_logprobs == ()

    async def test_a_thought_is_the_same_ids_as_transformers_writes(self, vllm, smollm, requests):
        prompts = [r.prompt_ids for r in requests]
        own = TransformersEngine(smollm[0], vllm.tokeniser)
        greedy = await own.generate(prompts, 8, 0.0)
        theirs = await vllm.generate(prompts, 8, 0.0)
        assert [a.ids for a in theirs] == [a.ids for a in greedy]
        for a, b in zip(theirs, greedy, strict=True):
            assert list(a.logprobs) == pytest.approx(b.logprobs, abs=0.01)
        # A stop text ends the answer with the token that completes it.
        stop = (vllm.tokeniser.decode(greedy[0].ids[2:3]),)
        theirs, ours = [await e.generate(prompts, 8, 0.0, stop) for e in (vllm, own)]
        assert [a.ids for a in theirs] == [a.ids for a in ours]

    async def test_new_weights_answer_and_survive_a_killed_engine(
        self, vllm, smollm, requests, reference
    ):
        before = (await vllm.score(requests))[0]
        trainer = _trained(smollm, requests)
        report = await publish(vllm, trainer, requests[1])
        assert report["head_error"] == 0.0 and report["canary_diff"] < 0.005
        few = first_actions(requests[0], 4)
        expected = reference(trainer.weights().module, few)
        fresh = (await vllm.score(requests))[0]
        check((await vllm.score([few]))[0], expected, 0.005)
        assert fresh.weights_version == 1
        assert max(abs(a - b) for a, b in zip(fresh.totals(), before.totals(), strict=True)) > 0.5

        for pid in vllm._engine.process_ids:
            os.kill(pid, signal.SIGKILL)
        check((await vllm.score([few]))[0], expected, 0.005)
        assert vllm.stats()["engine_restarts"] == 1 and vllm.name == "vllm"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
async def test_vllm_in_bfloat16_with_and_without_reasoning_and_after_an_update(
    smollm, requests, reference
):
    """Within 0.3 of float32, the number format of a run; after an update, of float32 with the
    weights rounded alike.
    """
    model = smollm[0]
    settings = dataclasses.replace(
        SETTINGS, vllm=dataclasses.replace(SETTINGS.vllm, dtype="bfloat16")
    )
    few = [first_actions(r, 3) for r in requests]
    thinking = dataclasses.replace(few[1], reasoning=True)
    engine = await start(settings, smollm)
    try:
        before = await engine.score([*few, thinking])
        asked = [*few, thinking.with_thought(before[2].thought_ids)]
        for answer, request in zip(before, asked, strict=True):
            check(answer, reference(model, request), 0.3)
        trainer = _trained(smollm, requests)
        await publish(engine, trainer, requests[1])
        rounded = copy.deepcopy(trainer.weights().module).bfloat16().float()
        answers = await engine.score(few)
        moved = 0.0
        for answer, old, request in zip(answers, before[:2], few, strict=True):
            check(answer, reference(rounded, request), 0.3)
            pairs = zip(answer.totals(), old.totals(), strict=True)
            moved = max(moved, *(abs(a - b) for a, b in pairs))
        assert moved > 0.5
    finally:
        await engine.close()


def test_asyncio_is_not_blocked_by_the_module():
    """The engines' modules import without vLLM and without a running loop."""
    code = (
        "import priorzero.llm.engines.choice, priorzero.llm.engines.vllm_engine, sys\n"
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert asyncio.iscoroutinefunction(create_engine)
