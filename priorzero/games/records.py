"""What crosses the pipe between an interpreter process and its parent. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StateDetails:
    """What depends on the world state alone, and is therefore cached by its hash.

    ``valid_actions`` is sorted and free of duplicates. ``look`` and ``inventory`` are the game's
    answers to these two commands, asked without advancing the game.
    """

    valid_actions: tuple[str, ...]
    look: str
    inventory: str


@dataclass(frozen=True)
class GameState:
    """One answer of an interpreter, after a reset or an action.

    ``score`` is the game's own running score, not a reward. ``terminated``: the game itself ended
    (won, lost or quit). ``details`` is None where computing them is expensive (Jericho) and the
    parent should look into its cache first.
    """

    feedback: str
    score: float
    terminated: bool
    won: bool
    moves: int
    state_hash: str
    details: StateDetails | None = None


class WorkerFault(Exception):
    """An interpreter process could not answer. It has been killed; the next call starts a fresh
    one.
    """


class WorkerTimeout(WorkerFault):
    """The call ran past its time limit: the C interpreter hangs."""


class WorkerDied(WorkerFault):
    """The process ended in mid-call: a crash of the interpreter, or somebody killed it."""


class WorkerError(WorkerFault):
    """The interpreter raised a Python exception; the text carries its traceback."""
