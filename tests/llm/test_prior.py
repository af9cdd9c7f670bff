"""From states to requests: a prompt is built and tokenised once per decision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.prior import LLMPrior, prior_table, reduced
from priorzero.types import TextState
from tests.test_buffer import Episode

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


def test_a_decisions_table_says_what_it_was_drawn_from():
    searched = Episode(0, [0.0], "running").steps[0]
    count = len(searched.valid_actions)
    assert "| visits |" in prior_table(searched, "sum")

    drawn = np.arange(1, count + 1) / np.arange(1, count + 1).sum()
    alone = replace(searched, visit_counts=np.zeros(count), behaviour=drawn)
    table = prior_table(alone, "sum").splitlines()
    assert table[0].endswith("| drawn from |")
    assert [line.split(" | ")[-1] for line in table[2:]] == [f"{p:.3f} |" for p in drawn[::-1]]


async def test_answers_come_in_order_of_the_requests(prior, reference):
    asked = prior.requests(STATES, ACTIONS)
    answers = await prior.ask(asked)
    for request, answer in zip(asked, answers, strict=True):
        expected = reference(prior.engine.model, request)
        assert reduced(answer, "sum") == pytest.approx([sum(a) for a in expected], abs=1e-4)
        means = [sum(a) / len(a) for a in expected]
        assert reduced(answer, "mean") == pytest.approx(means, abs=1e-4)
    assert reduced(None, "sum") is None
