"""Chooses and starts the LLM engine of a run, and says why."""

from __future__ import annotations

import importlib.util
import logging
import threading

import torch

from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.engines.cached import CachedEngine
from priorzero.llm.engines.resilient import ResilientEngine
from priorzero.llm.engines.selection import faster_engine
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.model import ResolvedModel, load_llm, pick_dtype, store_layers_in
from priorzero.llm.scoring.requests import TextTokeniser, model_max_tokens
from priorzero.llm.scoring.trunk import TrunkCache
from priorzero.settings.engine_old import EngineSettings
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)


async def create_engine(
    settings: EngineSettings,
    resolved: ResolvedModel,
    *,
    model: torch.nn.Module | None = None,
    text: TextTokeniser | None = None,
    lock: threading.RLock | None = None,
    device: torch.device | str = "cpu",
    trunk: TrunkCache | None = None,
    lora_rank: int = 0,
) -> LLMEngine:
    """Start the engine of a run, with retries, restarts, fallback and score cache around it.

    :param model: the trainer's model; the transformers engine then shares it (give the trainer's
        ``lock`` and ``text`` too). Without it the transformers engine loads a copy of its own.
    :param trunk: the trainer's, for the transformers engine; both must compute in the same dtype.
    :param lora_rank: of the adapters the trainer will push, 0 where it trains all weights: vLLM
        must know at its start.
    :raises PriorZeroError: ``required`` is set and vLLM cannot be had, or no engine starts.

    An engine started on checkpointed weights answers with the published ones until `push_weights`
    is called.
    """

    async def transformers() -> LLMEngine:
        return _transformers_engine(settings, resolved, model, text, lock, device, trunk)

    async def vllm() -> LLMEngine:
        return await _start_vllm(settings, resolved, text, lock, device, lora_rank)

    def guarded(first: LLMEngine) -> LLMEngine:
        fallback = None if settings.required else transformers
        return ResilientEngine(
            first, vllm, fallback, max_restarts=settings.max_restarts, attempts=settings.attempts
        )

    fell_back = False
    if settings.kind == "transformers":
        engine, reason = await transformers(), "the setting names it"
    elif settings.kind == "auto" and not settings.required:
        # Prompt and action must fit the length vLLM is started for, where the user lowered it.
        prompt_tokens = min(
            settings.prompt_tokens, (settings.vllm.max_model_len or settings.prompt_tokens * 2) // 2
        )
        choice = await faster_engine(transformers, vllm, prompt_tokens)
        engine, reason, fell_back = choice.engine, choice.reason, choice.vllm_failed
        if engine.name == "vllm":
            engine = guarded(engine)
    else:
        reason = "the setting names it" if settings.kind == "vllm" else "llm_required is set"
        try:
            engine = guarded(await vllm())
        except LLMEngineError as error:
            if settings.required:
                raise PriorZeroError(
                    f"llm_required is set, but the vLLM engine cannot be used: {error}. Install vLLM for this device "
                    "(see requirements/README.md), or drop llm_required to let transformers take over"
                ) from error
            engine, reason, fell_back = await transformers(), f"vLLM cannot be used: {error}", True
    if fell_back:
        logger.warning("LLM engine falls back from vLLM to transformers: %s", reason)
    engine.counters["engine_fallbacks"] += (
        fell_back  # also 0, so that a run without a fallback says so
    )
    logger.info("LLM engine: %s, because %s", engine.name, reason)
    return CachedEngine(engine, settings.cache_size) if settings.cache_size else engine


def _transformers_engine(
    settings, resolved, model, text, lock, device, trunk
) -> TransformersEngine:
    dtype = pick_dtype(settings.compute_dtype, device)
    if model is None:
        usual = "bfloat16" if torch.device(device).type == "cuda" else "float32"
        residual = usual if settings.residual_dtype == "auto" else settings.residual_dtype
        mixed = residual == "float32" and dtype != torch.float32
        model, tokenizer = load_llm(resolved, device, torch.float32 if mixed else dtype)
        if mixed:
            store_layers_in(model, dtype)
        elif dtype != torch.float32:
            trunk = None  # the trainer's holds other numbers: its residual stream stays float32
        text = text or TextTokeniser(
            tokenizer, model_max_tokens(model.config, settings.max_prompt_tokens)
        )
    if text is None:
        raise PriorZeroError(
            "create_engine got the trainer's model without its tokeniser; pass text=trainer.text"
        )
    own = next(model.parameters()).dtype
    return TransformersEngine(
        model,
        text,
        compute_dtype=None if dtype == own else dtype,
        max_batch_tokens=settings.max_batch_tokens,
        reasoning=settings.reasoning,
        lock=lock,
        trunk=trunk,
        prefix_cache_mib=settings.prefix_cache_mib,
    )


async def _start_vllm(settings, resolved, text, lock, device, lora_rank) -> LLMEngine:
    if importlib.util.find_spec("vllm") is None:
        raise LLMEngineError("the package vllm is not installed")
    from priorzero.llm.engines.vllm_engine import VLLMEngine

    return await VLLMEngine.start(
        resolved,
        settings,
        text=text,
        lock=lock,
        device=torch.device(device),
        lora_rank=lora_rank,
    )
