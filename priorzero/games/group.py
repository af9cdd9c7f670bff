"""Several environments stepped at once: their interpreters are processes, so their calls overlap.

From an asyncio loop: `timesteps = await asyncio.to_thread(group.step, {env_id: action})`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ding.envs import BaseEnvTimestep

from priorzero.games.ahead import COUNTERS as AHEAD_COUNTERS
from priorzero.games.env import TextGameEnv
from priorzero.games.records import GameSpec
from priorzero.games.rota import Rota
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)


class GameEnvGroup:
    """Environments by id 0..n-1. One thread may use a group at a time."""

    def __init__(
        self,
        envs: Sequence[Callable[[], TextGameEnv] | TextGameEnv],
        seed: int | None = None,
        rota: Rota | None = None,
        first: int = 0,
    ) -> None:
        """Starts no interpreter yet.

        Args:
            envs: the environments, or functions that make them.
            seed: the run's. Environment i gets `(seed, first + i)`, so its episodes depend on
                nothing else. None leaves the seeds as they are.
            rota: which game an environment's next episode plays; None: always the one it has.
            first: number of the first environment among all of a run, where these are a part.
        """
        assert envs, "a GameEnvGroup needs at least one environment"
        self.envs: list[TextGameEnv] = [env if hasattr(env, "step") else env() for env in envs]
        self._rota, self._first = rota, first
        self._pool = ThreadPoolExecutor(max_workers=len(self.envs), thread_name_prefix="game-env")
        if seed is not None:
            self.seed(seed)

    def __len__(self) -> int:
        return len(self.envs)

    def seed(self, seed: int, dynamic_seed: bool = True) -> None:
        """See `TextGameEnv.seed`; each environment gets its own index."""
        for index, env in enumerate(self.envs):
            env.seed(seed, dynamic_seed, env_index=self._first + index)

    def reset(self, env_ids: Iterable[int] | None = None) -> dict[int, dict[str, Any]]:
        """First observations of new episodes, by env id.

        Args:
            env_ids: which environments; None: all.

        Raises:
            PriorZeroError: some could not be started; raised after all have answered.
        """
        ids = range(len(self.envs)) if env_ids is None else list(env_ids)
        return _gather("reset", {i: self._pool.submit(self._reset, i) for i in ids})

    def _reset(self, i: int) -> dict[str, Any]:
        env = self.envs[i]
        if self._rota is not None:
            env.play(self._rota.game(self._first + i, env.next_episode))
        return env.reset()

    def play(self, game: GameSpec) -> None:
        """Let all environments play this game from their next `reset` on."""
        assert self._rota is None, "the rota says what is played"
        for env in self.envs:
            env.play(game)

    def step(self, actions: Mapping[int, str]) -> dict[int, BaseEnvTimestep]:
        """Type one action in each named environment, all at once. No automatic reset.

        Raises:
            ValueError: an action is not valid; raised after all environments have answered.
        """
        return _gather(
            "step",
            {i: self._pool.submit(self.envs[i].step, action) for i, action in actions.items()},
        )

    def state_dict(self) -> list[dict[str, Any]]:
        """`TextGameEnv.state_dict` of each environment."""
        return [env.state_dict() for env in self.envs]

    def replay(self, states: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Bring saved episodes back (`TextGameEnv.replay`), all at once.

        Args:
            states: of `state_dict`; environments that there are not any more are left out.

        Returns:
            present observations by env id, of the episodes that came back.
        """
        pairs = list(zip(self.envs, states, strict=False))
        futures = {
            i: self._pool.submit(self._replay, env, state) for i, (env, state) in enumerate(pairs)
        }
        answers = _gather("replay", futures)
        return {i: answer for i, answer in answers.items() if answer is not None}

    def _replay(self, env: TextGameEnv, state: dict[str, Any]) -> dict[str, Any] | None:
        if self._rota is not None:
            game = self._rota.named(state.get("game", ""))
            if game is None:
                logger.warning(
                    "a saved episode of %s, which is not played any more, ends here, as truncated",
                    state.get("game", "another run"),
                )
                state = {**state, "commands": None}
            else:
                env.play(game)
        return env.replay(state)

    def stats(self) -> dict[str, float]:
        """Sums of the environments' counters, with those of what lists ahead for them."""
        total: Counter[str] = Counter(dict.fromkeys(AHEAD_COUNTERS, 0))
        for part in (*self.envs, *({env.ahead for env in self.envs} - {None})):
            total.update(part.stats())
        return dict(total)

    def close(self) -> None:
        """Cut short what is under way and end all interpreters."""
        for env in self.envs:
            env.interrupt()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for env in self.envs:
            env.close()


def _gather(what: str, futures: dict[int, Future]) -> dict[int, Any]:
    """Results by env id, once all are there. What failed alike is told once."""
    errors = {i: error for i, future in futures.items() if (error := future.exception())}
    for i, error in errors.items():
        if not isinstance(error, PriorZeroError):
            error.add_note(f"raised by {what} of environment {i}")
            raise error

    if errors:
        alike: dict[str, list[str]] = {}
        for i, error in errors.items():
            alike.setdefault(str(error), []).append(str(i))
        told = "; ".join(f"env {', '.join(ids)}: {text}" for text, ids in alike.items())
        raise PriorZeroError(
            f"{what} failed in {len(errors)} of {len(futures)} environments: {told}"
        ) from next(iter(errors.values()))

    return {i: future.result() for i, future in futures.items()}
