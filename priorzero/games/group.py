"""Several environments stepped at once: their interpreters are processes, so their calls overlap.

From an asyncio loop: ``timesteps = await asyncio.to_thread(group.step, {env_id: action})``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ding.envs import BaseEnvTimestep

from priorzero.games.env import TextGameEnv
from priorzero.types import PriorZeroError


class EnvGroupError(PriorZeroError):
    """Some environments raised. ``results`` holds what the others returned, ``errors`` the
    exceptions, both by env id.
    """

    def __init__(
        self, what: str, results: dict[int, Any], errors: dict[int, BaseException]
    ) -> None:
        super().__init__(
            f"{what} failed in {len(errors)} of {len(errors) + len(results)} environments: "
            + "; ".join(f"env {i}: {error}" for i, error in errors.items())
        )
        self.results = results
        self.errors = errors


class GameEnvGroup:
    """Wraps environments by id 0..n-1: given as factories, or as the environments themselves
    (``manager._envs`` too).

    ``seed`` is the run's seed; environment i gets ``(seed, i)``, so its episodes depend on nothing
    else. None leaves the seeds as they are. One thread may use a group at a time.
    """

    def __init__(
        self, envs: Sequence[Callable[[], TextGameEnv] | TextGameEnv], seed: int | None = None
    ) -> None:
        if not envs:
            raise PriorZeroError(
                "a GameEnvGroup needs at least one environment; set the number of environments to 1 or more"
            )
        self.envs: list[TextGameEnv] = [env if hasattr(env, "step") else env() for env in envs]
        self._pool = ThreadPoolExecutor(max_workers=len(self.envs), thread_name_prefix="game-env")
        if seed is not None:
            self.seed(seed)

    def __len__(self) -> int:
        return len(self.envs)

    def seed(self, seed: int, dynamic_seed: bool = True) -> None:
        for index, env in enumerate(self.envs):
            env.seed(seed, dynamic_seed, env_index=index)

    def reset(self, env_ids: Iterable[int] | None = None) -> dict[int, dict[str, Any]]:
        """First observations of new episodes, by env id; all environments if ``env_ids`` is None."""
        ids = range(len(self.envs)) if env_ids is None else list(env_ids)
        return self._gather("reset", {i: self._pool.submit(self.envs[i].reset) for i in ids})

    def step(self, actions: Mapping[int, str]) -> dict[int, BaseEnvTimestep]:
        """Type one action in each named environment, all at once. No automatic reset.

        Raises EnvGroupError, after all have answered, if one raised (an invalid action, say).
        """
        return self._gather(
            "step",
            {i: self._pool.submit(self.envs[i].step, action) for i, action in actions.items()},
        )

    def stats(self) -> dict[str, float]:
        """Sums of the environments' counters."""
        total: dict[str, float] = {}
        for env in self.envs:
            for name, value in env.stats().items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """Cut short what is under way and end all interpreters."""
        for env in self.envs:
            env.interrupt()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for env in self.envs:
            env.close()

    @staticmethod
    def _gather(what: str, futures: dict[int, Future]) -> dict[int, Any]:
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        for i, future in futures.items():
            error = future.exception()
            if error is None:
                results[i] = future.result()
            else:
                errors[i] = error
        if errors:
            raise EnvGroupError(what, results, errors) from next(iter(errors.values()))
        return results
