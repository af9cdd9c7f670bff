"""Which ids stay of a generated chain of thought."""

from __future__ import annotations

import pytest

from priorzero.llm.engines.thoughts import Generated, Reasoner, before_text
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.scoring.requests import Tokeniser

REASONER = Reasoner(max_new_tokens=8, temperature=0.0, marker="Action:", seed=0)


class Pieces:
    """A tokenizer whose tokens are given pieces of text, and single characters for the rest."""

    chat_template = None
    eos_token_id = 1
    added_tokens_decoder: dict = {}

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [1000 + ord(c) for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.pieces[i] if i < 1000 else chr(i - 1000) for i in ids)


def finish(pieces: tuple[str, ...], room: int = 100) -> tuple[str, tuple[int, ...], bool]:
    """(text of the thought, ids kept of what was generated, had it the marker)"""
    tokeniser = Tokeniser(Pieces(*pieces), 512)
    generated = Generated(tuple(range(len(pieces))), tuple(-1.0 - i for i in range(len(pieces))))
    thought = REASONER.finish(generated, tokeniser, room)
    kept = tuple(i for i in thought.ids if i < 1000)
    # What the model wrote keeps its log-probability, the marker behind it has none.
    assert thought.logprobs == tuple(-1.0 - i for i in kept)
    return tokeniser.decode(thought.ids), kept, thought.had_marker


@pytest.mark.parametrize(
    ("pieces", "text", "kept", "found"),
    [
        ((" I go", ".\n", "Action", ":", " north"), " I go.\nAction:", (0, 1), True),
        # A token that holds the line's end and the marker's beginning: neither is cut in two.
        ((" I go.", "\nAct", "ion:"), " I go.\nAction:", (0,), True),
        ((" I go. ", "Action:"), " I go. \nAction:", (0,), True),
        ((" no", " idea"), " no idea\nAction:", (0, 1), False),
        (("Action:", " north"), "\nAction:", (), True),
        ((), "\nAction:", (), False),
    ],
)
def test_generated_ids_up_to_the_marker_then_the_markers_own(pieces, text, kept, found):
    assert finish(pieces) == (text, kept, found)


def test_a_thought_that_does_not_fit_loses_its_end():
    """Also where the LLM had ended it: what stands there was not."""
    for pieces in ((" a", " b", " c", " d"), (" a", " b", " c", "\nAction:")):
        text, kept, ended = finish(pieces, room=len("\nAction:") + 2)
        assert (text, kept, ended) == (" a b\nAction:", (0, 1), False)


def test_text_that_does_not_occur_cuts_nothing():
    assert before_text((0, 1), "x", Tokeniser(Pieces("a", "b"), 9)) == ((0, 1), False)


async def test_the_thought_is_part_of_the_answer(byte_model, tokeniser, reference):
    reasoner = Reasoner(max_new_tokens=5, temperature=0.0, marker="Action:", seed=0)
    engine = TransformersEngine(byte_model, tokeniser, reasoner=reasoner)
    asked = tokeniser.requests([("", "A dark room.")], [("go", "look")], reasoning=True)[0]
    answer = (await engine.score([asked]))[0]

    marker = tokeniser.ids("\nAction:")
    written = (await engine.generate([asked.prompt_ids], 5, 0.0))[0]
    assert answer.thought_ids == written.ids + marker and 0 < len(written.ids) <= 5
    assert answer.thought_logprobs == written.logprobs
    assert engine.stats()["reasoning_without_marker"] == 1 and not answer.thought_ended
    expected = reference(byte_model, asked.with_thought(answer.thought_ids))
    for got, want in zip(answer.token_logprobs, expected, strict=True):
        assert list(got) == pytest.approx(want, abs=1e-4)


async def test_a_thought_that_the_llm_ends_itself(byte_model, tokeniser):
    """One of its own letters is the marker; with less room it does not come to that."""
    asked = tokeniser.requests([("", "A dark room.")], [("go", "look")], reasoning=True)[0]
    free = TransformersEngine(byte_model, tokeniser)
    (written,) = await free.generate([asked.prompt_ids], 12, 0.0)
    letters = [tokeniser.decode([i]) for i in written.ids]
    place = next(i for i, x in enumerate(letters) if i and x.isascii() and x not in letters[:i])
    for limit, ended in ((12, True), (place, False)):
        reasoner = Reasoner(limit, temperature=0.0, marker=letters[place], seed=0)
        engine = TransformersEngine(byte_model, tokeniser, reasoner=reasoner)
        (answer,) = await engine.score([asked])
        assert answer.thought_ended is ended
        assert answer.thought_logprobs == written.logprobs[:place]


async def test_a_thought_leaves_room_for_the_actions(byte_model, tokeniser):
    reasoner = Reasoner(max_new_tokens=40, temperature=1.0, marker="Action:", seed=0)
    engine = TransformersEngine(byte_model, tokeniser, reasoner=reasoner)
    asked = tokeniser.requests([("", "x" * 490)], [("go",)], reasoning=True)[0]
    answer = (await engine.score([asked]))[0]
    whole = asked.with_thought(answer.thought_ids)
    assert whole.num_prompt_tokens + len(asked.action_ids[0]) == tokeniser.max_tokens
