"""From a played step to what the LLM is trained on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from priorzero.data.segment import StepRecord
from priorzero.llm.update.samples import build_sample
from priorzero.types import ActionScores, TextState
from tests.llm.decisions import REQUESTS, ids

ANSWER = ActionScores(((-1.0, -2.0), (-3.0,)), weights_version=4)
ASKED = REQUESTS[0]
THOUGHT = ids("A door.\nAction:")


def step(**fields) -> StepRecord:
    usual = dict(
        state=TextState("Room.", ("up", "us")),
        observation=np.zeros(2, dtype=np.float32),
        valid_actions=("up", "us"),
        valid_ids=np.array([3, 5]),
        action_index=1,
        visit_counts=np.array([1.0, 3.0]),
        behaviour=np.array([0.4, 0.6]),
        target_policy=np.array([0.25, 0.75]),
        root_value=2.0,
        predicted_value=1.5,
        reward=0.0,
        done_kind="running",
        timestep=0,
        request=ASKED,
        scores=ANSWER,
    )
    return StepRecord(**usual | fields)


def test_a_sample_is_the_step_in_numbers():
    sample = build_sample(step(), 4.0)
    assert sample.request == ASKED and sample.thought_tokens == 0
    assert sample.target_policy == (0.25, 0.75) and sample.behaviour == (0.4, 0.6)
    assert (sample.action_index, sample.policy_version) == (1, 4)
    assert sample.collected_logprobs == ANSWER.token_logprobs
    assert (sample.value_target, sample.predicted_value, sample.advantage) == (4.0, 1.5, 2.5)


def test_a_target_of_the_llms_own_comes_before_the_world_models():
    sample = build_sample(step(llm_target=np.array([0.875, 0.125])), 4.0)
    assert sample.target_policy == (0.875, 0.125)


def test_a_step_without_an_llm_is_none():
    assert build_sample(step(request=None, scores=None), 4.0) is None


def test_a_step_the_llm_did_not_answer_is_trained_on_without_a_reference():
    sample = build_sample(step(scores=None), 4.0)
    assert sample.request == ASKED and sample.collected_logprobs is None


class TestChainOfThought:
    asked = dataclasses.replace(ASKED, reasoning=True)

    def test_the_thought_is_the_end_of_the_prompt(self):
        written = (-0.5, -1.5, -2.5)
        answer = dataclasses.replace(ANSWER, thought_ids=THOUGHT, thought_logprobs=written)
        sample = build_sample(step(request=self.asked, scores=answer), 4.0)
        assert sample.request.prompt_ids == ASKED.prompt_ids + THOUGHT
        assert sample.request.body_ids[-sample.thought_tokens :] == THOUGHT
        assert not sample.request.reasoning
        assert sample.thought_logprobs == written and not sample.thought_ended
        ended = dataclasses.replace(answer, thought_ended=True)
        assert build_sample(step(request=self.asked, scores=ended), 4.0).thought_ended
        assert [sample.request.body_ids[i] for i in sample.written] == list(THOUGHT[:3])

    @pytest.mark.parametrize("scores", [None, ANSWER])
    def test_a_step_without_the_thought_it_wanted_is_none(self, scores):
        """The canary would compare two thoughts generated one after the other."""
        assert build_sample(step(request=self.asked, scores=scores), 4.0) is None
