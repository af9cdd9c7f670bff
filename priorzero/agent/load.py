"""An agent from a run's folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from priorzero.agent.agent import Agent
from priorzero.compute import resolve_device
from priorzero.lightzero import network_settings
from priorzero.llm.engines.thoughts import Reasoner
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.prior import LLMPrior
from priorzero.llm.prompts import ACTION_MARKER, prompt_builder
from priorzero.llm.scoring.requests import Tokeniser, model_max_tokens
from priorzero.llm.weights.trained import base_of, restore
from priorzero.run.checkpoint import CheckpointStore
from priorzero.run.experiment import saved_settings
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.policy import PolicySettings
from priorzero.settings.record import overlay
from priorzero.text.encoder import SentenceEncoder
from priorzero.text.vocabulary import make_vocabulary
from priorzero.types import PriorZeroError
from priorzero.world_model.categorical import Support
from priorzero.world_model.model import PriorZeroModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a run saved.

    Attributes:
        settings: of the run, with what was laid over them.
        name: of the checkpoint's folder.
        state: everything but the LLM.
        llm: the LLM's trainer; None without one.
        meta: small facts: game, iteration, env_steps, llm_version.
    """

    settings: ExperimentSettings
    name: str
    state: Mapping[str, Any]
    llm: Mapping[str, Any] | None
    meta: Mapping[str, Any]


def read_settings(run: Path, *layers: Mapping[str, Any]) -> ExperimentSettings:
    """The settings of a run's config.json, with layers laid over them.

    Raises:
        PriorZeroError: it is no run's folder, or the result is impossible.
    """
    settings = overlay(ExperimentSettings(), saved_settings(run), *layers)
    settings.validate()
    return settings


def read_checkpoint(run: Path, which: str, settings: ExperimentSettings) -> Checkpoint:
    """A checkpoint of a run.

    Args:
        which: latest, best or a checkpoint folder's name.
        settings: of the run, from `read_settings`.

    Raises:
        PriorZeroError: there is none, or it is damaged.
    """
    if not any((run / "ckpt").glob("iter_*")):
        raise PriorZeroError(
            f"the run {run} has no checkpoint yet; it saves one every schedule.save_freq "
            "iterations, and at its end"
        )
    device = resolve_device(settings.policy.device)
    state, llm, meta = CheckpointStore(run / "ckpt").load(which, device)
    return Checkpoint(settings, meta["checkpoint"], state, llm, meta)


def make_agent(checkpoint: Checkpoint) -> Agent:
    """Network, vocabulary and encoder of a checkpoint.

    Raises:
        PriorZeroError: the encoder cannot be had, or the network does not fit the settings.
    """
    settings = checkpoint.settings
    device = resolve_device(settings.policy.device)
    encoder = SentenceEncoder(
        settings.text.encoder, device=device, cache_bytes=settings.text.cache_mib * 2**20
    )
    model = PriorZeroModel(**network_settings(settings, encoder.dim))
    saved = checkpoint.state["policy"]
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise PriorZeroError(
            f"the network of {checkpoint.name} does not fit these settings (for example: {first}); "
            "leave the network's own settings (policy.embed_dim and the like) as they were"
        ) from error
    vocabulary = make_vocabulary(settings.policy.action_vocabulary)
    vocabulary.load_state_dict(saved["vocabulary"])
    scalar_of = Support(settings.policy.support_scale, device).scalars
    policy = _with_temperature(settings.policy, checkpoint)
    return Agent(policy, model, vocabulary, encoder.encode, scalar_of, device)


def _with_temperature(settings: PolicySettings, checkpoint: Checkpoint) -> PolicySettings:
    """With the LLM's temperature as it was calibrated when the checkpoint was saved.

    Raises:
        PriorZeroError: it was not.
    """
    if not settings.root_prior.calibrated:
        return settings
    temperature = checkpoint.state["policy"].get("prior_temperature")
    if temperature is None:
        raise PriorZeroError(
            f"the run of {checkpoint.name} had a fixed temperature, none was calibrated: give "
            "policy.root_prior.temperature a number instead of auto"
        )
    return replace(settings, root_prior=replace(settings.root_prior, temperature=temperature))


def make_prior(checkpoint: Checkpoint) -> LLMPrior:
    """The checkpoint's trained LLM, in float32 on the CPU.

    Raises:
        PriorZeroError: the run has no LLM, or its base model is not found.
    """
    settings = checkpoint.settings.llm
    if checkpoint.llm is None or "model" not in checkpoint.llm:
        raise PriorZeroError(
            f"checkpoint {checkpoint.name} holds no LLM of the built-in trainer that could be asked"
        )

    base = base_of(checkpoint.llm)
    named = [base.name] if base else []
    weights, tokenizer = restore(checkpoint.llm, [*named, settings.model], settings.lora)
    model = weights.module

    engine = TransformersEngine(
        model,
        Tokeniser(tokenizer, model_max_tokens(model.config)),
        max_batch_tokens=settings.max_batch_tokens,
        reasoner=Reasoner(
            settings.reasoning.max_new_tokens,
            settings.reasoning.temperature,
            ACTION_MARKER,
            checkpoint.settings.seed,
        ),
    )

    return LLMPrior(
        engine,
        prompt_builder(settings.prompt, tokenizer),
        reasoning=settings.prompt.use_cot,
        required=True,
    )
