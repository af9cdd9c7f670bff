"""What is asked of an LLM, and the one function that turns it into token ids.

Trainer and engines tokenise through `TextTokeniser.tokenise` only, so a log-probability means the
same everywhere:

    prompt ids = tok(head) + tok(body)          action ids = tok(action_prefix + action) +
    [terminator]

``head`` is the part that stays fixed over a run (system text), so its keys and values are computed
once. The terminator is the token with which the chat template ends an assistant's turn; with it "go
north" and "go north east" are comparable, because the shorter one also has to stop.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from priorzero.types import PriorZeroError, TokenisedRequest

_SENTINEL = "PRIORZEROUSERTEXT"


@dataclass(frozen=True)
class ScoreRequest:
    """One state to score. Texts are already in the model's chat format.

    ``actions`` may be empty (empty result), hold duplicates (equal results), empty strings (the
    terminator alone) and any Unicode. With ``reasoning`` the engine first generates a chain of
    thought up to the action marker.
    """

    head: str
    body: str
    actions: tuple[str, ...]
    action_prefix: str = ""
    reasoning: bool = False

    def with_reasoning(self, text: str) -> ScoreRequest:
        """The same state after the chain of thought ``text`` (which includes the action marker)."""
        return replace(self, body=self.body + text, reasoning=False)


@dataclass(frozen=True)
class ReasoningSettings:
    """How a chain of thought is generated before the actions are scored.

    Generation stops at ``marker``. Where the model ends or runs out of tokens without it, the
    marker is appended on a new line and the case is counted: the actions are scored either way.
    """

    max_new_tokens: int = 96
    temperature: float = 1.0
    marker: str = "Action:"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not self.marker:
            raise PriorZeroError(
                f"reasoning settings {self} need max_new_tokens >= 1, temperature >= 0 and a marker"
            )

    def finish(self, generated: str) -> tuple[str, bool]:
        """Reasoning text that ends with the marker, and whether the model had written the marker
        itself.
        """
        before, marker, _ = generated.partition(self.marker)
        if marker:
            return before + marker, True
        return f"{generated.rstrip()}\n{self.marker}", False


class PromptTooLongError(PriorZeroError):
    """A prompt does not fit the model. Trim it, oldest history first
    (`TextTokeniser.count_tokens`), and ask again.
    """


class TextTokeniser:
    """Tokenises requests for one model; thread-safe, and remembers the parts that repeat (heads and
    actions).

    :param max_tokens: longest prompt plus longest action the model accepts.
    """

    def __init__(self, tokenizer, max_tokens: int, memory: int = 50_000) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.terminator_id = terminator_id(tokenizer)
        self._memory = memory
        self._seen: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def _ids(self, text: str, remember: bool) -> tuple[int, ...]:
        if not text:
            return ()
        with self._lock:
            if remember and text in self._seen:
                self._seen.move_to_end(text)
                return self._seen[text]
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if remember:
                self._seen[text] = ids
                if len(self._seen) > self._memory:
                    self._seen.popitem(last=False)
            return ids

    def tokenise(self, request: ScoreRequest) -> TokenisedRequest:
        """Token ids of ``request``.

        :raises PromptTooLongError: prompt and longest action together exceed ``max_tokens``.
        """
        return self.tokenise_all([request])[0]

    def tokenise_all(self, requests: Sequence[ScoreRequest]) -> list[TokenisedRequest]:
        """Token ids of ``requests``, as `tokenise` one by one gives them; their bodies go through
        the tokenizer together.

        Fast tokenizers share a batch out to the cores: sixteen prompts of 4,000 tokens took 39
        instead of 224 ms on 16 cores, beside 250 ms for their forward on an H100.

        :raises PromptTooLongError: prompt and longest action of a request together exceed
            ``max_tokens``.
        """
        bodies = [r.body for r in requests]
        with self._lock:
            found = (
                self.tokenizer(bodies, add_special_tokens=False)["input_ids"]
                if any(bodies)
                else [()] * len(bodies)
            )
        return [self._request(r, tuple(ids)) for r, ids in zip(requests, found, strict=True)]

    def _request(self, request: ScoreRequest, body_ids: tuple[int, ...]) -> TokenisedRequest:
        end = (self.terminator_id,)
        tokens = TokenisedRequest(
            head_ids=self._ids(request.head, True),
            body_ids=body_ids,
            action_ids=tuple(
                self._ids(request.action_prefix + a, True) + end for a in request.actions
            ),
        )
        if not tokens.num_prompt_tokens:
            raise PriorZeroError(
                "a prompt is empty, so there is nothing to score after; give at least a body"
            )
        longest = max((len(a) for a in tokens.action_ids), default=0)
        if tokens.num_prompt_tokens + longest > self.max_tokens:
            raise PromptTooLongError(
                f"a prompt of {tokens.num_prompt_tokens} tokens with actions of up to {longest} exceeds the model's "
                f"{self.max_tokens}; drop the oldest history first or shorten the observation"
            )
        return tokens

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Ids of a whole prompt given as one string, for generation."""
        return self._ids(prompt, False)

    def count_tokens(self, text: str) -> int:
        """How many tokens ``text`` takes as a head, a body or an action (without its terminator)."""
        return len(self._ids(text, False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        with self._lock:
            return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def terminator_id(tokenizer) -> int:
    """The token that ends an assistant's turn in the chat template, or the end-of-sequence token
    without one.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
        tail = (
            tokenizer.apply_chat_template(messages, tokenize=False).rpartition(_SENTINEL)[2].strip()
        )
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return ids[0]
    if tokenizer.eos_token_id is None:
        raise PriorZeroError(
            "the tokenizer has neither a chat template's end of turn nor an end-of-sequence token"
        )
    return tokenizer.eos_token_id


def model_max_tokens(config, limit: int | None = None) -> int:
    """Longest sequence the model's configuration allows, lowered to ``limit`` where given."""
    own = getattr(config, "max_position_embeddings", None) or 1 << 30
    return min(own, limit) if limit else own
