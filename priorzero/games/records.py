"""The small records of this room. Standard library only: interpreter processes load this too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GameSpec:
    """One game and its settings, as its kind found it.

    Attributes:
        env_id: the name it was asked for by.
        kind: file name of its kind in `priorzero.games.kinds`.
        path: what the kind's class opens, as a rule a story file.
        title: its name in words.
        goal: one line for the LLM's system prompt.
        max_score: the game's own maximum.
        max_steps: actions before an episode is truncated.
        story_key: identity of story file and interpreter in the cache of world states.
        walkthrough: commands that reach the best known score; may be empty.
        walkthrough_seed: the seed under which they do, where the game draws random numbers.
    """

    env_id: str
    kind: str
    path: str
    title: str
    goal: str
    max_score: float
    max_steps: int
    story_key: str
    walkthrough: tuple[str, ...] = ()
    walkthrough_seed: int = 0


@dataclass(frozen=True)
class StateDetails:
    """What depends on the world state alone, and is therefore cached by its hash.

    `valid_actions` is sorted and free of duplicates. `look` and `inventory` are the game's
    answers to these two commands, asked without advancing the game.
    """

    valid_actions: tuple[str, ...]
    look: str
    inventory: str


@dataclass(frozen=True)
class GameState:
    """One answer of an interpreter, after a reset or an action.

    `score` is the game's own running score, not a reward. `terminated`: the game itself ended
    (won, lost or quit). `details` is None where computing them is expensive and the parent should
    look into its cache first.
    """

    feedback: str
    score: float
    terminated: bool
    won: bool
    moves: int
    state_hash: str
    details: StateDetails | None = None


class WorkerFault(Exception):
    """An interpreter process could not answer. It has been killed; the next call starts another.

    Attributes:
        way: how it failed, equal for equal failures. Empty where a repetition proves nothing about
            the game: a time limit, or an interruption of our own.
    """

    def __init__(self, message: str, way: str = "") -> None:
        super().__init__(message)
        self.way = way


class WorkerTimeout(WorkerFault):
    """The call ran past its time limit: the interpreter hangs."""


class WorkerDied(WorkerFault):
    """The process ended in mid-call: a crash of the interpreter, or somebody killed it."""


class WorkerError(WorkerFault):
    """The interpreter raised a Python exception; the text carries its traceback."""
