"""Settings of collectors in other processes, which docs/COLLECTORS.md describes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from priorzero.settings.record import Rule, Settings, not_negative, one_of, positive


@dataclass(kw_only=True)
class CollectorSettings(Settings):
    """What a worker gets and how long it may take; how many there are is `collector_workers`, and
    the cluster `ray_address` (`priorzero_config.HybridTrainingConfig`).
    """

    worker_cpus: float = 1.0
    """Ray's resource CPU per worker; also torch's CPU threads in it, rounded down and at least
    one."""
    worker_gpus: float = 0.0
    """Ray's resource GPU per worker; a part of 1 lets several share a GPU. 0: on the CPU, whatever
    policy.device and llm.device say of the learner."""
    placement: str = "SPREAD"
    """Ray's rule for the machines: SPREAD over all, DEFAULT fills them one after the other."""
    timeout_s: float = 1800.0
    """Seconds a worker may take for its part of an iteration's segments before it is given up."""
    start_timeout_s: float = 600.0
    """Seconds until all workers have found room and loaded their models."""
    max_restarts: int = 3
    """How often in a row a worker may fail, without finishing its part in between, before the run
    ends."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(self, "worker_cpus", "timeout_s", "start_timeout_s")
        yield from not_negative(self, "worker_gpus", "max_restarts")
        yield from one_of(self, "placement", "SPREAD", "DEFAULT")
