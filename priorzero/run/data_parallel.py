"""What a run is in a process of several that `torchrun` started: docs/TORCHRUN.md."""

from __future__ import annotations

import copy
from typing import Any, Protocol

from priorzero.ranks import Ranks
from priorzero.run.signals import StopRequest
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.record import require


class Schedule(Protocol):
    """`HybridTrainingConfig`, as far as it is read here."""

    wm_training_mode: str
    off_policy_degree: int
    async_eval: bool
    collector_workers: int
    priorzero_cfg: ExperimentSettings


def require_possible(config: Schedule, eval_only: bool) -> None:
    """Refuse what several processes cannot do together.

    Args:
        config: schedule and settings.
        eval_only: a checkpoint is evaluated and nothing trains.

    Raises:
        PriorZeroError: names every such setting.
    """
    llm, policy = config.priorzero_cfg.llm, config.priorzero_cfg.policy
    trains = llm.enable and (llm.sft.enable or llm.rft.enable)
    aside = "training beside play would ask the other processes at times of its own"

    rules: dict[str, tuple[Any, bool, str]] = {
        "eval_only": (eval_only, not eval_only, "one process evaluates: start it without torchrun"),
        "llm": (
            "trained",
            not trains,
            "torchrun trains the world model alone: keep the LLM as it is with --preset frozen, "
            "leave it out with --no-llm, or train it in one process",
        ),
        "wm_training_mode": (
            config.wm_training_mode,
            config.wm_training_mode == "parallel",
            "with torchrun it must be parallel, in which all processes train in every phase",
        ),
        "off_policy_degree": (config.off_policy_degree, config.off_policy_degree == 0, aside),
        "collector_workers": (
            config.collector_workers,
            not config.collector_workers,
            "with torchrun every process plays itself: take one of the two",
        ),
        "async_eval": (config.async_eval, not config.async_eval, aside),
        "policy.root_prior.temperature": (
            policy.root_prior.temperature,
            not (llm.enable and policy.root_prior.calibrated),
            "with torchrun it must be a number: each process would calibrate one of its own",
        ),
        "policy.action_vocabulary.kind": (
            policy.action_vocabulary.kind,
            policy.action_vocabulary.kind == "stable",
            "with torchrun it must be stable: an action has the same id in all processes",
        ),
    }

    require(rules)


def own_settings(settings: ExperimentSettings, ranks: Ranks) -> ExperimentSettings:
    """Those of this process: a seed of its own for what it plays and draws, and, but for the first,
    nothing to write.
    """
    if ranks.first:
        return settings
    own = copy.deepcopy(settings)
    own.seed = ranks.seed(settings.seed)
    own.metrics.wandb, own.metrics.live = "off", False
    own.decisions.evaluation, own.decisions.collect_share = False, 0.0
    own.eval.transcripts = False
    return own


class CommonStop:
    """A `StopRequest` of several processes: all of them stop where any was asked to. They look at
    it at the same places of the loop.
    """

    def __init__(self, stop: StopRequest, ranks: Ranks) -> None:
        self._stop, self._ranks = stop, ranks

    @property
    def requested(self) -> bool:
        """Whether any process was asked to stop."""
        return self._ranks.any(self._stop.requested)
