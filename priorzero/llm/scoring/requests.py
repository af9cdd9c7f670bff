"""The one place where texts become token ids.

Engines and trainers take `TokenisedRequest`s only, so a log-probability means the same everywhere:

    prompt ids = tok(head) + tok(body)          action ids = tok(" " + action) + [terminator]

The head is the part that stays fixed over a run (system text), so its keys and values are computed
once. The space belongs to the action because tokenizers join it to the word after it. The
terminator is the token with which the chat template ends an assistant's turn; with it "go north"
and "go north east" are comparable, because the shorter one also has to stop.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from priorzero.types import PriorZeroError, TokenisedRequest

ACTION_PREFIX = " "
_REMEMBERED = 50_000  # texts that repeat: heads and actions
_SENTINEL = "PRIORZEROUSERTEXT"


class PromptTooLongError(PriorZeroError):
    """A prompt does not fit the model; lower llm.prompt.max_prompt_tokens."""


class Tokeniser:
    """Tokenises for one model; thread-safe, and remembers the parts that repeat.

    Args:
        tokenizer: of Hugging Face.
        max_tokens: longest prompt plus longest action the model accepts.
    """

    def __init__(self, tokenizer, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.terminator_id = terminator_id(tokenizer)
        self.end_ids = {self.terminator_id, tokenizer.eos_token_id} - {None}
        self._seen: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._numbers: list[int] = []
        self._lock = threading.Lock()

    def requests(
        self,
        prompts: Sequence[tuple[str, str]],
        actions: Sequence[Sequence[str]],
        *,
        reasoning: bool = False,
    ) -> list[TokenisedRequest]:
        """Token ids of states; their bodies go through the tokenizer together.

        Args:
            prompts: (head, body) per state, in the model's chat format.
            actions: per state its valid actions; may be empty, and hold duplicates, empty strings
                (the terminator alone) and any Unicode.
            reasoning: a chain of thought is generated before the actions are scored.

        Raises:
            PromptTooLongError: prompt and longest action of a state exceed `max_tokens`.
        """
        bodies = [body for _, body in prompts]
        # Fast tokenizers share a batch out to the cores.
        with self._lock:
            found = [()] * len(bodies)
            if any(bodies):
                found = self.tokenizer(bodies, add_special_tokens=False)["input_ids"]
            found = [self._shared(ids) for ids in found]

        end = (self.terminator_id,)
        made = []
        for (head, _), body_ids, own in zip(prompts, found, actions, strict=True):
            action_ids = tuple(self._remembered(ACTION_PREFIX + a) + end for a in own)
            request = TokenisedRequest(self._remembered(head), body_ids, action_ids, reasoning)
            assert request.num_prompt_tokens, "an empty prompt: there is nothing to score after"
            check_length(request, self.max_tokens)
            made.append(request)
        return made

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids of any text, without special tokens."""
        with self._lock:
            return self._tokenised(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        with self._lock:
            return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _remembered(self, text: str) -> tuple[int, ...]:
        with self._lock:
            if text in self._seen:
                self._seen.move_to_end(text)
                return self._seen[text]
            self._seen[text] = self._tokenised(text)
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            return self._seen[text]

    def _tokenised(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        return self._shared(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        """`ids` as a tuple of shared integers: 8 bytes an id instead of 36, in buffers of many
        prompts.
        """
        top = max(ids, default=-1)
        if top >= len(self._numbers):
            self._numbers.extend(range(len(self._numbers), top + 1))
        return tuple(map(self._numbers.__getitem__, ids))


def check_length(request: TokenisedRequest, max_tokens: int) -> None:
    """Refuse a request whose prompt and longest action exceed `max_tokens`.

    Raises:
        PromptTooLongError: it is too long.
    """
    longest = max((len(a) for a in request.action_ids), default=0)
    if request.num_prompt_tokens + longest > max_tokens:
        raise PromptTooLongError(
            f"a prompt of {request.num_prompt_tokens} tokens with actions of up to {longest} "
            f"exceeds the {max_tokens} the LLM takes; lower llm.prompt.max_prompt_tokens"
        )


def terminator_id(tokenizer) -> int:
    """The token that ends an assistant's turn in the chat template, or else the end of sequence."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        tail = whole.rpartition(_SENTINEL)[2].strip()
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return ids[0]
    if tokenizer.eos_token_id is None:
        raise PriorZeroError(
            "the tokenizer has neither a chat template's end of turn nor an end-of-sequence token; "
            "choose another llm.model"
        )
    return tokenizer.eos_token_id


def model_max_tokens(config) -> int:
    """Longest sequence the model's configuration allows."""
    return getattr(config, "max_position_embeddings", None) or 1 << 30
