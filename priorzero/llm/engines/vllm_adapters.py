"""LoRA adapters and vLLM: merged into its weights, or loaded beside them. Used by `vllm_engine`.

Merging into 16-bit weights rounds a part of every update away, so there adapters are loaded beside
the weights, for which adapted layers multiply twice more. vLLM's CUDA kernels for adapters know no
float32, and there merging loses nothing.
"""

from __future__ import annotations

import torch

from priorzero.types import PriorZeroError

# That vLLM can be started for (1 too, but it takes an 8 as well).
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# What vLLM has no place for. 0.26 ignores some of these without a word and would answer with other
# weights.
_UNSUPPORTED = (
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
)


def hot_load_rank(setting: str, lora_rank: int, device: torch.device, dtype: torch.dtype) -> int:
    """Largest rank to start vLLM for; 0: no adapter support, adapters are merged before each push.

    Args:
        setting: `VLLMSettings.lora`; "auto": merged in float32, loaded beside the weights in 16
            bits.
        lora_rank: of the trainer's adapters, 0 where it trains all weights.
        device: of vLLM.
        dtype: vLLM multiplies in.

    Raises:
        PriorZeroError: vLLM cannot do, or would do badly, what the setting asks for.
    """
    exact = dtype == torch.float32
    if not lora_rank or (exact and setting in ("auto", "merge")):
        return 0

    if setting == "merge":
        raise PriorZeroError(
            "llm.vllm.lora 'merge' into 16-bit weights loses a part of every update; set it to "
            "'auto', or llm.vllm.dtype to 'float32'"
        )
    if exact and device.type == "cuda":
        raise PriorZeroError(
            "llm.vllm.lora 'hot_load' needs 16 bits on CUDA; set it to 'auto', or llm.vllm.dtype "
            "to 'bfloat16'"
        )

    fitting = [rank for rank in _RANKS if rank >= lora_rank]
    if not fitting:
        raise PriorZeroError(
            f"vLLM loads adapters up to rank {_RANKS[-1]}, got {lora_rank}; lower llm.lora.rank, "
            "or set llm.vllm.dtype to 'float32' and llm.vllm.lora to 'auto'"
        )
    return fitting[0]


def check_adapter(config, max_rank: int) -> None:
    """Refuse an adapter that vLLM would load wrongly.

    Args:
        config: PEFT's configuration.
        max_rank: vLLM was started for.

    Raises:
        PriorZeroError: it has a feature that vLLM lacks.
    """
    assert config is not None, "vLLM was started for adapters, all weights were pushed"
    assert config.r <= max_rank, f"adapters of rank {config.r}, vLLM was started for {max_rank}"
    odd = [f for f in _UNSUPPORTED if getattr(config, f, None)]
    if config.peft_type != "LORA":
        odd.append(f"peft_type {config.peft_type}")
    if getattr(config, "bias", "none") != "none":
        odd.append(f"bias {config.bias!r}")
    if odd:
        raise PriorZeroError(
            f"vLLM cannot load these adapters by themselves ({', '.join(odd)}); set llm.vllm.dtype "
            "to 'float32', which merges them, or use the transformers engine"
        )
