"""Chooses and starts the LLM engine of a run, and says why."""
from __future__ import annotations

import importlib.util
import logging
import threading

import torch

from priorzero.llm.cached import CachedEngine
from priorzero.llm.engine import LLMEngine, LLMEngineError
from priorzero.llm.model import ResolvedModel, load_llm, pick_dtype, store_layers_in
from priorzero.llm.requests import TextTokeniser, model_max_tokens
from priorzero.llm.resilient import ResilientEngine
from priorzero.llm.settings import EngineSettings
from priorzero.llm.transformers_engine import TransformersEngine
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
) -> LLMEngine:
    """Start the engine of a run, with retries, restarts, fallback and score cache around it.

    :param model: the trainer's model; the transformers engine then shares it (give the trainer's ``lock`` and ``text``
        too). Without it the transformers engine loads a copy of its own.
    :raises PriorZeroError: ``required`` is set and vLLM cannot be had, or no engine starts.

    An engine started on checkpointed weights answers with the published ones until `push_weights` is called.
    """
    async def transformers() -> LLMEngine:
        return _transformers_engine(settings, resolved, model, text, lock, device)

    wanted, reason = _choose(settings, torch.device(device))
    engine: LLMEngine | None = None
    fell_back = False
    if wanted == "vllm":
        async def start_vllm() -> LLMEngine:
            return await _start_vllm(settings, resolved, text, lock, device)

        try:
            first = await start_vllm()
            fallback = None if settings.required else transformers
            engine = ResilientEngine(
                first, start_vllm, fallback, max_restarts=settings.max_restarts, attempts=settings.attempts
            )
        except LLMEngineError as error:
            if settings.required:
                raise PriorZeroError(
                    f"llm_required is set, but the vLLM engine cannot be used: {error}. Install vLLM for this device "
                    "(see requirements/README.md), or drop llm_required to let transformers take over"
                ) from error
            fell_back, reason = True, f"vLLM cannot be used: {error}"
            logger.warning("LLM engine falls back from vLLM to transformers: %s", error)
    if engine is None:
        engine = await transformers()
        engine.counters["engine_fallbacks"] += fell_back
    logger.info("LLM engine: %s, because %s", engine.name, reason)
    return CachedEngine(engine, settings.cache_size) if settings.cache_size else engine


def _choose(settings: EngineSettings, device: torch.device) -> tuple[str, str]:
    """Kind of engine to try first, and why."""
    if settings.kind != "auto":
        return settings.kind, "the setting names it"
    if settings.required:
        return "vllm", "llm_required is set"
    if device.type == "cuda":
        return "vllm", "the device is CUDA"
    return "transformers", (
        "on a CPU its shared forward over all states is as fast as vLLM on prompts that do not repeat, starts at once, "
        "and uses the trainer's weights without a copy"
    )


def _transformers_engine(settings, resolved, model, text, lock, device) -> TransformersEngine:
    dtype = pick_dtype(settings.compute_dtype, device)
    if model is None:
        model, tokenizer = load_llm(resolved, device)
        if dtype != torch.float32:
            store_layers_in(model, dtype)
        text = text or TextTokeniser(tokenizer, model_max_tokens(model.config, settings.max_prompt_tokens))
    if text is None:
        raise PriorZeroError("create_engine got the trainer's model without its tokeniser; pass text=trainer.text")
    own = next(model.parameters()).dtype
    return TransformersEngine(
        model, text, compute_dtype=None if dtype == own else dtype, max_batch_tokens=settings.max_batch_tokens,
        reasoning=settings.reasoning, lock=lock,
    )


async def _start_vllm(settings, resolved, text, lock, device) -> LLMEngine:
    if importlib.util.find_spec("vllm") is None:
        raise LLMEngineError("the package vllm is not installed")
    from priorzero.llm.vllm_engine import VLLMEngine

    return await VLLMEngine.start(resolved, settings, text=text, lock=lock, device=torch.device(device))
