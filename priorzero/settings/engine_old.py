"""Settings of the LLM engines; plain data, no heavy import."""

from __future__ import annotations

from dataclasses import dataclass, field

from priorzero.llm.scoring.requests import ReasoningSettings
from priorzero.types import PriorZeroError


@dataclass(frozen=True)
class VLLMSettings:
    """Settings of the vLLM engine."""

    dtype: str = "auto"  # "auto", "bfloat16" or "float32"
    max_model_len: int | None = (
        None  # longest prompt plus action, in tokens; None: the model's own, at most 8192
    )
    gpu_memory_utilization: float = (
        0.35  # share of the GPU; the trainer and the world model need the rest
    )
    kv_cache_gb: float = 1.0  # CPU only: memory for keys and values
    block_size: int | None = None  # None: 32 on the CPU (its smallest), vLLM's own choice on CUDA
    enforce_eager: bool | None = None  # None: eager on the CPU, CUDA graphs on CUDA
    sleep_mode: bool = False  # CUDA: release the engine's memory while the LLM trains
    # Adapters the trainer pushes: "merge" them and push all weights, "hot_load" them by themselves,
    # or "auto": hot_load on CUDA (in 16 bits, its kernels know no other), merge on the CPU, where
    # adapters slow scoring to a third or less.
    lora: str = "auto"
    request_timeout_s: float = 120.0  # one request; then it is retried
    control_timeout_s: float = 300.0  # weight transfer, sleep and wake
    start_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        times = (self.request_timeout_s, self.control_timeout_s, self.start_timeout_s)
        if self.dtype not in ("auto", "bfloat16", "float16", "float32") or min(times) <= 0:
            raise PriorZeroError(
                f"vLLM settings need a known dtype and positive time limits: {self}"
            )
        if self.lora not in ("auto", "merge", "hot_load"):
            raise PriorZeroError(
                f"llm.vllm.lora {self.lora!r} is unknown; use 'auto', 'merge' or 'hot_load'"
            )
        if not 0 < self.gpu_memory_utilization <= 1 or self.kv_cache_gb <= 0:
            raise PriorZeroError(
                f"vLLM settings need memory: 0 < gpu_memory_utilization <= 1, kv_cache_gb > 0: {self}"
            )


@dataclass(frozen=True)
class EngineSettings:
    """Which engine, and how it behaves; wrong values are refused on construction."""

    kind: str = "auto"  # "auto", "vllm" or "transformers"
    required: bool = (
        False  # True: vLLM must work (at the start and later), False: transformers takes over
    )
    compute_dtype: str = "auto"  # transformers engine: "auto", "bfloat16" or "float32"
    # transformers engine with a copy of its own, computing in bfloat16: norms and residual stream
    # in "float32" too, or in "bfloat16"; "auto": float32 on a CPU, bfloat16 on CUDA.
    residual_dtype: str = "auto"
    max_batch_tokens: int = 4096  # transformers engine: padded tokens of one forward
    cache_size: int = 20_000  # scored states kept; 0 switches the cache off
    prefix_cache_mib: int = (
        1024  # transformers engine: keys and values of earlier prompts; 0: of fixed heads only
    )
    max_restarts: int = 2
    attempts: int = 3  # tries of one call before its engine counts as dead
    max_prompt_tokens: int | None = None  # lowers the model's own limit
    prompt_tokens: int = 512  # length of the prompts with which "auto" times the engines
    reasoning: ReasoningSettings = field(default_factory=ReasoningSettings)
    vllm: VLLMSettings = field(default_factory=VLLMSettings)

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "vllm", "transformers"):
            raise PriorZeroError(
                f"LLM engine {self.kind!r} is unknown; use 'auto', 'vllm' or 'transformers'"
            )
        if self.residual_dtype not in ("auto", "float32", "bfloat16"):
            raise PriorZeroError(
                f"llm.residual_dtype {self.residual_dtype!r} is unknown; use 'auto', 'float32' or 'bfloat16'"
            )
        if self.required and self.kind == "transformers":
            raise PriorZeroError(
                "llm_required demands vLLM, but the engine is fixed to 'transformers'; change one"
            )
        if (
            min(self.max_batch_tokens, self.attempts) < 1
            or min(self.cache_size, self.prefix_cache_mib, self.max_restarts) < 0
        ):
            raise PriorZeroError(f"LLM engine settings hold a number that is too small: {self}")
