"""What `benchmarks.prior` scores: a model, and real prompts of a real game at exactly the length
asked for.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import PlayedStep, random_play
from priorzero.llm.model import ResolvedModel, load_llm, resolve_llm
from priorzero.llm.scoring.requests import Tokeniser, model_max_tokens
from priorzero.types import PriorZeroError, TokenisedRequest

logger = logging.getLogger("priorzero.benchmarks.prior")

# hidden, intermediate, layers, heads, key-value heads, vocabulary: from the published
# configurations.
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936),
    "tiny": (128, 256, 2, 2, 1, 49152),
}


@dataclass(frozen=True)
class BenchmarkModel:
    """A model in the benchmark's dtype, its tokeniser, and where vLLM finds it."""

    model: torch.nn.Module
    tokeniser: Tokeniser
    resolved: ResolvedModel


def load_benchmark_model(
    name: str, device: str, dtype: torch.dtype, work: Path, args, need_files: bool
) -> BenchmarkModel:
    """Load or make the model. A random one is written to `work` only where vLLM needs files.

    Raises:
        PriorZeroError: it cannot be had, or its positions do not suffice for the prompts.
    """
    if name.startswith("random:"):
        resolved, model, tokenizer = _random_model(
            name.removeprefix("random:"), device, dtype, work, args, need_files
        )
    else:
        resolved = resolve_llm(name)
        model, tokenizer = load_llm(resolved, device, dtype)
    return BenchmarkModel(model, Tokeniser(tokenizer, model_max_tokens(model.config)), resolved)


def _random_model(shape: str, device: str, dtype: torch.dtype, work: Path, args, need_files: bool):
    """Random weights of a published shape, made on the device."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    if shape not in SHAPES:
        raise PriorZeroError(
            f"--model random:{shape} is unknown; the shapes are {', '.join(SHAPES)}"
        )
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    tokenizer = _tokenizer(args)
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval()
    folder = work / shape
    if need_files:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return (
        ResolvedModel(str(folder), f"random {shape}", "local", "random weights"),
        model,
        tokenizer,
    )


def _tokenizer(args):
    """The embedded LLM's tokenizer; where its package is missing, a byte-pair one trained on the
    game on the spot.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from priorzero.llm.model import embedded_checkpoint

    try:
        return AutoTokenizer.from_pretrained(embedded_checkpoint())
    except PriorZeroError as error:
        logger.warning("no embedded tokenizer (%s): one is trained on the game's texts", error)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        s.state.observation + "\n" + "\n".join(s.state.valid_actions) for s in random_states(args)
    ]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def random_states(args) -> list[PlayedStep]:
    """Steps of random play; each holds a state with its history."""
    return random_play(args.env_id, args.play_steps, args.seed)


@dataclass(frozen=True)
class Inputs:
    """`states` to time, and others of the kind to warm up with."""

    states: tuple[TokenisedRequest, ...]
    warm_up: tuple[TokenisedRequest, ...]

    def describe(self) -> str:
        lengths = [r.num_prompt_tokens for r in self.states]
        actions = [len(a) for r in self.states for a in r.action_ids]
        return (
            f"{min(lengths)} to {max(lengths)} tokens (head {len(self.states[0].head_ids)}), "
            f"{len(self.states[0].action_ids)} actions of {min(actions)} to {max(actions)} tokens"
        )


def make_requests(
    tokeniser: Tokeniser,
    played: Sequence[PlayedStep],
    prompt_tokens: int,
    actions: int,
    states: int,
    seed: int = 0,
) -> Inputs:
    """`states` distinct requests (and as many to warm up) with `actions` actions and
    `prompt_tokens` tokens of prompt.

    Raises:
        PriorZeroError: the prompt is too short for the fixed part, or too long for the model.
    """
    # Commands of the play; where they are too few, ones made of its words.
    rng = random.Random(seed)
    pool = list(dict.fromkeys(a for step in played for a in step.state.valid_actions))
    transcript = " ".join(
        f"{s.state.observation} > {s.action}".replace("\n", " ") for s in played
    ).split(" ")
    pool += [
        f"examine {word}"
        for word in dict.fromkeys(w.strip(".,!?\"'():;").lower() for w in transcript)
        if word.isalpha() and f"examine {word}" not in pool
    ]
    if len(pool) < actions:
        raise PriorZeroError(
            f"{actions} actions are more than the {len(pool)} this play gave; raise --play-steps"
        )

    requests = []
    for number in range(2 * states):
        step = played[(number * max(1, len(played) // (2 * states))) % len(played)]
        own = list(step.state.valid_actions)[:actions]
        own += rng.sample([a for a in pool if a not in own], actions - len(own))
        filler = _rotated(transcript, rng.randrange(len(transcript)), prompt_tokens)
        requests.append(
            _request(tokeniser, step, tuple(sorted(own)), prompt_tokens, f"({number})", filler)
        )
    return Inputs(tuple(requests[:states]), tuple(requests[states:]))


def _rotated(words: list[str], start: int, length: int) -> list[str]:
    """At least `length` words of the transcript from `start` on, round and round."""
    return [words[(start + i) % len(words)] for i in range(length)]


def _request(
    tokeniser: Tokeniser,
    step: PlayedStep,
    actions: tuple[str, ...],
    prompt_tokens: int,
    mark: str,
    filler: list[str],
) -> TokenisedRequest:
    from priorzero_prompts import PromptSettings, build_prompt

    settings = PromptSettings(
        history_length=20,
        max_observation_chars=400,
        include_valid_actions=True,
        max_prompt_tokens=prompt_tokens - 8,
    )
    parts = build_prompt(step.state, settings, tokeniser.tokenizer)

    def body(count: int) -> str:
        return f"{mark} {' '.join(filler[:count])}\n\n{parts.body}"

    def fits(count: int) -> bool:
        return head + len(tokeniser.ids(body(count))) <= prompt_tokens

    head = len(tokeniser.ids(parts.head))
    count = _largest(fits, 0, len(filler))
    return tokeniser.requests([(parts.head, body(count))], [actions])[0]


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Largest n in low..high for which `holds` (true up to some n, false from there on); low if
    none.
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
