"""Visited states at which training episodes begin again: first return, then explore (Go-Explore,
Ecoffet et al. 2021, Nature 590; arXiv:2004.12919).

A run that has found its first points tends to earn them again and again. An episode that begins
behind them need not. A state is what the game's hash tells apart, and is brought back by typing the
commands that led to it, from the seed they were typed at, so that any kind of game will do.

State s is drawn with a chance in proportion to

    w(s) = b^(higher scores in memory than that of s) / sqrt(n(s) + 1),    n(s) its visits,

the paper's count of visits, and its weight of levels with scores in the place of levels. Where the
memory is full, the tenth of it with the smallest w goes.

The way that is remembered is the best one so far: the highest score, then the fewest steps.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from priorzero.data.packing import pack, unpack
from priorzero.data.segment import Segment
from priorzero.play.place import Place
from priorzero.play.slot import Slot
from priorzero.settings.policy import RestartSettings
from priorzero.types import HistoryItem


@dataclass(frozen=True, eq=False)
class Beginning:
    """A game that has come back to a place, and its observation there."""

    place: Place
    observation: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Ended:
    """How an episode ended, and steps and score at which it began; None: at the game's start."""

    info: dict[str, Any]
    began: tuple[int, float] | None


class GameEnv(Protocol):
    """What is needed of a `TextGameEnv`."""

    def state_dict(self) -> dict[str, Any]:
        """The running episode as seed and commands, and what they led to."""

    def replay(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Bring it back; the observation, or None where it led elsewhere."""


@dataclass(eq=False)
class _Visited:
    """A place and how often it was visited."""

    place: Place
    visits: int


class VisitedStates:
    """A bounded memory of visited states.

    Args:
        capacity: most states.
        score_factor: b, in (0, 1]; 1: the score does not count.
    """

    def __init__(self, capacity: int, score_factor: float) -> None:
        assert capacity >= 1 and 0 < score_factor <= 1
        self._capacity, self._factor = capacity, score_factor
        self._states: dict[str, _Visited] = {}  # by hash, in order of first sight

    def __len__(self) -> int:
        """States in memory."""
        return len(self._states)

    @property
    def best_score(self) -> float:
        """Highest score of a state in memory, of which there is one."""
        return max(state.place.score for state in self._states.values())

    def visit(self, state_hash: str, score: float, steps: int, place: Callable[[], Place]) -> None:
        """A training episode has come to this state, and goes on.

        Args:
            score: of the game. steps: commands since its start.
            place: makes the place; called where the way is the first one or a better one.
        """
        known = self._states.get(state_hash)
        if known is None:
            self._states[state_hash] = _Visited(place(), 1)
            if len(self._states) > self._capacity:
                self._drop_least()
            return

        known.visits += 1
        if (score, -steps) > (known.place.score, -known.place.steps):
            known.place = place()

    def weights(self) -> np.ndarray:
        """w `[len(self)]`, in order of first sight."""
        visits = np.array([state.visits for state in self._states.values()])
        scores = np.array([state.place.score for state in self._states.values()])
        levels = np.unique(scores)
        higher = len(levels) - 1 - np.searchsorted(levels, scores)
        return self._factor**higher / np.sqrt(visits + 1.0)

    def draw(self, rng: np.random.Generator) -> Place:
        """A state to begin at, which counts as a visit; there must be one."""
        weights = self.weights()
        chosen = rng.choice(len(weights), p=weights / weights.sum())
        state = list(self._states.values())[chosen]
        state.visits += 1
        return state.place

    def forget(self, state_hash: str) -> None:
        """A state that did not come back; it may be gone already."""
        self._states.pop(state_hash, None)

    def _drop_least(self) -> None:
        order = np.argsort(self.weights(), kind="stable")
        hashes = list(self._states)
        for index in order[: max(1, self._capacity // 10)]:
            del self._states[hashes[index]]

    def state_dict(self) -> dict[str, Any]:
        """As arrays, for a checkpoint."""
        places = [state.place for state in self._states.values()]
        ways = [
            dict(game=dict(place.game), history=[asdict(item) for item in place.history])
            for place in places
        ]
        return {
            "hashes": list(self._states),
            "visits": np.array([s.visits for s in self._states.values()], dtype=np.int64),
            "ways": np.frombuffer(json.dumps(ways).encode("ascii"), dtype=np.uint8),
            "before": pack([Segment(0, 0, 1, place.before) for place in places]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, as far as there is room."""
        arrays = {name: np.asarray(value) for name, value in state["before"].items()}
        ways = json.loads(np.asarray(state["ways"]).tobytes().decode("ascii"))
        visits = np.asarray(state["visits"]).tolist()
        self._states = {
            state_hash: _Visited(
                Place(
                    way["game"],
                    segment.before,
                    tuple(HistoryItem(**item) for item in way["history"]),
                ),
                count,
            )
            for state_hash, count, way, segment in zip(
                state["hashes"], visits, ways, unpack(arrays), strict=True
            )
        }
        while len(self._states) > self._capacity:
            self._drop_least()


class Restarts:
    """Lets a share of the training episodes begin at visited states.

    Args:
        settings: share, and the memory's size and weights.
        reach: steps before its own that a root looks back on.
        rng: of all draws; whoever gives it saves its state.

    Attributes:
        visited: the memory.
        failures: how often a game did not come back to a state.
    """

    def __init__(self, settings: RestartSettings, reach: int, rng: np.random.Generator) -> None:
        self.visited = VisitedStates(settings.capacity, settings.score_factor)
        self.failures = 0
        self._share, self._reach, self._rng = settings.share, reach, rng

    async def begin(self, envs: Mapping[int, GameEnv]) -> dict[int, Beginning]:
        """Bring some of these environments to visited states; the others are to be reset. A state
        that does not come back is forgotten and counted, and its episode begins with the others'.

        Returns:
            by number of the environment.
        """
        places: dict[int, Place] = {}
        for env_id in envs:
            if self._rng.random() < self._share and len(self.visited):
                places[env_id] = self.visited.draw(self._rng)

        def replay(env_id: int) -> dict[str, Any] | None:
            # With the number of its present episode, so that later ones get the seeds they would
            # have had.
            env, game = envs[env_id], places[env_id].game
            return env.replay({**game, "episode": env.state_dict()["episode"]})

        answers = await asyncio.gather(*(asyncio.to_thread(replay, env_id) for env_id in places))
        found = {}
        for (env_id, place), observation in zip(places.items(), answers, strict=True):
            if observation is None:
                self.failures += 1
                self.visited.forget(place.game["state_hash"])
            else:
                found[env_id] = Beginning(place, observation)
        return found

    def remember(self, slot: Slot, env: GameEnv) -> None:
        """The state that this slot's episode, played in `env`, has come to."""

        def place() -> Place:
            segment = slot.segment
            before = segment.history(len(segment), self._reach)
            return Place(env.state_dict(), tuple(before), slot.state.history)

        seen = slot.observation
        self.visited.visit(seen["state_hash"], seen["score"], slot.timestep, place)

    def metrics(self, depths: Sequence[int], ended: Sequence[Ended]) -> dict[str, float]:
        """What a call of the collector tells of them.

        Args:
            depths: commands that were typed again for each episode that began so.
            ended: of all episodes.
        """
        metrics = {
            "restarts": float(len(depths)),
            "restart_replayed": float(sum(depths)),
            "restart_states": float(len(self.visited)),
            "restart_failures": float(self.failures),
        }
        if len(self.visited):
            metrics["restart_best_score"] = self.visited.best_score
        late = [e for e in ended if e.began is not None]
        if late:
            gains = [e.info["score"] - e.began[1] for e in late]
            metrics["restart_gain_mean"] = float(np.mean(gains))
            returns = [e.info["eval_episode_return"] for e in late]
            metrics["restart_return_mean"] = float(np.mean(returns))
        return metrics
