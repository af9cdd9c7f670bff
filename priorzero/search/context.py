"""The last few real steps of a running episode: all the world model remembers when it plans.

The slot of an episode owns one (`priorzero/play/slot.py`); nothing derived from weights is kept, so
an update never leaves a stale cache behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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

    @property
    def observations(self) -> np.ndarray:
        """`[c, E]` float32, 1 <= c <= C, oldest first."""
        return np.stack(self._observations)

    @property
    def actions(self) -> np.ndarray:
        """`[c - 1]` int64, the actions between the observations."""
        between = len(self._observations) - 1
        return np.array(list(self._actions)[-between:] if between else [], dtype=np.int64)


class ContextStore:
    """Per environment id, the newest observations and the actions between them.

    Collect and eval each own one; nothing is shared between environments, and nothing derived from
    weights is kept, so an update never leaves a stale cache behind.

    Args:
        steps: `C`, how many observations a root may look back on, itself included.
        dim: `E`, dimension of an observation vector.
    """

    def __init__(self, steps: int, dim: int) -> None:
        self._steps, self._dim = steps, dim
        self._observations: dict[int, deque[np.ndarray]] = {}
        self._actions: dict[int, deque[int]] = {}

    def reset(self, env_id: int | None = None) -> None:
        """Forget an environment (its episode ended), or all of them."""
        if env_id is None:
            self._observations.clear()
            self._actions.clear()
        else:
            self._observations.pop(env_id, None)
            self._actions.pop(env_id, None)

    def observe(self, env_id: int, observation: np.ndarray) -> None:
        """Add the newest observation `[E]`."""
        self._observations.setdefault(env_id, deque(maxlen=self._steps)).append(observation)
        self._actions.setdefault(env_id, deque(maxlen=self._steps - 1))

    def act(self, env_id: int, action_id: int) -> None:
        """Add the action taken in the newest observation."""
        if self._steps > 1:
            self._actions[env_id].append(action_id)

    def batch(
        self, env_ids: Sequence[int], device: str | torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """observations `[B, C, E]`, actions `[B, C]`, lengths `[B]` as `SearchMemory.root` takes
        them (right-padded).
        """
        longest = max(len(self._observations[e]) for e in env_ids)
        observations = np.zeros((len(env_ids), longest, self._dim), dtype=np.float32)
        actions = np.zeros((len(env_ids), longest), dtype=np.int64)
        lengths = np.zeros(len(env_ids), dtype=np.int64)
        for row, env_id in enumerate(env_ids):
            seen, done = self._observations[env_id], list(self._actions[env_id])
            lengths[row] = len(seen)
            observations[row, : len(seen)] = np.stack(seen)
            between = done[-(len(seen) - 1) :] if len(seen) > 1 else []
            actions[row, : len(between)] = between
        return tuple(torch.from_numpy(x).to(device) for x in (observations, actions, lengths))
