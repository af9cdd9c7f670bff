"""Texts become ids in one way, within the model's limits, and cost little memory."""

from __future__ import annotations

import pytest

from priorzero.llm.scoring.requests import PromptTooLongError, Tokeniser


def one(tokeniser, head: str, body: str, actions: tuple[str, ...]):
    return tokeniser.requests([(head, body)], [actions])[0]


def test_ids_are_concatenated_and_actions_end_with_the_terminator(tokeniser):
    request = one(tokeniser, "AB", "C", ("go", "", "café", "go"))
    assert request.prompt_ids == tuple(3 + b for b in b"ABC")
    assert request.action_ids[0] == (*(3 + b for b in b" go"), 1)
    assert request.action_ids[1] == (3 + ord(" "), 1)
    assert request.action_ids[2] == (*(3 + b for b in " café".encode()), 1)
    assert request.action_ids[3] == request.action_ids[0]
    assert not request.reasoning


def test_together_and_one_by_one_are_alike(tokeniser):
    prompts, actions = [("H", "one"), ("H", ""), ("", "three")], [("a",), (), ("b", "c")]
    alone = [one(tokeniser, *p, a) for p, a in zip(prompts, actions, strict=True)]
    assert tokeniser.requests(prompts, actions) == alone
    assert tokeniser.requests([], []) == []


def test_a_thought_joins_the_body_and_ends_the_wait_for_it(tokeniser):
    asked = tokeniser.requests([("H", "B")], [("go",)], reasoning=True)[0]
    assert asked.reasoning
    after = asked.with_thought((7, 8))
    assert after.body_ids == (*asked.body_ids, 7, 8) and not after.reasoning
    assert (after.head_ids, after.action_ids) == (asked.head_ids, asked.action_ids)


def test_too_long_prompts_are_errors(tokeniser):
    one(tokeniser, "", "x" * 508, ("ab",))  # 508 + " ab" + terminator = 512 fits
    with pytest.raises(PromptTooLongError, match="max_prompt_tokens"):
        one(tokeniser, "", "x" * 509, ("ab",))
    with pytest.raises(AssertionError, match="empty prompt"):
        one(tokeniser, "", "", ("ab",))


def test_equal_ids_are_one_object(tokeniser):
    """A buffer holds thousands of prompts: an integer of its own per token would be 28 bytes."""

    class Big(type(tokeniser.tokenizer)):
        def __call__(self, text, add_special_tokens=False):
            if isinstance(text, list):
                return {"input_ids": [self(t)["input_ids"] for t in text]}
            return {"input_ids": [100_000 + b for b in text.encode()]}

    tokeniser = Tokeniser(Big(), 512)
    a, b = tokeniser.requests([("", "xy"), ("", "yx")], [("a",), ("a",)])
    assert a.body_ids == (100_120, 100_121)
    assert a.body_ids[0] is b.body_ids[1]


def test_terminator_of_the_real_model_is_its_end_of_turn(smollm):
    _, tokenizer, _ = smollm
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Tokeniser(tokenizer, 2048).terminator_id == end
