"""A loaded causal LM as a torch module: its number format, its output head, what PEFT wraps."""

from __future__ import annotations

from pathlib import Path

import torch


def pick_dtype(setting: str, device: torch.device | str) -> torch.dtype:
    """Number format to compute in.

    Args:
        setting: "float32", "bfloat16", "float16", or "auto": bfloat16 where the hardware multiplies
            it (CUDA, CPUs with avx512_bf16 or AMX), else float32.
    """
    named = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if setting in named:
        return named[setting]

    assert setting == "auto", f"dtype {setting!r} is unknown; the settings' rules let none pass"
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not Linux: float32 is always right, only slower
    return "avx512_bf16" in flags or "amx_bf16" in flags


def store_layers_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep the linear layers' weights in `dtype`, the output head included, in place.

    Under autocast this computes what a float32 model under autocast computes, to the bit, and saves
    casting every weight in every forward. Embeddings and norms stay float32: a model that is
    `dtype` throughout also rounds its residual stream. A tied head becomes a copy of its own:
    `sync_head` brings it up to date.
    """
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)


def sync_head(model: torch.nn.Module) -> None:
    """Give a tied head that `store_layers_in` separated the embedding's weights again, after these
    were written to.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head.weight is not table.weight:
        with torch.no_grad():
            head.weight.copy_(table.weight)


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The Hugging Face causal LM inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
