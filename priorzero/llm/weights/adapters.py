"""Low-rank adapters (arXiv:2106.09685) on a model whose own weights do not train any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from priorzero.llm.module import store_layers_in
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.settings.llm import LoraSettings


def with_adapters(
    model: torch.nn.Module, lora: LoraSettings, frozen_dtype: torch.dtype | None
) -> torch.nn.Module:
    """Put untrained adapters on a model; before training they change nothing.

    Args:
        model: Hugging Face causal LM.
        lora: Their rank, scale and place.
        frozen_dtype: Of the frozen linear layers; None: as they are.

    Returns:
        PEFT's wrapper of the model.

    Raises:
        PriorZeroError: The target modules do not exist in this model.
    """
    if frozen_dtype is not None:
        store_layers_in(model, frozen_dtype)
    from peft import LoraConfig, get_peft_model

    named = lora.target_modules
    targets: str | list[str] = named if named == "all-linear" else named.split(",")
    layers = None
    if lora.last_layers:
        total = model.config.num_hidden_layers
        layers = list(range(max(0, total - lora.last_layers), total))
        if targets == "all-linear":  # peft takes layers only together with names
            inside = model.get_decoder().layers.named_modules()
            linear = (name for name, m in inside if isinstance(m, torch.nn.Linear))
            targets = sorted({name.rpartition(".")[2] for name in linear})

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=float(lora.alpha),
        target_modules=targets,
        task_type="CAUSAL_LM",
        layers_to_transform=layers,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise PriorZeroError(
            f"LoRA with target_modules {named!r} cannot be put on this LLM: {error}"
        ) from error
