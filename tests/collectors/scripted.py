"""A worker whose games are scripted and whose texts are hashed, with a fault where a test wants
one. Workers import this.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import AsyncExitStack

import torch

from priorzero.collectors.messages import Share
from priorzero.collectors.worker import WorkerParts
from priorzero.games.group import GameEnvGroup
from priorzero.lightzero import compile_priorzero
from priorzero.run.metrics import Stopwatch
from priorzero.settings.experiment import ExperimentSettings
from priorzero.types import PriorZeroError
from priorzero_collector import PriorZeroCollector
from priorzero_config import get_priorzero_config
from priorzero_policy import PriorZeroPolicy
from tests.conftest import DIM, HashEncoder
from tests.playing import ScriptedEnv

MAKE = "tests.collectors.scripted:make"
ENVIRONMENTS = 4


class Encoder(HashEncoder):
    """With the totals that a run tells."""

    def stats(self):
        return {"hits": 1.0, "misses": 2.0, "hit_rate": 0.5}


class Env(ScriptedEnv):
    """Of a group whose totals are told; environments fall out of step with each other."""

    ahead = None

    def __init__(self, number: int) -> None:
        super().__init__(number, length=6 + number)


class FaultyEnv(Env):
    """Does `fault` at its step `at`, counted over its episodes."""

    def __init__(self, number: int, fault: str, at: int) -> None:
        super().__init__(number)
        self._fault, self._left = fault, at

    def step(self, action):
        self._left -= 1
        if self._left == 0:
            if self._fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._fault == "sleep":
                time.sleep(60)
            if self._fault == "raise":
                raise ZeroDivisionError("a fault of ours")
            raise PriorZeroError("the story file is gone; put it back")
        return super().step(action)


def settings_of(**policy) -> tuple[ExperimentSettings, dict]:
    """Of a tiny run, and DI-engine's class names."""
    small = dict(
        device="cpu",
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        num_simulations=4,
        support_scale=10,
        num_unroll_steps=5,
        context_steps=3,
        game_segment_length=4,
        action_vocabulary=dict(capacity=64, overflow=4),
    )
    return get_priorzero_config(
        env_id="tw-simple",
        seed=3,
        presets=("pure_unizero",),
        overrides=dict(policy=small | policy, env=dict(collector_env_num=ENVIRONMENTS)),
    )


def policy_of(settings: ExperimentSettings, create: dict) -> PriorZeroPolicy:
    """Untrained; every process draws the same weights."""
    torch.manual_seed(0)
    policy = PriorZeroPolicy(compile_priorzero(settings, create, DIM).policy)
    policy.attach_encoder(Encoder().encode)
    return policy


def collector_of(settings, policy, envs, watch=None, prior=None) -> PriorZeroCollector:
    """A collector on them."""
    return PriorZeroCollector(
        settings.policy,
        policy,
        envs,
        Encoder(),
        prior,
        history_length=2,
        seed=settings.seed,
        watch=watch,
    )


async def make(plan, share: Share) -> WorkerParts:
    """See `priorzero.collectors.worker.Make`; `plan["faults"]` says who fails how and when, as
    {(number, life): (fault, step)}.
    """
    torch.set_num_threads(1)
    settings = share.settings(plan["settings"])
    fault = plan.get("faults", {}).get((share.number, share.life))
    if fault is not None and fault[0] == "start":
        raise PriorZeroError("there is no such game here; put it there")

    numbers = range(share.first, share.first + share.environments)
    envs = [FaultyEnv(i, *fault) if fault else Env(i) for i in numbers]
    group = GameEnvGroup(envs, seed=share.seed, first=share.place)
    policy = policy_of(settings, plan["create"]).snapshot()
    watch = Stopwatch()
    collector = collector_of(settings, policy, group, watch)
    return WorkerParts(collector, policy, None, watch, AsyncExitStack())
