"""One training phase: what is drawn, trained and published, and in which order."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from priorzero.llm.engines.base import LLMEngineError
from priorzero.llm.engines.gate import Gate
from priorzero.llm.prior import LLMPrior
from priorzero.llm.update.phase import LLMPhase
from priorzero.llm.weights.canary import StaleWeightsError
from priorzero.types import ActionScores, PriorZeroError
from tests.llm.decisions import REQUESTS, SAMPLES, rft_settings, sample, settings


class FakeTrainer:
    """Learns nothing; tells what it was given."""

    device = torch.device("cpu")

    def __init__(self, log: list, fault: Exception | None = None) -> None:
        self.version, self._log, self._fault = 0, log, fault

    def update(self, samples):
        self._log.append(("update", {name: len(drawn) for name, drawn in samples.items()}))
        if self._fault:
            raise self._fault
        self.version += 1
        return {"sft_loss": 0.5}

    def weights(self):
        return "weights"

    def score(self, requests, dtype=None, *, all_layers=False):
        return [ActionScores(((-1.0,),), self.version) for _ in requests]


class FakeEngine:
    """Answers `value` for every action."""

    name, dtype, answers_apart = "fake", torch.float32, True

    def __init__(self, log: list, value: float = -1.0) -> None:
        self._log, self._value, self._version = log, value, 0

    async def sleep(self):
        self._log.append("sleep")

    async def wake(self):
        self._log.append("wake")

    async def push_weights(self, weights, version):
        self._log.append(("push", weights, version))
        self._version = version
        return {"seconds": 0.0, "bytes": 8.0}

    async def score(self, requests):
        self._log.append(("canary", requests))
        return [ActionScores(((self._value,),), self._version)]


def phase_of(log: list, *, value: float = -1.0, fault: Exception | None = None) -> LLMPhase:
    return LLMPhase(settings(), FakeTrainer(log, fault), FakeEngine(log, value))


async def test_a_phase_draws_trains_and_publishes():
    log: list = []

    def draw(count, recent):
        log.append(("draw", count, recent))
        return SAMPLES[:2] if recent == 2000 else SAMPLES[3:4]

    metrics = await phase_of(log).run(draw)

    assert log == [
        ("draw", 64, 2000),  # SFT first: the buffer's random numbers are used up in this order
        ("draw", 64, 500),
        "sleep",
        ("update", {"sft": 2, "rft": 1}),
        "wake",
        ("push", "weights", 1),
        ("canary", [REQUESTS[3]]),
    ]
    assert metrics == dict(
        sft_loss=0.5,
        rft_stale=0.0,
        rft_staleness=0.0,
        push_seconds=0.0,
        push_bytes=8.0,
        push_canary_diff=0.0,
        push_version=1.0,
    )


SCORED = ((-1.0,), (-2.0,))


async def test_decisions_of_old_weights_are_left_out_and_counted():
    """Versions 5, 4, 2 and no answer at all, seen from version 5."""
    log: list = []
    trainer = FakeTrainer(log)
    trainer.version = 5
    phase = LLMPhase(settings(rft=rft_settings(max_staleness=1)), trainer, FakeEngine(log))
    drawn = [sample(REQUESTS[0], policy_version=v, collected_logprobs=SCORED) for v in (5, 4, 2)]
    drawn.append(sample(REQUESTS[0]))

    metrics = await phase.run(lambda count, recent: drawn if recent == 500 else [])
    assert ("update", {"rft": 3}) in log
    assert metrics["rft_stale"] == 1.0 and metrics["rft_staleness"] == (0 + 1 + 3 + 0) / 4

    trainer.version = 9
    log.clear()
    metrics = await phase.run(lambda count, recent: drawn[:3] if recent == 500 else [])
    assert metrics == {"rft_stale": 3.0, "rft_staleness": (4 + 5 + 7) / 3} and log == []


async def test_objectives_without_decisions_are_left_out():
    log: list = []
    await phase_of(log).run(lambda count, recent: SAMPLES[:1] if recent == 500 else [])
    assert ("update", {"rft": 1}) in log


async def test_nothing_drawn_is_no_phase():
    log: list = []
    assert await phase_of(log).run(lambda count, recent: []) == {} and log == []


async def test_the_engine_wakes_when_training_fails():
    log: list = []
    phase = phase_of(log, fault=PriorZeroError("the LLM's loss became nan"))
    with pytest.raises(PriorZeroError, match="nan"):
        await phase.run(lambda count, recent: SAMPLES[:1])
    assert log[-1] == "wake"


async def test_an_engine_with_other_weights_ends_the_run_with_advice():
    phase = phase_of([], value=-3.0)
    with pytest.raises(PriorZeroError, match=r"stale or damaged.*--resume") as caught:
        await phase.run(lambda count, recent: SAMPLES[:1])
    assert isinstance(caught.value.__cause__, StaleWeightsError)


async def test_an_engine_that_takes_no_weights_ends_the_run_with_advice():
    class Refusing(FakeEngine):
        async def push_weights(self, weights, version):
            raise LLMEngineError("gone")

    phase = LLMPhase(settings(), FakeTrainer([]), Refusing([]))
    with pytest.raises(PriorZeroError, match=r"gone.*--resume"):
        await phase.publish()


async def test_weights_are_published_before_anything_was_drawn():
    """After a resume there is no state to compare on yet."""
    log: list = []
    assert "push_canary_diff" not in await phase_of(log).publish()
    assert log == [("push", "weights", 0)]


# ---- beside play and evaluation ------------------------------------------------------------------


async def some_turns() -> None:
    """Of the event loop and its threads: enough for what nothing holds back."""
    for _ in range(20):
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("apart", "meanwhile"),
    [(True, ["sleep", ("update", {"sft": 2}), "wake"]), (False, [])],
)
async def test_an_evaluation_keeps_the_engines_weights(apart, meanwhile):
    """An engine with weights of its own lets the LLM train meanwhile; no other does."""
    log: list = []
    phase = phase_of(log)
    phase._engine.answers_apart = apart

    def draw(count, recent):
        return SAMPLES[:2] if recent == 2000 else []

    async with phase.weights_kept():
        running = asyncio.create_task(phase.run(draw))
        await some_turns()
        assert log == meanwhile
    metrics = await running
    assert log == [
        *["sleep", ("update", {"sft": 2}), "wake"],
        *[("push", "weights", 1), ("canary", [REQUESTS[0]])],
    ]
    assert metrics["push_version"] == 1.0


@pytest.mark.parametrize("apart", [True, False])
async def test_play_asks_an_engine_only_while_it_answers_with_one_set_of_weights(apart):
    """What is asked while the LLM trains is answered at once by an engine with weights of its own,
    and after the hand-over by any other: one that is asleep would fail.
    """
    log: list = []
    gate = Gate()
    trainer, engine = FakeTrainer(log), FakeEngine(log)
    engine.answers_apart = apart
    phase = LLMPhase(settings(), trainer, engine, gate)
    prior = LLMPrior(engine, lambda state: ("", "", False), gate=gate)
    inside, go = threading.Event(), threading.Event()
    update = trainer.update

    def slow(samples):
        inside.set()
        assert go.wait(30)
        return update(samples)

    trainer.update = slow
    running = asyncio.create_task(phase.run(lambda count, recent: SAMPLES[:1]))
    assert await asyncio.to_thread(inside.wait, 30)
    asked = asyncio.create_task(prior.ask([REQUESTS[0]]))
    await some_turns()
    assert asked.done() == apart
    go.set()
    await running
    (answer,) = await asked
    assert answer.weights_version == (0 if apart else 1)
    order = [entry for entry in log if isinstance(entry, tuple)]
    kinds = [entry[0] for entry in order]
    assert kinds == (
        ["canary", "update", "push", "canary"] if apart else ["update", "push", "canary", "canary"]
    )


async def test_requests_under_way_are_answered_before_the_weights_change():
    log: list = []
    gate = Gate()
    phase = LLMPhase(settings(), FakeTrainer(log), FakeEngine(log), gate)
    async with gate.request():
        running = asyncio.create_task(phase.run(lambda count, recent: SAMPLES[:1]))
        await some_turns()
        assert log[-1] == "wake" and not running.done()
    await running
    assert ("push", "weights", 1) in log
