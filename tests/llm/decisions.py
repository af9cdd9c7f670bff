"""Decisions for tiny models, and the built-in trainer that learns from them."""

from __future__ import annotations

import dataclasses

import torch

from priorzero.llm.update.objective import Answer
from priorzero.llm.update.samples import LLMSample
from priorzero.llm.update.trainers import builtin
from priorzero.settings.llm import (
    LLMSettings,
    LLMTrainSettings,
    LoraSettings,
    PromptSettings,
    RFTSettings,
)
from priorzero.types import TokenisedRequest

TERMINATOR = 1
# One token per letter: longer ones would start hopelessly behind.
ACTIONS = ("up", "us", "in", "open")


def ids(text: str) -> tuple[int, ...]:
    """One token per byte."""
    return tuple(3 + b for b in text.encode())


def request(body: str, actions: tuple[str, ...], **more) -> TokenisedRequest:
    texts = tuple((*ids(" " + a), TERMINATOR) for a in actions)
    return TokenisedRequest(ids("You play. "), ids(body), texts, **more)


REQUESTS = [request(f"Room {i}.\nAction:", ACTIONS[: 2 + i % 3]) for i in range(6)]


def sample(asked: TokenisedRequest, **fields) -> LLMSample:
    """A decision: target 0.7 and 0.3 on the first two actions, as good as expected."""
    actions = len(asked.action_ids)
    return LLMSample(
        **dict(
            request=asked,
            thought_tokens=0,
            thought_logprobs=(),
            action_index=0,
            target_policy=(0.7, 0.3) + (0.0,) * (actions - 2),
            behaviour=(1 / actions,) * actions,
            collected_logprobs=None,
            policy_version=0,
            value_target=0.0,
            predicted_value=0.0,
        )
        | fields
    )


SAMPLES = [sample(r) for r in REQUESTS]


def thinking(asked: TokenisedRequest, thought: str, **fields) -> LLMSample:
    """A decision behind a thought, of which all but the marker was written by the LLM."""
    written, marker = ids(thought), ids("\nAction:")
    return sample(
        asked.with_thought(written + marker),
        **dict(
            thought_tokens=len(written + marker),
            thought_logprobs=(-1.0,) * len(written),
        )
        | fields,
    )


def says(model, of: LLMSample) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The slow truth, with gradients: token log-probabilities per action, and the thought's, by one
    full forward per action through the model's public interface.
    """
    prompt, found = of.request.prompt_ids, []
    for action in of.request.action_ids:
        logits = model(torch.tensor([prompt + action])).logits[0].float().log_softmax(-1)
        before = len(prompt) - 1
        found.append(torch.stack([logits[before + j, token] for j, token in enumerate(action)]))
    first = len(prompt) - of.thought_tokens
    places = range(first, first + len(of.thought_logprobs))
    thought = [logits[place - 1, prompt[place]] for place in places]
    return found, torch.stack(thought) if thought else torch.empty(0)


def answer(model, of: LLMSample, thoughts: bool = True) -> Answer:
    """`says` as objectives get what was scored before."""
    with torch.no_grad():
        actions, thought = says(model, of)
    return Answer(of.request, torch.cat(actions).double(), thought[: None if thoughts else 0])


def rft_settings(**fields) -> RFTSettings:
    """Reinforcement without the search's correction."""
    return RFTSettings(**dict(enable=True, max_importance=0.0) | fields)


def settings(lora: LoraSettings | None = None, **train) -> LLMSettings:
    """All of a phase in one step, at a rate at which a tiny model moves."""
    fields = {f.name for f in dataclasses.fields(LLMTrainSettings)}
    own = {k: v for k, v in train.items() if k not in fields}
    usual = dict(learning_rate=3e-3, batch_size=0, max_batch_tokens=1024, kl_coef=0.0)
    return LLMSettings(
        **dict(
            dtype="float32",
            train=LLMTrainSettings(**usual | {k: v for k, v in train.items() if k in fields}),
            prompt=PromptSettings(use_cot=True),
            rft=rft_settings(),
            lora=lora or LoraSettings(),
        )
        | own
    )


def trainer_of(model, *, reduction: str = "sum", **fields):
    """The built-in trainer of `model`; `fields` as `settings` takes them."""
    return builtin.make(model, None, settings(**fields), reduction)


def policy(trainer, asked: TokenisedRequest) -> torch.Tensor:
    """`[A]` log-probabilities over the valid actions under the trainer's weights."""
    return torch.tensor(trainer.score([asked])[0].totals()).log_softmax(-1)
