"""What goes between learner and workers: plain values and arrays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from priorzero.data.packing import Pool, pack, unpack
from priorzero.play.played import Played
from priorzero.play.players import Player
from priorzero.play.restarts import Ended
from priorzero.play.results import Totals
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.record import overlay

_SEED_STEP = 1_000_003  # between the seeds of workers


@dataclass(frozen=True)
class Share:
    """A worker's part of the environments.

    Attributes:
        number: of the worker, from 0.
        first: its first environment, of those of the run.
        environments: how many it has.
        of: all of the run.
        life: 0 for the first workers of a run, another number for each one that begins later, so
            that no episode is played twice.
        gpus: that it may use.
        seed: the run's.
    """

    number: int
    first: int
    environments: int
    of: int
    life: int
    gpus: float
    seed: int

    @property
    def place(self) -> int:
        """A number that no other worker's environment has; its first one's."""
        return self.first + self.of * self.life

    def settings(self, settings: Mapping[str, Any]) -> ExperimentSettings:
        """The run's settings as this worker plays with them. Worker 0 in its first life has the
        run's own seed: alone it plays what a collector within the run would.
        """
        device = {} if self.gpus else {"device": "cpu"}
        ahead = settings["env"]["listing_workers"]
        return overlay(
            ExperimentSettings(),
            settings,
            dict(
                seed=(self.seed + _SEED_STEP * self.place) % 2**31,
                # Workers of one machine would each take half of its cores.
                env=dict(listing_workers=0 if ahead is None else ahead),
                policy=device,
                # Its trainer trains nothing, and only holds the weights that the learner sends.
                llm=dict(trainer="builtin", rft=dict(kl_reference="collected"), **device),
            ),
        )


@dataclass(frozen=True)
class Order:
    """What a worker is asked to play; see `PriorZeroCollector.collect`.

    version: of the world model's weights that it plays with, a number of the learner's.
    """

    num_segments: int
    env_steps: int
    temperature: float
    player: Player
    new_episodes: int | None
    version: int


@dataclass(frozen=True)
class Reply:
    """What a worker has played.

    Attributes:
        played: `pack_played`.
        versions: of each segment, that of the weights which its first step was played with.
        running: episodes that go on, by the worker's numbers.
        totals: of the worker.
        seconds: of each stage in this round.
        told: level, logger and message of what was logged as a warning or worse.
    """

    played: Mapping[str, Any]
    versions: tuple[int, ...]
    running: tuple[int, ...]
    totals: Totals
    seconds: Mapping[str, float]
    told: tuple[tuple[int, str, str], ...]


def pack_played(played: Played) -> dict[str, Any]:
    """As plain values and arrays; `unpack_played` undoes it."""
    names = sorted({name for effect in played.effects for name in effect})
    missing = float("nan")
    return {
        "segments": pack(played.segments),
        "episodes": [(dict(ended.info), ended.began) for ended in played.episodes],
        "depths": list(played.depths),
        "games": list(played.games),
        "decisions": len(played.effects),
        "steps_of": dict(played.steps_of),
        "effects": {
            name: np.array([effect.get(name, missing) for effect in played.effects])
            for name in names
        },
        "steps": played.steps,
        "begun": played.begun,
    }


def unpack_played(message: Mapping[str, Any], before: int, pool: Pool) -> Played:
    """What was packed. Arrays are copied: those of a message lie in Ray's memory, which would stay
    taken as long as the replay buffer holds a step.

    Args:
        before: environment steps of the run before the call.
        pool: see `unpack`.
    """
    arrays = {name: np.array(values) for name, values in message["segments"].items()}
    effects: list[dict[str, float]] = [{} for _ in range(message["decisions"])]
    for name, values in message["effects"].items():
        for effect, value in zip(effects, values.tolist(), strict=True):
            if not math.isnan(value):  # a decision without the LLM has no figures of it
                effect[name] = value
    return Played(
        before,
        segments=unpack(arrays, pool),
        episodes=[Ended(info, began) for info, began in message["episodes"]],
        depths=message["depths"],
        games=message["games"],
        steps_of=Counter(message["steps_of"]),
        effects=effects,
        steps=message["steps"],
        begun=message["begun"],
    )
