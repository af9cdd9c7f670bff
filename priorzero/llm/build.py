"""Builds the LLM's part of a run: trainer, engine, prior and learner, in the order in which they
need each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from priorzero.llm.engines.base import LLMEngine
from priorzero.llm.engines.choice import EngineSettings, create_engine
from priorzero.llm.model import load_llm, resolve_llm
from priorzero.llm.prior import LLMPrior, PromptBuilder
from priorzero.llm.scoring.requests import ReasoningSettings
from priorzero.llm.update.phase import LLMLearner
from priorzero.llm.update.trainers.builtin import LLMTrainer, LLMTrainerSettings, LoraSettings
from priorzero.settings.engine_old import VLLMSettings


@dataclass(frozen=True)
class LLMParts:
    """The parts, and a line that names model and engine."""

    trainer: LLMTrainer
    engine: LLMEngine
    prior: LLMPrior
    learner: LLMLearner
    name: str


async def build_llm(
    settings,
    *,
    device: str,
    reduction: str,
    seed: int,
    marker: str,
    make_prompt: Callable[[object], PromptBuilder],
) -> LLMParts:
    """Load the model and start its engine.

    Args:
        settings: the `llm` group of the settings. reduction: how token log-probabilities become one
            number per action.
        marker: text that ends a chain of thought. make_prompt: tokenizer -> prompt builder.
    Raises:
        PriorZeroError: the model cannot be had, a setting is impossible, or a required engine does
            not start.
    """
    lora = None
    if settings.lora.enable:
        targets = settings.lora.target_modules
        lora = LoraSettings(
            settings.lora.rank,
            float(settings.lora.alpha),
            target_modules=targets if targets == "all-linear" else tuple(targets.split(",")),
            last_layers=settings.lora.last_layers,
        )
    # Settings first: a wrong one should not cost the time of loading a model.
    trainer_settings = LLMTrainerSettings(
        **settings.train.as_dict(),
        reduction=reduction,
        compute_dtype=settings.dtype,
        lora=lora,
        trunk_cache_mib=settings.trunk_cache_mib,
    )
    vllm = settings.vllm.as_dict()
    del vllm["tensor_parallel_size"]
    engine_settings = EngineSettings(
        kind=settings.engine,
        required=settings.required,
        compute_dtype=settings.dtype,
        residual_dtype=settings.residual_dtype,
        max_batch_tokens=settings.max_batch_tokens or (32768 if device == "cuda" else 4096),
        cache_size=settings.score_cache_size,
        attempts=settings.attempts,
        max_restarts=settings.max_restarts,
        vllm=VLLMSettings(**vllm),
        prompt_tokens=settings.prompt.max_prompt_tokens // 2,
        reasoning=ReasoningSettings(**settings.reasoning.as_dict(), marker=marker, seed=seed),
    )
    resolved = await asyncio.to_thread(resolve_llm, settings.model)
    model, tokenizer = await asyncio.to_thread(load_llm, resolved, device)
    trainer = LLMTrainer(model, tokenizer, trainer_settings)
    engine = await create_engine(
        engine_settings,
        resolved,
        model=trainer.model if settings.share_weights else None,
        text=trainer.text,
        lock=trainer.lock,
        device=device,
        trunk=trainer.trunk,
        lora_rank=lora.rank if lora else 0,
    )
    prior = LLMPrior(
        engine,
        make_prompt(tokenizer),
        reasoning=settings.prompt.use_cot,
        required=settings.required,
    )
    return LLMParts(
        trainer,
        engine,
        prior,
        LLMLearner(settings, trainer, engine, prior),
        f"{resolved.name} on {engine.name}",
    )
