"""From states to requests: a prompt is built and tokenised once per decision."""

from __future__ import annotations

import pytest

from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.prior import LLMPrior, reduced
from priorzero.types import TextState

STATES = [TextState(f"Room {i}.", ("go", "look")) for i in range(3)]
ACTIONS = [s.valid_actions for s in STATES]


@pytest.fixture
def built() -> list[str]:
    return []


@pytest.fixture
def prior(byte_model, tokeniser, built) -> LLMPrior:
    def build_prompt(state: TextState) -> tuple[str, str, bool]:
        built.append(state.observation)
        return "Head. ", state.observation, state.observation == "Room 1."

    return LLMPrior(TransformersEngine(byte_model, tokeniser), build_prompt)


def test_equal_states_share_one_request(prior, built, tokeniser):
    first = prior.requests(STATES, ACTIONS)
    again = prior.requests([STATES[2], TextState("Room 2.", ("go", "look"))], ACTIONS[1:])
    assert again[0] is again[1] is first[2]
    assert built == ["Room 0.", "Room 1.", "Room 2."]
    assert prior.counters["prompts"] == 3 and prior.counters["prompts_cut"] == 1
    want = tokeniser.requests([("Head. ", "Room 2.")], [("go", "look")])[0]
    assert first[2] == want


def test_other_actions_of_a_state_are_another_request(prior):
    few, all_ = prior.requests([STATES[0]] * 2, [("go",), ("go", "look")])
    assert len(few.action_ids) == 1 and len(all_.action_ids) == 2


def test_reasoning_is_asked_for_in_every_request(byte_model, tokeniser):
    engine = TransformersEngine(byte_model, tokeniser)
    prior = LLMPrior(engine, lambda s: ("", s.observation, False), reasoning=True)
    assert all(r.reasoning for r in prior.requests(STATES, ACTIONS))


async def test_answers_come_in_order_of_the_requests(prior, reference):
    asked = prior.requests(STATES, ACTIONS)
    answers = await prior.ask(asked)
    for request, answer in zip(asked, answers, strict=True):
        expected = reference(prior.engine.model, request)
        assert reduced(answer, "sum") == pytest.approx([sum(a) for a in expected], abs=1e-4)
        means = [sum(a) / len(a) for a in expected]
        assert reduced(answer, "mean") == pytest.approx(means, abs=1e-4)
    assert reduced(None, "sum") is None
