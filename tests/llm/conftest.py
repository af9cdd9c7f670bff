"""Small random models and the embedded real one, shared by the LLM tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from priorzero.llm.scoring.requests import Tokeniser
from priorzero.types import HistoryItem, TextState, TokenisedRequest

ROOT = Path(__file__).resolve().parents[2]


def reference_logprobs(model, request: TokenisedRequest) -> list[list[float]]:
    """The slow truth: one full float32 forward per action through the model's public interface."""
    assert not request.reasoning
    out = []
    start = request.num_prompt_tokens
    with torch.no_grad():
        for action in request.action_ids:
            logits = (
                model(torch.tensor([request.prompt_ids + action])).logits.float().log_softmax(-1)
            )
            out.append([float(logits[0, start - 1 + j, token]) for j, token in enumerate(action)])
    return out


def tiny_llama(seed: int = 0, vocab: int = 97, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **dict(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.12,
            attn_implementation="sdpa",
            tie_word_embeddings=True,
            eos_token_id=1,
            bos_token_id=2,
            pad_token_id=0,
        )
        | settings
    )
    return LlamaForCausalLM(config).eval()


class ByteTokenizer:
    """One token per UTF-8 byte, offset by 3; enough of a tokenizer for the fast tests."""

    chat_template = None
    eos_token_id = 1
    bos_token = ""
    added_tokens_decoder: dict = {}

    def __call__(self, text: str | list[str], add_special_tokens: bool = False) -> dict:
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        return {"input_ids": [3 + b for b in text.encode()]}

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from a second thread, and on a busy machine all lose much to waiting
    for it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference():
    return reference_logprobs


@pytest.fixture
def tiny():
    return tiny_llama


@pytest.fixture
def tokeniser() -> Tokeniser:
    return Tokeniser(ByteTokenizer(), max_tokens=512)


@pytest.fixture
def byte_model():
    return tiny_llama(vocab=262)


@pytest.fixture(scope="session")
def smollm():
    """(model in float32, tokenizer, resolved) of the embedded LLM; skipped where its package is not
    installed.
    """
    from priorzero.llm.model import load_llm, resolve_llm
    from priorzero.types import PriorZeroError

    try:
        resolved = resolve_llm("embedded")
    except PriorZeroError as error:
        pytest.skip(str(error))
    model, tokenizer = load_llm(resolved, "cpu", torch.float32)
    return model, tokenizer, resolved


@pytest.fixture(scope="session")
def states() -> list[TextState]:
    """Two states of a real game, reached by its walkthrough; the candidates are commands of the
    walkthrough.
    """
    folders = [os.environ.get("PRIORZERO_GAMES"), ROOT / "games", ROOT.parent / "shared" / "games"]
    stories = [
        Path(f) / "detective.z5" for f in folders if f and (Path(f) / "detective.z5").is_file()
    ]
    if not stories:
        pytest.skip("detective.z5 is in none of $PRIORZERO_GAMES, ./games, ../shared/games")
    from jericho import FrotzEnv

    env = FrotzEnv(str(stories[0]))
    seen, _ = env.reset()
    steps = env.get_walkthrough()[:6]
    candidates = tuple(sorted({*steps, "open door", "open door with key", "look"}))
    out, history = [], []
    for step in steps:
        out.append(TextState(seen.strip(), candidates, tuple(history[-2:])))
        following, reward, _, _ = env.step(step)
        history.append(HistoryItem(seen.strip(), step, reward))
        seen = following
    env.close()
    return [out[1], out[4]]


@pytest.fixture(scope="session")
def requests(states, smollm) -> list[TokenisedRequest]:
    from priorzero_prompts import PromptSettings, build_prompt

    parts = [build_prompt(state, PromptSettings(), smollm[1]) for state in states]
    return Tokeniser(smollm[1], 2048).requests(
        [(p.head, p.body) for p in parts], [state.valid_actions for state in states]
    )
