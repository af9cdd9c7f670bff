"""Chooses and starts the LLM engine of a run, and says why."""

from __future__ import annotations

import importlib.util
import logging
import threading

import torch

from priorzero.llm.engines.base import LLMEngine, LLMEngineError
from priorzero.llm.engines.cached import CachedEngine
from priorzero.llm.engines.resilient import ResilientEngine
from priorzero.llm.engines.thoughts import Reasoner
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.model import ResolvedModel, load_llm
from priorzero.llm.module import pick_dtype, store_layers_in
from priorzero.llm.scoring.requests import Tokeniser, model_max_tokens
from priorzero.llm.scoring.trunk import TrunkCache
from priorzero.settings.llm import LLMSettings
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)


def choose_engine(settings: LLMSettings, device: torch.device) -> tuple[str, str]:
    """Name of the engine to start, and why.

    vLLM is good at generating, transformers (`priorzero.llm.scoring`) is faster at scoring.
    """
    if settings.engine != "auto":
        return settings.engine, "llm.engine names it"
    if device.type != "cuda":
        return "transformers", "there is no GPU for the LLM"
    if settings.prompt.use_cot:
        return "vllm", "chains of thought are generated on a GPU"
    return "transformers", "no chains of thought are generated, and it scores faster"


async def create_engine(
    settings: LLMSettings,
    resolved: ResolvedModel,
    *,
    device: torch.device | str,
    marker: str,
    seed: int,
    model: torch.nn.Module | None = None,
    tokeniser: Tokeniser | None = None,
    lock: threading.RLock | None = None,
    trunk: TrunkCache | None = None,
) -> LLMEngine:
    """Start the engine of a run, with retries, restarts, fallback and score cache around it.

    An engine started on checkpointed weights answers with the published ones until `push_weights`
    is called.

    Args:
        settings: of the LLM.
        resolved: the model.
        device: where the LLM lives.
        marker: text that ends a chain of thought.
        seed: of the sampling of chains of thought.
        model: the trainer's model; the transformers engine then shares it. Without it that engine
            loads a copy of its own.
        tokeniser: the trainer's; needed with `model`.
        lock: the trainer's lock; needed with `model` or `trunk`.
        trunk: the trainer's, for the transformers engine.

    Raises:
        PriorZeroError: `settings.required` is set and vLLM cannot be had, or no engine starts.
    """
    device = torch.device(device)
    reasoner = Reasoner(
        settings.reasoning.max_new_tokens, settings.reasoning.temperature, marker, seed
    )

    async def transformers() -> LLMEngine:
        return _transformers_engine(
            settings, resolved, device, reasoner, model, tokeniser, lock, trunk
        )

    async def vllm() -> LLMEngine:
        return await _start_vllm(settings, resolved, device, reasoner, tokeniser, lock)

    name, reason = choose_engine(settings, device)
    fell_back = False
    if name == "vllm":
        try:
            engine: LLMEngine = ResilientEngine(
                await vllm(),
                vllm,
                None if settings.required else transformers,
                max_restarts=settings.max_restarts,
                attempts=settings.attempts,
            )
        except LLMEngineError as error:
            if settings.required:
                raise PriorZeroError(
                    f"llm.required is set, but the vLLM engine cannot be used: {error}. Install "
                    "vLLM for this device (see requirements/README.md), drop llm.required to let "
                    "transformers take over, or set llm.engine to transformers"
                ) from error
            reason, fell_back = f"vLLM cannot be used: {error}", True
            logger.warning("LLM engine falls back from vLLM to transformers: %s", reason)
    if name == "transformers" or fell_back:
        engine = await transformers()

    # Also 0, so that a run without a fallback says so.
    engine.counters["engine_fallbacks"] += fell_back
    logger.info("LLM engine: %s, because %s", engine.name, reason)
    size = settings.score_cache_size
    return CachedEngine(engine, size) if size else engine


def _transformers_engine(
    settings: LLMSettings,
    resolved: ResolvedModel,
    device: torch.device,
    reasoner: Reasoner,
    model: torch.nn.Module | None,
    tokeniser: Tokeniser | None,
    lock: threading.RLock | None,
    trunk: TrunkCache | None,
) -> TransformersEngine:
    dtype = pick_dtype(settings.dtype, device)
    own_weights = model is None
    if model is None:
        usual = "bfloat16" if device.type == "cuda" else "float32"
        residual = usual if settings.residual_dtype == "auto" else settings.residual_dtype
        mixed = residual == "float32" and dtype != torch.float32
        model, tokenizer = load_llm(resolved, device, torch.float32 if mixed else dtype)
        if mixed:
            store_layers_in(model, dtype)
        elif dtype != torch.float32:
            trunk = None  # the trainer's holds other numbers: its residual stream stays float32
        tokeniser = tokeniser or Tokeniser(tokenizer, model_max_tokens(model.config))
    assert tokeniser is not None, "the trainer's model comes with its tokeniser"

    own = next(model.parameters()).dtype
    return TransformersEngine(
        model,
        tokeniser,
        max_batch_tokens=settings.max_batch_tokens,
        compute_dtype=None if dtype == own else dtype,
        reasoner=reasoner,
        lock=lock,
        trunk=trunk,
        own_weights=own_weights,
    )


async def _start_vllm(
    settings: LLMSettings,
    resolved: ResolvedModel,
    device: torch.device,
    reasoner: Reasoner,
    tokeniser: Tokeniser | None,
    lock: threading.RLock | None,
) -> LLMEngine:
    if importlib.util.find_spec("vllm") is None:
        raise LLMEngineError("the package vllm is not installed")
    from priorzero.llm.engines.vllm_engine import VLLMEngine

    return await VLLMEngine.start(
        resolved,
        settings.vllm,
        device=device,
        tokeniser=tokeniser,
        reasoner=reasoner,
        lock=lock,
        lora_rank=settings.lora.rank if settings.lora.enable else 0,
    )
