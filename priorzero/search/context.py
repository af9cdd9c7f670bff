"""The last few real steps of a running episode: all the world model remembers when it plans.

The slot of an episode owns one (`priorzero/play/slot.py`); nothing derived from weights is kept, so
an update never leaves a stale cache behind.
"""

from __future__ import annotations

from collections import deque

import numpy as np


class EpisodeContext:
    """The newest observations of one episode and the actions between them.

    Call `observe` for a new state, `act` for the action taken in it, by turns.

    Args:
        steps: `C` >= 1, how many observations a root looks back on, itself included.
    """

    def __init__(self, steps: int) -> None:
        assert steps >= 1
        self._observations: deque[np.ndarray] = deque(maxlen=steps)
        self._actions: deque[int] = deque(maxlen=steps)

    def observe(self, vector: np.ndarray) -> None:
        """Add the newest observation `[E]`."""
        self._observations.append(vector)

    def act(self, action_id: int) -> None:
        """Add the id of the action taken in the newest observation."""
        assert self._observations, "an action needs a state it is taken in"
        self._actions.append(action_id)

    def restore(self, observations: np.ndarray, actions: np.ndarray) -> None:
        """Look back on `observations` `[c, E]` and the `actions` `[c - 1]` between them, as the
        properties below gave them.
        """
        assert len(actions) == len(observations) - 1
        self._observations.extend(observations)
        self._actions.extend(int(action) for action in actions)

    @property
    def observations(self) -> np.ndarray:
        """`[c, E]` float32, 1 <= c <= C, oldest first."""
        return np.stack(self._observations)

    @property
    def actions(self) -> np.ndarray:
        """`[c - 1]` int64, the actions between the observations."""
        between = len(self._observations) - 1
        return np.array(list(self._actions)[-between:] if between else [], dtype=np.int64)
