"""Decisions as an LLM reads them, and which of them it does not train on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from priorzero.evidence.variants import VARIANTS
from priorzero.evidence.walk import Walk
from priorzero.games.families import kinship
from priorzero.llm.prompts import prompt_builder
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.update.samples import LLMSample
from priorzero.settings.llm import PromptSettings
from priorzero.settings.warmup import WarmupSettings
from priorzero.types import PriorZeroError, TokenisedRequest


@dataclass(frozen=True)
class Example:
    """One decision under one prompt.

    Attributes:
        request: prompt and all valid commands, in token ids.
        outcomes: `[A]` as of `WalkStep`: 0 is right.
    """

    request: TokenisedRequest
    outcomes: tuple[int, ...]

    def sample(self) -> LLMSample:
        """What the trainer takes: the right commands share the target equally."""
        right = [float(one == 0) for one in self.outcomes]
        target = tuple(share / sum(right) for share in right)
        return LLMSample(
            request=self.request,
            thought_tokens=0,
            thought_logprobs=(),
            action_index=self.outcomes.index(0),
            target_policy=target,
            behaviour=target,
            collected_logprobs=None,
            policy_version=0,
            value_target=0.0,
            predicted_value=0.0,
        )


def make_examples(
    walks: Sequence[Walk],
    settings: WarmupSettings,
    tokeniser: Tokeniser,
    *,
    join_heads: bool = False,
) -> list[Example]:
    """Every decision that leaves a choice, once per prompt of `settings.prompts`.

    Args:
        join_heads: no heads; they begin the bodies. Only states with one head share a forward, and
            each game has its own, so a step over many games would be as many forwards, which costs
            a GPU more than computing each head anew. On a CPU heads are worth keeping apart.

    Raises:
        PromptTooLongError: a prompt does not fit the model.
    """
    steps = [s for walk in walks for s in walk.steps if len(s.state.valid_actions) > 1]
    found = []
    for variant in settings.prompts:
        prompt = PromptSettings(
            history_length=settings.history_length, max_prompt_tokens=settings.max_prompt_tokens
        )
        build = prompt_builder(replace(prompt, **VARIANTS[variant]), tokeniser.tokenizer)
        prompts = [build(step.state)[:2] for step in steps]
        requests = tokeniser.requests(prompts, [step.state.valid_actions for step in steps])
        if join_heads:
            requests = [replace(r, head_ids=(), body_ids=r.prompt_ids) for r in requests]
        found += [Example(r, s.outcomes) for r, s in zip(requests, steps, strict=True)]
    return found


def drawn(examples: Sequence[Example], limit: int, rng: np.random.Generator) -> list[Example]:
    """At most so many, drawn without repetition and in their order; 0: all."""
    if not limit or limit >= len(examples):
        return list(examples)
    return [examples[i] for i in sorted(rng.permutation(len(examples))[:limit])]


def hold_out(
    walks: Sequence[Walk], share: float, rng: np.random.Generator
) -> tuple[list[Walk], list[Walk]]:
    """Split games, not decisions: of stories whole families, of generated games single ones.

    Of each kind (stories; each generator) the share is held out, rounded up, where it has two
    groups or more.

    Returns:
        those to train on, and those held out.

    Raises:
        PriorZeroError: no kind has two groups.
    """
    kinds: dict[str, dict[str, list[Walk]]] = defaultdict(lambda: defaultdict(list))
    for walk in walks:
        kin = kinship(walk.game)
        generated = kin.game.startswith(f"{kin.family}:")
        kind = kin.family if generated else walk.game.kind
        kinds[kind][kin.game if generated else kin.family].append(walk)

    apart: set[int] = set()
    for groups in kinds.values():
        names = sorted(groups)
        count = ceil(share * len(names)) if len(names) > 1 else 0
        for name in rng.permutation(names)[: min(count, len(names) - 1)]:
            apart |= {id(walk) for walk in groups[str(name)]}
    if not apart:
        raise PriorZeroError(
            "no game can be held out, because there are no two that are not relatives; without "
            "one nobody knows when training has to end. Name further --games, or raise --textworld"
        )
    return [w for w in walks if id(w) not in apart], [w for w in walks if id(w) in apart]
