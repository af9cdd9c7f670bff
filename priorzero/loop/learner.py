"""DI-engine's learner around the policy's learn mode, and the hook that hands its numbers to our
metrics.
"""

from __future__ import annotations

import os

import numpy as np

from priorzero.quiet import quiet_base

with quiet_base():
    from ding.utils import LEARNER_REGISTRY
    from ding.worker.learner import BaseLearner, LearnerHook


class MetricsHook(LearnerHook):
    """Keeps every update's scalars until `drain` returns their means."""

    def __init__(self) -> None:
        super().__init__(name="priorzero_metrics", priority=50, position="after_iter")
        self._rows: list[dict[str, float]] = []

    def __call__(self, engine: BaseLearner) -> None:
        scalars = engine.log_buffer["scalar"]
        self._rows.append({name: float(scalars[name]) for name in scalars})

    def drain(self) -> dict[str, float]:
        """Means over the updates since the last call, and their number as `updates`; empty without
        updates.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return {}
        return {name: float(np.mean([r[name] for r in rows])) for name in rows[0]} | {
            "updates": float(len(rows))
        }


@LEARNER_REGISTRY.register("priorzero")
class PriorZeroLearner(BaseLearner):
    """DI-engine's learner without its stock hooks: their tables and checkpoints would appear beside
    ours.

    `metrics` holds what the updates gave; further hooks may be registered with `register_hook`.
    """

    def _setup_hook(self) -> None:
        self.metrics = MetricsHook()
        self.register_hook(self.metrics)


def make_learner(cfg, policy, tensorboard, exp_name: str) -> PriorZeroLearner:
    """A learner on the policy's learn mode."""
    with quiet_base():
        # DI-engine puts "./" before the name, which an absolute path does not survive.
        return PriorZeroLearner(
            cfg.policy.learn.learner,
            policy.learn_mode,
            tensorboard,
            exp_name=os.path.relpath(exp_name),
        )
