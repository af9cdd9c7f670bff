"""Tasks of ScienceWorld (arXiv:2203.07540); a Java virtual machine each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from priorzero.games.java_games import (
    MAX_SCORE,
    GameId,
    is_installed,
    java_game,
    require_package,
    set_java_options,
    variation_of,
    with_task,
)
from priorzero.games.kinds import GameKind, tidy
from priorzero.games.records import GameSpec, GameState, StateDetails
from priorzero.types import PriorZeroError

PACKAGE, PINNED = "scienceworld", "1.2.3"
PREFIX = "sw"
_OPTIONS = "variation (a number), eval (dev or test), simplify (easy, or names joined by +)"
_REVISION = 1


class Game(GameKind):
    """Valid actions and details come with each step, in 0.03 to 0.3 s: a state has hundreds.

    Options: `variation` is the one that every episode then plays. Without it each training episode
    draws one of the task's training variations, each evaluation episode one of its test variations
    (`eval=dev`: development variations), and the task stands in every observation, as in the
    paper's agents. `simplify`: the package's simplifications, joined by `+`.

    Score: the package's, 0 to 100. A failed task has 0 points, which is how the paper's scores
    count it; the package's own number for it is -100.

    Hash: of the package's tree of all objects, hidden ones included, of the score and of all that
    is seen.
    """

    example = "sw-lifespan-longest-lived:simplify=easy,variation=0"
    how_to_get = (
        "play tasks of ScienceWorld, such as sw-boil:simplify=easy (needs Java and pip install"
        " --no-deps -r requirements/more_games.txt)"
    )

    @classmethod
    def find(cls, env_id: str, folders: Sequence[Path]) -> GameSpec | None:
        """See `GameKind.find`. The package tells task and expert's commands, once per id."""
        if not env_id.startswith(f"{PREFIX}-"):
            return None
        version = require_package(env_id, PACKAGE, PINNED)
        game = GameId.parse(env_id)
        if unknown := set(game.options) - {"variation", "eval", "simplify"}:
            raise PriorZeroError(
                f"{env_id!r}: there is no option {', '.join(sorted(unknown))}; a task has "
                + _OPTIONS
            )

        return java_game(
            env_id, "scienceworld", game, PACKAGE, version, fixed="variation", revision=_REVISION
        )

    @classmethod
    def available(cls, folders: Sequence[Path]) -> list[str]:
        """See `GameKind.available`. The tasks' names are in a file of the package."""
        if not is_installed(PACKAGE):
            return []
        from scienceworld.constants import ID2TASK

        tasks = ", ".join(f"{PREFIX}-{task}" for task in sorted(ID2TASK.values()))
        return [f"tasks of ScienceWorld ({tasks}; options: {_OPTIONS})"]

    @classmethod
    def preload(cls) -> None:
        """See `GameKind.preload`. The virtual machine starts with each game."""
        set_java_options()
        import scienceworld  # noqa: F401

    @classmethod
    def examine(cls, game: GameId) -> dict[str, Any]:
        """Task and expert's commands of the walkthrough's variation; in a process of its own.

        The commands are played: some go on after the end, and they count only where they win.

        Raises:
            PriorZeroError: task or option is impossible.
        """
        opened = cls(str(game))
        opened._begin(0, with_walkthrough=True)
        task, commands = opened._env.get_task_description(), opened._env.get_gold_action_sequence()

        state, played = opened.reset(0), []
        for command in commands:
            if state.terminated:
                break
            state = opened.step(str(command))
            played.append(str(command))
        return {"task": tidy(task), "walkthrough": played if state.won else []}

    def __init__(self, path: str) -> None:
        """See `GameKind.__init__`.

        Raises:
            PriorZeroError: task or option is impossible; `find` says so first.
        """
        from scienceworld import ScienceWorldEnv

        game = GameId.parse(path)
        self._env = ScienceWorldEnv(envStepLimit=float("inf"))
        self._task = game.game
        self._simplify = game.options.get("simplify", "").replace("+", ",")
        self._fixed = game.number("variation")
        evaluated_on = game.options.get("eval", "test")
        if evaluated_on not in ("dev", "test"):
            raise PriorZeroError(f"eval={evaluated_on} is not allowed; give dev or test")

        try:
            self._env.load(self._task, 0, self._simplify)
        except ValueError as error:
            raise PriorZeroError(str(error)) from error
        last = self._env.get_max_variations(self._task) - 1
        if self._fixed is not None and self._fixed > last:
            raise PriorZeroError(f"variation={self._fixed} is not allowed; there are 0 to {last}")

        self._training = self._env.get_variations_train()
        of_set = self._env.get_variations_dev, self._env.get_variations_test
        self._evaluation = of_set[evaluated_on == "test"]()
        self._details = StateDetails((), "", "")

    def _begin(self, seed: int, with_walkthrough: bool = False) -> None:
        variation = variation_of(seed, self._training, self._evaluation, self._fixed)
        self._env.load(self._task, variation, self._simplify, generateGoldPath=with_walkthrough)

    def reset(self, seed: int) -> GameState:
        """See `GameKind.reset`. The seed draws the variation; there is no other randomness."""
        self._begin(seed)
        feedback, observed = self._env.reset()
        return self._state(feedback, observed, done=False)

    def step(self, action: str) -> GameState:
        """See `GameKind.step`."""
        feedback, _, done, observed = self._env.step(action)
        return self._state(feedback, observed, done)

    def _state(self, feedback: str, observed: dict[str, Any], done: bool) -> GameState:
        score = float(max(0, observed["score"]))
        terminated = bool(done)
        look = tidy(observed["look"])
        if self._fixed is None:
            look = with_task(tidy(self._env.get_task_description()), look)

        actions = {action.strip() for action in observed["valid"]} - {""}
        self._details = StateDetails(
            () if terminated else tuple(sorted(actions)), look, tidy(observed["inv"])
        )
        whole = [self._env.getObjectTree(), score, look, self._details.inventory, sorted(actions)]
        return GameState(
            feedback=tidy(feedback),
            score=score,
            terminated=terminated,
            won=terminated and score == MAX_SCORE,
            moves=int(observed["moves"]),
            state_hash=hashlib.md5(json.dumps(whole, sort_keys=True).encode()).hexdigest(),
            details=self._details,
        )

    def describe(self) -> StateDetails:
        """See `GameKind.describe`."""
        return self._details
