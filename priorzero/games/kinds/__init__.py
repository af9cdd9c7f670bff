"""Kinds of games, one file each: `<kind>.py` here defines one class `Game(GameKind)`.

A kind is found by its file name (see `priorzero.plugins`), so that adding one touches no other
file: catalogue, environment, worker and the conformance test (`tests/games/test_kinds.py`) go
through every file of this folder.

This module and the kinds' own imports at module level must stay light, since interpreter processes
load them: what a kind's interpreter needs is imported in `GameKind.preload` and later.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from priorzero import plugins
from priorzero.games.records import GameSpec, GameState, StateDetails


class GameKind(ABC):
    """The contract. Class methods run in the parent, except `preload`; a game runs in a worker.

    The parent never opens a game: interpreters are C code, and one that crashes must not take the
    run along.

    Seeds: two games that are reset with the same seed and given the same actions answer the same,
    state hashes included, in whatever process they run. A game without randomness may ignore the
    seed. Seeds are at least 1,000, but for a walkthrough's own. A game that comes in variations
    may draw the episode's from the seed, and then keeps those that it is evaluated on apart
    (`for_evaluation`).

    Hashes: Two states with equal `state_hash` have equal `describe`, whatever random numbers were
    drawn on the way, since details are cached by hash, across processes and runs.
    """

    example: ClassVar[str]
    """An `env_id` to show in messages and to test the kind with, of a small game."""

    how_to_get: ClassVar[str]
    """Half a sentence for the error message: how the user gets a game of this kind."""

    # --- in the parent ----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def find(cls, env_id: str, folders: Sequence[Path]) -> GameSpec | None:
        """The game that `env_id` names; generated here, if the kind generates games.

        Args:
            env_id: as the user wrote it.
            folders: where story files are looked for, see `priorzero.games.story_files`.

        Returns:
            None where `env_id` names no game of this kind.

        Raises:
            PriorZeroError: it does, and the game cannot be played; the message says why.
        """

    @classmethod
    @abstractmethod
    def available(cls, folders: Sequence[Path]) -> list[str]:
        """One line per game of this kind that could be played now, for messages."""

    # --- in the interpreter processes -------------------------------------------------------------

    @classmethod
    @abstractmethod
    def preload(cls) -> None:
        """Import what games of this kind need; forked workers share it.

        Raises:
            PriorZeroError, ImportError: a part is missing.
        """

    @abstractmethod
    def __init__(self, path: str) -> None:
        """Open the game at `GameSpec.path`. Called once in a worker, before its first reset."""

    @abstractmethod
    def reset(self, seed: int) -> GameState:
        """Start an episode, also in the middle of another one."""

    @abstractmethod
    def step(self, action: str) -> GameState:
        """Type one command.

        Returns:
            the next state. If the game ended, `terminated` is set and `details` holds no
            actions. Elsewhere `details` may be None if finding them is expensive: then they are
            looked up by `state_hash`, and `describe` is asked where the hash is new.
        """

    @abstractmethod
    def describe(self) -> StateDetails:
        """Valid actions, room and inventory of the present state; the game does not advance.

        Not called in a state that ended the game.
        """

    def snapshot(self) -> Any:
        """The present state, random numbers included, for `restore` in any process of the game.

        Returns:
            something that can be pickled; None where states cannot be put back, or where nothing
            is gained by it, since details come with each step.
        """
        return None

    def restore(self, snapshot: Any) -> None:
        """Put back a `snapshot` that is not None; also as the first call, instead of `reset`."""
        raise NotImplementedError(f"{type(self).__module__} takes no snapshots")

    def outcomes(self, seed: int, played: Sequence[str], actions: Sequence[str]) -> list[GameState]:
        """The state that each of `actions` would lead to; the game does not advance.

        A kind without snapshots plays again up to the present state, once per action.

        Args:
            seed: of the episode, as given to `reset`.
            played: every command typed since; of no account where there are snapshots.
            actions: commands, valid or not. The present state has not ended the game.

        Returns:
            one state per action, in order; as `step` would return it.
        """

        before = self.snapshot()

        def come_back() -> None:
            if before is not None:
                self.restore(before)
                return
            self.reset(seed)
            for command in played:
                self.step(command)

        found = []
        for action in actions:
            come_back()
            found.append(self.step(action))
        come_back()
        return found

    def advise(self, seed: int, played: Sequence[str]) -> tuple[str, ...]:
        """Commands that win from the present state, as the game's own solver finds them; the game
        does not advance.

        Args:
            seed: of the episode, as given to `reset`.
            played: every command typed since.

        Returns:
            empty where there is no way any more, and for a kind that has no solver.
        """
        return ()


def for_evaluation(seed: int) -> bool:
    """Whether an episode's seed is one of evaluation (`priorzero.games.env.episode_seed`)."""
    return seed % 2 == 1


def names() -> tuple[str, ...]:
    """The kinds there are, sorted."""
    return plugins.names(__name__)


def load(kind: str) -> type[GameKind]:
    """The class of a kind."""
    return plugins.load(__name__, kind).Game


def tidy(text: str) -> str:
    """Strip the ends, collapse blanks within a line, keep one empty line in a row at most."""
    text = re.sub(r"[ \t\r\f\v]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
