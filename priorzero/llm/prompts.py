"""What the LLM reads: pure functions from a `TextState` to prompt text.

A prompt is `head + body`. The head is the chat template's text up to the start of the user's
content: role, goal and answer format, the same in every step of a run, so an engine computes its
keys and values once. The body is the rest, up to and including the assistant's turn and, without
reasoning, the action marker: what follows is the action.

Head, body and actions are tokenised each on its own (`priorzero.llm.scoring.requests`). The prompt
ends without a space: tokenizers join a space to the word after it, so it belongs to the action.

Called by the LLM's prior (`prompt_builder` makes what it takes). Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2.exceptions import TemplateError

from priorzero.settings.llm import PromptSettings
from priorzero.types import HistoryItem, PriorZeroError, TextState

ACTION_MARKER = "Action:"
REASONING_MARKER = "Reasoning:"
CUT_MARK = " [...]"

_ROLE = "You are playing a text adventure. You read what the game says and choose the next command."
_DEFAULT_GOAL = "Score as many points as you can."
_FORMAT_PLAIN = f'Answer with one line: "{ACTION_MARKER}" followed by the command and nothing else.'
_FORMAT_COT = (
    f'Answer in this format: "{REASONING_MARKER}" followed by a short chain of thought about the '
    f'situation, then on a new line "{ACTION_MARKER}" followed by the command and nothing else.'
)
_FORMAT_CHOICE = "The command must be one of the valid actions, copied exactly."
_SENTINEL = "@@the-users-content-starts-here@@"


@dataclass(frozen=True)
class PromptTruncation:
    """What `max_prompt_tokens` cost. All zero means that nothing was left out for it."""

    history_dropped: int = 0
    """Oldest past steps left out."""
    observations_shortened: int = 0
    """Past observations cut below `max_observation_chars`."""
    valid_actions_dropped: int = 0
    """Valid actions not listed in the text (they are scored all the same)."""
    observation_chars_cut: int = 0
    """Characters cut from the end of the current observation."""

    def __bool__(self) -> bool:
        return self != PromptTruncation()


@dataclass(frozen=True)
class PromptParts:
    """A prompt, cut where its fixed part ends. `num_tokens` counts head and body, tokenised
    separately.
    """

    head: str
    body: str
    num_tokens: int
    truncation: PromptTruncation = field(default_factory=PromptTruncation)

    @property
    def text(self) -> str:
        return self.head + self.body


def system_text(state: TextState, settings: PromptSettings) -> str:
    """Role, goal and answer format: all that is the same in every step of a run."""
    parts = [
        _ROLE,
        f"Goal: {_clean(state.goal) or _DEFAULT_GOAL}",
        _FORMAT_COT if settings.use_cot else _FORMAT_PLAIN,
    ]
    if settings.include_valid_actions:
        parts.append(_FORMAT_CHOICE)
    return "\n".join(parts)


def user_text(state: TextState, settings: PromptSettings) -> str:
    """Recent history with rewards, oldest first, then the current observation, then the valid
    actions.
    """
    parts = []
    history = _recent(state, settings)
    if history:
        steps = (_history_text(item, settings.max_observation_chars) for item in history)
        parts.append("Recent steps, oldest first:\n\n" + "\n\n".join(steps))
    parts.append("Current observation:\n" + _clean(state.observation))
    if settings.include_valid_actions and state.valid_actions:
        parts.append("Valid actions: " + "; ".join(state.valid_actions))
    return "\n\n".join(parts)


def opening_of(settings: PromptSettings) -> str:
    """How the assistant's turn begins, which is the end of every prompt."""
    return REASONING_MARKER if settings.use_cot else ACTION_MARKER


def build_prompt(state: TextState, settings: PromptSettings, tokenizer: Any) -> PromptParts:
    """The prompt in the tokenizer's own chat template, at most `settings.max_prompt_tokens` long.

    When it is longer: the oldest past steps go first, all but the last; then the last one's
    observation is shortened, then that step goes too; then the list of valid actions loses its end;
    and only then does the current observation lose its end. `truncation` says what was done.
    PriorZeroError if the fixed part alone is too long.

    A template that knows no system role gets the system text at the start of the user's message
    (the head then ends after it); a tokenizer without a template gets plain paragraphs.
    """
    render = _renderer(system_text(state, settings), settings, tokenizer)
    head = render(_SENTINEL).partition(_SENTINEL)[0]
    head_tokens = _count(tokenizer, head)

    def make(shown: TextState, used: PromptSettings, truncation: PromptTruncation) -> PromptParts:
        whole = render(user_text(shown, used))
        # The head is what every user content shares; a template that rewrites earlier text would
        # have none.
        cut = len(head) if whole.startswith(head) else 0
        body_tokens = _count(tokenizer, whole[cut:])
        return PromptParts(
            whole[:cut], whole[cut:], (head_tokens if cut else 0) + body_tokens, truncation
        )

    shown = replace(state, history=_recent(state, settings))
    parts = make(shown, settings, PromptTruncation())
    if parts.num_tokens <= settings.max_prompt_tokens:
        return parts
    return _shorten(shown, settings, make)


def prompt_builder(settings: PromptSettings, tokenizer: Any) -> Callable:
    """What `priorzero.llm.prior.LLMPrior` takes: a function from a state to head, body, and whether
    anything was cut to fit.
    """

    def build(state: TextState) -> tuple[str, str, bool]:
        prompt = build_prompt(state, settings, tokenizer)
        return prompt.head, prompt.body, bool(prompt.truncation)

    return build


def read_messages(prompt: str, settings: PromptSettings, tokenizer: Any) -> list[dict[str, str]]:
    """The messages that give a prompt in the tokenizer's chat template: what `build_prompt` did,
    undone.

    Args:
        prompt: head and body, without a chain of thought.
        settings: with which it was built.

    Returns:
        role and content of each, the system's first where the template knows one.

    Raises:
        PriorZeroError: the tokenizer has no chat template, or the prompt is not of this one.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PriorZeroError("the tokenizer has no chat template, so its prompts have no messages")
    opening = opening_of(settings)

    for roles in (("system", "user"), ("user",)):
        marks = [f"{_SENTINEL}{role}" for role in roles]
        form = [dict(role=r, content=m) for r, m in zip(roles, marks, strict=True)]
        try:
            fixed = re.split("|".join(marks), _apply(tokenizer, form) + opening)
        except TemplateError:  # it refuses the system role
            continue
        contents = re.fullmatch("(.*?)".join(map(re.escape, fixed)), prompt, re.S)
        if len(fixed) == len(roles) + 1 and contents:
            pairs = zip(roles, contents.groups(), strict=True)
            return [dict(role=role, content=content) for role, content in pairs]
    raise PriorZeroError(
        "a prompt is not what this tokenizer's chat template makes; name the tokenizer that the "
        "run had"
    )


def _shorten(
    state: TextState,
    settings: PromptSettings,
    make: Callable[[TextState, PromptSettings, PromptTruncation], PromptParts],
) -> PromptParts:
    """The first prompt that fits, in the order of loss that `build_prompt` tells."""

    total = len(state.history)
    last, bare = state.history[-1:], replace(state, history=())
    chars = min(len(_clean(last[0].observation)), settings.max_observation_chars) if last else 0
    actions = state.valid_actions if settings.include_valid_actions else ()
    observation = _clean(state.observation)

    def with_steps(kept: int) -> PromptParts:
        shown = replace(state, history=state.history[total - kept :])
        return make(shown, settings, PromptTruncation(history_dropped=total - kept))

    def with_chars(kept: int) -> PromptParts:
        truncation = PromptTruncation(history_dropped=total - 1, observations_shortened=1)
        shorter = replace(settings, max_observation_chars=kept)
        return make(replace(state, history=last), shorter, truncation)

    def with_actions(kept: int) -> PromptParts:
        truncation = PromptTruncation(
            history_dropped=total, valid_actions_dropped=len(actions) - kept
        )
        return make(replace(bare, valid_actions=actions[:kept]), settings, truncation)

    def with_observation(kept: int) -> PromptParts:
        truncation = PromptTruncation(total, 0, len(actions), len(observation) - kept)
        shown = replace(bare, observation=_cut(observation, kept), valid_actions=())
        return make(shown, settings, truncation)

    def fits(parts: PromptParts) -> bool:
        return parts.num_tokens <= settings.max_prompt_tokens

    for with_kept, least, most in (
        (with_steps, 1, total - 1),
        (with_chars, 1, chars - 1),
        (with_actions, 0, len(actions)),
        (with_observation, 0, len(observation) - 1),
    ):
        if least <= most and fits(with_kept(least)):
            # By bisection: each trial tokenises the whole prompt, which takes 14 ms at 4,000
            # tokens.
            return with_kept(_largest(lambda kept: fits(with_kept(kept)), least, most))  # noqa: B023

    raise PriorZeroError(
        f"max_prompt_tokens={settings.max_prompt_tokens} has no room for an observation: the "
        f"fixed part of the prompt alone takes {with_observation(0).num_tokens} tokens. Raise "
        "max_prompt_tokens or shorten the goal."
    )


def _clean(text: str) -> str:
    """Without spaces at line ends, runs of empty lines and outer white space: some templates strip,
    so we do first.
    """
    lines = (line.rstrip() for line in text.replace("\r\n", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars].rstrip() + CUT_MARK


def _recent(state: TextState, settings: PromptSettings) -> tuple[HistoryItem, ...]:
    return state.history[-settings.history_length :] if settings.history_length else ()


def _history_text(item: HistoryItem, max_chars: int) -> str:
    observation = _cut(_clean(item.observation), max_chars)
    return f"Observation: {observation}\n{ACTION_MARKER} {item.action}\nReward: {item.reward:g}"


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Largest n in `[low, high]` with `holds(n)`, by bisection; `holds(low)` is known."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _renderer(system: str, settings: PromptSettings, tokenizer: Any) -> Callable[[str], str]:
    """A function from the user's content to the whole prompt text, in the form this tokenizer's
    template can take.
    """
    opening = opening_of(settings)
    if not getattr(tokenizer, "chat_template", None):
        start = tokenizer.bos_token or ""
        return lambda user: f"{start}{system}\n\n{user}\n\n{opening}"

    def with_system(user: str) -> str:
        form = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return _apply(tokenizer, form) + opening

    def folded(user: str) -> str:
        return _apply(tokenizer, [{"role": "user", "content": f"{system}\n\n{user}"}]) + opening

    try:
        # Some templates refuse the system role, some leave it out without a word.
        return with_system if system in with_system(_SENTINEL) else folded
    except TemplateError:
        return folded


def _apply(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    # Templates of reasoning models open their own thinking otherwise; all others ignore the switch.
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else 0
