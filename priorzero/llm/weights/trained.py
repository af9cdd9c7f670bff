"""Trained weights of a checkpoint, laid over the model they were trained from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from priorzero.llm.model import load_llm, resolve_llm
from priorzero.llm.weights.adapters import with_adapters
from priorzero.llm.weights.export import Weights
from priorzero.llm.weights.identity import ModelIdentity
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.settings.llm import LoraSettings


def has_adapters(state: Mapping[str, Any]) -> bool:
    """Whether a trainer's state holds low-rank adapters instead of all weights."""
    return any(".lora_" in name for name in state["model"])


def base_of(state: Mapping[str, Any]) -> ModelIdentity | None:
    """The model that a trainer's state began with; checkpoints of early versions do not say."""
    return ModelIdentity(**state["base"]) if "base" in state else None


def lay_over(module: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> list[str]:
    """Copy trained weights into a model that trains weights of the same names and shapes.

    Args:
        module: Causal LM, or its PEFT wrapper. What it trains requires gradients.
        saved: `model` of the trainer's state.

    Returns:
        Names of weights that only one side has, or that differ in shape; if there are any, nothing
        was copied.
    """
    own = {n: p for n, p in module.named_parameters() if p.requires_grad}
    odd = sorted(own.keys() ^ saved.keys())
    odd += [n for n, p in own.items() if n in saved and saved[n].shape != p.shape]
    if not odd:
        with torch.no_grad():
            for name, value in saved.items():
                own[name].copy_(value)
    return odd


def restore(state: Mapping[str, Any], bases: Sequence[str], lora: LoraSettings):
    """Load the base model and lay a checkpoint's trained weights over it, in float32 on the CPU.
    The optimiser's state is not touched.

    Args:
        state: The built-in trainer's, as `BuiltinTrainer.state_dict` gives it.
        bases: Folders or hub names under which the base model may be found; the first that can be
            loaded and is the right model is taken.
        lora: The adapters' settings, where the state holds adapters.

    Returns:
        `Weights` and tokenizer.

    Raises:
        PriorZeroError: None of these is the base model, or the adapters do not fit their settings.
    """
    adapters = has_adapters(state)
    model, tokenizer = _load_base(bases, base_of(state), adapters)
    if adapters:
        model = with_adapters(model, lora, None).eval()

    odd = lay_over(model, state["model"])
    if odd:
        raise PriorZeroError(
            "the checkpoint's LLM trained other weights than the run's settings say (for example "
            f"{odd[:3]}); export a checkpoint that was saved with the llm.lora settings of its "
            "config.json"
        )
    return Weights(model), tokenizer


def _load_base(names: Sequence[str], wanted: ModelIdentity | None, adapters: bool):
    """Model in float32 and tokenizer of the first name that gives the wanted model."""
    faults = []
    for name in dict.fromkeys(names):
        try:
            model, tokenizer = load_llm(resolve_llm(name))
        except PriorZeroError as error:
            faults.append(str(error))
            continue
        found = ModelIdentity.of(model)
        if wanted is None or wanted.fits(found, adapters=adapters):
            return model, tokenizer
        faults.append(f"{name!r} is another model, {found}")

    raise PriorZeroError(
        f"the checkpoint's LLM was trained from {wanted or 'a base model'}, which is not found: "
        f"{'; '.join(faults)}. Name the folder or hub name of that model with --base"
    )
