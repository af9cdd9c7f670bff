"""Builds the LLM's part of a run: trainer, engine, prior and training phase, in the order in which
they need each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from priorzero import plugins
from priorzero.llm.engines.base import LLMEngine
from priorzero.llm.engines.choice import create_engine
from priorzero.llm.engines.gate import Gate
from priorzero.llm.model import load_llm, resolve_llm
from priorzero.llm.prior import LLMPrior, PromptBuilder
from priorzero.llm.scoring.requests import Tokeniser, model_max_tokens
from priorzero.llm.seen import Seen, read_seen
from priorzero.llm.update.phase import LLMPhase
from priorzero.llm.update.protocol import LLMTrainer
from priorzero.settings.llm import LLMSettings

TRAINERS = "priorzero.llm.update.trainers"


@dataclass(frozen=True)
class LLMParts:
    """The parts; a line that names model and engine; and what the LLM was trained on before."""

    trainer: LLMTrainer
    engine: LLMEngine
    prior: LLMPrior
    phase: LLMPhase
    name: str
    seen: Seen


async def build_llm(
    settings: LLMSettings,
    *,
    device: str,
    reduction: str,
    seed: int,
    marker: str,
    make_prompt: Callable[[object], PromptBuilder],
    folder: Path | None = None,
) -> LLMParts:
    """Load the model and start its engine.

    Args:
        settings: the `llm` group.
        device: "cpu" or "cuda".
        reduction: how token log-probabilities become one number per action, "sum" or "mean".
        seed: of generated chains of thought.
        marker: text that ends a chain of thought.
        make_prompt: tokenizer -> prompt builder.
        folder: of the run, where the trainer may leave files; None: nowhere.

    Raises:
        PriorZeroError: the model cannot be had, or a required engine does not start.
    """
    trainers = plugins.load(TRAINERS, settings.trainer)

    resolved = await asyncio.to_thread(resolve_llm, settings.model)
    seen = read_seen(resolved.path)
    model, tokenizer = await asyncio.to_thread(load_llm, resolved, device)
    tokeniser = Tokeniser(tokenizer, model_max_tokens(model.config))

    trainer = await asyncio.to_thread(trainers.make, model, tokenizer, settings, reduction, folder)
    engine = await create_engine(
        settings,
        resolved,
        device=device,
        marker=marker,
        seed=seed,
        model=trainer.weights().module if settings.share_weights else None,
        tokeniser=tokeniser,
        lock=trainer.lock,
        trunk=trainer.trunk,
    )
    gate = Gate()
    prior = LLMPrior(
        engine,
        make_prompt(tokenizer),
        reasoning=settings.prompt.use_cot,
        required=settings.required,
        gate=gate,
    )
    return LLMParts(
        trainer=trainer,
        engine=engine,
        prior=prior,
        phase=LLMPhase(settings, trainer, engine, gate),
        name=f"{resolved.name} on {engine.name}",
        seen=seen,
    )
