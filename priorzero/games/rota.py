"""Which game an environment plays next, in a run of several games."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from priorzero.games.records import GameSpec

_STREAM = 71  # keeps the draw apart from the episode's own seed, which has the other three numbers


class Rota:
    """The game of every episode: a pure function of environment and number of the episode, so that
    a resumed run, which counts on, plays the games it would have played.

    Without weights environment i of E begins with game floor(i G / E) of G and goes round: every
    game gets the same number of episodes, and environments begin with games that lie far apart.

    Args:
        games: `G` >= 1 of them.
        environments: `E`, how many there are.
        weights: `G` positive shares of the episodes, which need not sum to 1; None: in turn.
        seed: the run's; of the draw.

    Attributes:
        games: as given.
    """

    def __init__(
        self,
        games: Sequence[GameSpec],
        environments: int,
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        assert games and environments > 0
        assert weights is None or len(weights) == len(games), "a weight for every game"
        self.games = tuple(games)
        self._environments, self._seed = environments, seed
        self._shares = None if weights is None else np.asarray(weights) / np.sum(weights)

    def game(self, environment: int, episode: int) -> GameSpec:
        """What environment `environment` plays in its episode `episode`, both counted from 0."""
        if self._shares is None:
            first = environment * len(self.games) // self._environments
            return self.games[(first + episode) % len(self.games)]
        rng = np.random.default_rng((self._seed, environment, episode, _STREAM))
        return self.games[int(rng.choice(len(self.games), p=self._shares))]

    def named(self, env_id: str) -> GameSpec | None:
        """The game of this name; None where the run does not play it."""
        return next((game for game in self.games if game.env_id == env_id), None)
