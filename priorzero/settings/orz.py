"""Settings of Open-Reasoner-Zero's trainer, which docs/ORZ.md describes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from priorzero.settings.record import Rule, Settings, one_of, positive


@dataclass(kw_only=True)
class OrzSettings(Settings):
    """Where ORZ's workers are and how they compute; learning itself is set by `llm.train` and
    `llm.rft`, as for the built-in trainer.
    """

    ray_address: str = ""
    """Ray cluster to join: host:port of its head, or auto for the one this machine belongs to;
    empty: one is started for the run, and ended with it."""
    actor_nodes: int = 1
    """Machines the workers are spread over."""
    actor_gpus_per_node: int = 1
    """Workers on each; they train in parallel on parts of a step. Without CUDA each is a process on
    the CPU, and Ray's resource GPU only counts them."""
    placement: str = "PACK"
    """Ray's rule for the machines: PACK and STRICT_PACK on as few as possible, SPREAD and
    STRICT_SPREAD on as many; the strict ones wait rather than do otherwise."""
    zero_stage: int = 2
    """DeepSpeed's sharing of memory between the workers. 2: optimiser and gradients; 3: weights
    too."""
    adam_offload: bool = False
    """Keep the optimiser in the machine's memory and step there, instead of on the GPU."""
    flash_attn: bool = False
    """FlashAttention, where it is installed; else torch's own attention."""
    dtype: str = "auto"
    """Number format of ORZ's weights; its optimiser keeps float32 copies. auto: bfloat16 on CUDA,
    float32 on a CPU."""
    packing: bool = True
    """Compute several decisions in one row, up to llm.train.max_batch_tokens ids."""
    on_failure: str = "error"
    """When a worker dies, does not answer in time or cannot train. error: the run ends, and goes on
    from its last checkpoint with --resume; builtin: the built-in trainer does this update and all
    later ones (memory for a second optimiser, filled after every update)."""
    timeout_s: float = 1800.0
    """Seconds an update may take."""
    start_timeout_s: float = 600.0
    """Seconds Ray may take to find room for the workers, and the workers to load the model."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(
            self, "actor_nodes", "actor_gpus_per_node", "timeout_s", "start_timeout_s"
        )
        yield from one_of(self, "placement", "PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD")
        yield Rule("zero_stage", self.zero_stage in (2, 3), "it must be 2 or 3")
        yield from one_of(self, "dtype", "auto", "float32", "bfloat16")
        yield from one_of(self, "on_failure", "error", "builtin")
        here = self.ray_address or self.actor_nodes == 1
        yield Rule(
            "actor_nodes",
            bool(here),
            "a cluster that is started for the run has one machine: name a cluster in ray_address",
        )

    @property
    def workers(self) -> int:
        """How many train in parallel."""
        return self.actor_nodes * self.actor_gpus_per_node
