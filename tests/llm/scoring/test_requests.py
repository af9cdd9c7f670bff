"""Tokenisation contract, limits and terminator."""

from __future__ import annotations

import pytest

from priorzero.llm.scoring.requests import (
    PromptTooLongError,
    ReasoningSettings,
    ScoreRequest,
    TextTokeniser,
)
from priorzero.types import PriorZeroError


def test_ids_are_concatenated_and_actions_end_with_the_terminator(byte_text):
    tokens = byte_text.tokenise(ScoreRequest("AB", "C", ("go", "", "café", "go"), " "))
    assert tokens.prompt_ids == tuple(3 + b for b in b"ABC")
    assert tokens.action_ids[0] == (*(3 + b for b in b" go"), 1)
    assert tokens.action_ids[1] == (3 + ord(" "), 1)
    assert tokens.action_ids[2] == (*(3 + b for b in " café".encode()), 1)
    assert tokens.action_ids[3] == tokens.action_ids[0]
    assert byte_text.tokenise(ScoreRequest("", "x", ("",))).action_ids == ((1,),)
    assert byte_text.count_tokens("abc") == 3


def test_too_long_and_empty_prompts_are_errors(byte_model, byte_text):
    with pytest.raises(PromptTooLongError, match="oldest history"):
        byte_text.tokenise(ScoreRequest("", "x" * 510, ("ab",)))
    byte_text.tokenise(ScoreRequest("", "x" * 509, ("ab",)))  # 509 + 2 + terminator = 512 fits
    with pytest.raises(PriorZeroError, match="empty"):
        byte_text.tokenise(ScoreRequest("", "", ("ab",)))


def test_reasoning_ends_with_the_marker_always():
    settings = ReasoningSettings(marker="Action:")
    assert settings.finish("I should go.\nAction: north") == ("I should go.\nAction:", True)
    assert settings.finish("no idea ") == ("no idea\nAction:", False)
    with pytest.raises(PriorZeroError, match="max_new_tokens"):
        ReasoningSettings(max_new_tokens=0)


def test_terminator_of_the_real_model_is_its_end_of_turn(smollm):
    _, tokenizer, _ = smollm
    assert TextTokeniser(tokenizer, 2048).terminator_id == tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
