"""LoRA adapters beside vLLM's weights instead of merged into them: when, and in which form. Used by
`vllm_engine` only.

A hot load hands over the adapters alone, a hundredth of the bytes, and small updates are not
rounded away in bfloat16 weights. Its price is paid with every request: adapted layers multiply
twice more.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from priorzero.types import PriorZeroError

_RANKS = (
    8,
    16,
    32,
    64,
    128,
    256,
    320,
    512,
)  # that vLLM can be started for; 1 too, but it takes an 8 as well
_MERGE = "set llm.vllm.lora to 'merge'"
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


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether PEFT put adapters on ``model``."""
    return bool(getattr(model, "peft_config", None))


def hot_load_rank(setting: str, lora_rank: int, device: torch.device, dtype: torch.dtype) -> int:
    """Largest rank to start vLLM for; 0: no adapter support, adapters are merged before each push.

    :param setting: `VLLMSettings.lora`. lora_rank: of the trainer's adapters, 0 where it trains all
        weights.
    :raises PriorZeroError: hot loading is asked for, and vLLM cannot do it for this rank or number
        format.
    """
    # vLLM's CUDA kernels for adapters multiply 16 bits only. On a CPU adapters slow scoring: on two
    # cores 0.11 against 0.29 states/s in float32 and 0.14 against 1.10 in bfloat16, far more than
    # the second that a push saves. On CUDA they leave vLLM its CUDA graphs.
    works = device.type != "cuda" or dtype != torch.float32
    if (
        not lora_rank
        or setting == "merge"
        or setting == "auto"
        and not (device.type == "cuda" and works)
    ):
        return 0
    if not works:
        raise PriorZeroError(
            f"llm.vllm.lora 'hot_load' needs 16 bits on CUDA; set llm.vllm.dtype to 'bfloat16', or {_MERGE}"
        )
    fitting = [rank for rank in _RANKS if rank >= lora_rank]
    if not fitting and setting == "auto":
        return 0
    if not fitting:
        raise PriorZeroError(
            f"vLLM loads adapters up to rank {_RANKS[-1]}, got {lora_rank}; lower llm.lora.rank, or {_MERGE}"
        )
    return fitting[0]


def _active(model: torch.nn.Module):
    """Name and configuration of the one adapter that is active."""
    names = list(model.active_adapters)
    configs = [model.peft_config[name] for name in names]
    odd = [f for c in configs for f in _UNSUPPORTED if getattr(c, f, None)]
    odd += [f"peft_type {c.peft_type}" for c in configs if c.peft_type != "LORA"]
    odd += [f"bias {c.bias!r}" for c in configs if getattr(c, "bias", "none") != "none"]
    if len(names) != 1 or odd:
        what = ", ".join(odd) or f"{len(names)} active adapters"
        raise PriorZeroError(
            f"vLLM cannot load this model's adapters by themselves ({what}); {_MERGE}"
        )
    return names[0], configs[0]


class AdapterSlot:
    """Which adapter an engine's requests name: the one loaded last, or none, and then vLLM's
    weights answer as they are.

    :param max_rank: vLLM was started for adapters up to this rank; 0: for none.
    """

    def __init__(self, max_rank: int) -> None:
        self.max_rank = max_rank
        self.request = None  # vLLM's LoRARequest
        self._numbers = itertools.count(1)
        self._published = True

    def takes(self, model: torch.nn.Module) -> bool:
        """Whether ``model`` is pushed as an adapter: never on top of other full weights, it belongs
        to the published ones.

        :raises PriorZeroError: its rank is beyond what vLLM was started for.
        """
        if not (self.max_rank and self._published and has_adapters(model)):
            return False
        rank = _active(model)[1].r
        if rank > self.max_rank:
            raise PriorZeroError(
                f"the adapters have rank {rank}, vLLM was started for {self.max_rank}; give create_engine their lora_rank"
            )
        return True

    def next_request(self, version: int, folder: Path):
        """The request parameter for an adapter in ``folder``, new in name, id and path."""
        from vllm.lora.request import LoRARequest

        # The prefix cache is keyed by the name (0.26: by nothing else), so it must be new even for
        # an old version.
        number = next(self._numbers)
        return LoRARequest(f"v{version}.{number}", number, str(folder))

    def clear(self) -> None:
        """Other full weights were loaded."""
        self.request, self._published = None, False


def refusal(reasons: list[str]) -> str:
    """What to tell the user where vLLM's workers refused an adapter; "" where they took it."""
    refused = next(filter(None, reasons), "")
    return (
        refused
        and f"vLLM cannot load the trained adapters: {refused}. Change llm.lora.target_modules, or {_MERGE}"
    )
