"""A game's walkthrough, step by step, with what every valid command would have led to.

Commands that lead to the same state mean the same, however they are spelled ("take" and "get", "n"
and "north"), so which of the valid commands are right is decided by the states they lead to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.games.env import TextGameEnv, compose_text
from priorzero.games.process import GameProcess
from priorzero.games.records import GameSpec, GameState, StateDetails, WorkerFault
from priorzero.games.valid_actions import default_cache_path, shared_cache
from priorzero.settings.env import EnvSettings
from priorzero.types import HistoryItem, PriorZeroError, TextState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WalkStep:
    """One command of a walkthrough, and the state it is typed in.

    Attributes:
        state: as the LLM reads it; past commands in the spelling of the lists they were in.
        command: the walkthrough's, as it spells it.
        outcomes: `[A]` which outcome each valid command leads to; 0 is the walkthrough's, equal
            numbers are equal states.
        idle: the walkthrough's command leaves the game as it was (it waits, or reads something).
    """

    state: TextState
    command: str
    outcomes: tuple[int, ...]
    idle: bool

    @property
    def right(self) -> np.ndarray:
        """`[A]` bool: valid commands that lead where the walkthrough's leads."""
        return np.asarray(self.outcomes) == 0

    @property
    def listed(self) -> bool:
        """Whether any valid command does: else no agent can take this step."""
        return 0 in self.outcomes

    @property
    def judged(self) -> bool:
        """Whether the step tells something of a prior: it is listed, and changes something."""
        return self.listed and not self.idle


@dataclass(frozen=True)
class Walk:
    """What was walked of a walkthrough.

    Attributes:
        game: the game.
        steps: one per command, up to the limit or the game's end.
        fault: why the walk ended early, "" where it did not.
    """

    game: GameSpec
    steps: tuple[WalkStep, ...]
    fault: str = ""

    @property
    def judged(self) -> list[WalkStep]:
        """Steps that a prior is judged by."""
        return [step for step in self.steps if step.judged]


def walk(game: GameSpec, limit: int, history_length: int) -> Walk:
    """Type the walkthrough, and look at every step where each valid command would lead.

    Args:
        limit: commands at most; 0: all.
        history_length: past steps kept in the states.

    Raises:
        PriorZeroError: the game has no walkthrough, or its interpreter fails at once.
    """
    if not game.walkthrough:
        raise PriorZeroError(
            f"{game.env_id} has no walkthrough, so nothing tells which commands are right; leave "
            "it out of --games"
        )
    commands = game.walkthrough[: limit or None]

    process = GameProcess(game.kind, game.path)
    steps: list[WalkStep] = []
    fault = ""
    try:
        for step in _steps(_Guide(game, process), commands, game.goal, history_length):
            steps.append(step)
    except WorkerFault as error:
        fault = str(error).strip().splitlines()[0]
        logger.warning("%s: the walk ends after %d commands: %s", game.env_id, len(steps), fault)
    finally:
        process.close()

    if not steps:
        raise PriorZeroError(
            f"the walkthrough of {game.env_id} cannot be walked: {fault}. Leave the game out of "
            "--games"
        )
    return Walk(game, tuple(steps), fault)


class _Guide:
    """The game under its walkthrough's seed. Raises WorkerFault where the interpreter fails."""

    def __init__(self, game: GameSpec, process: GameProcess) -> None:
        self._game, self._process = game, process
        self._settings = EnvSettings()
        self._cache = shared_cache(default_cache_path())
        self._played: list[str] = []

    def start(self) -> GameState:
        return self._call("reset", self._game.walkthrough_seed)

    def type(self, command: str) -> GameState:
        self._played.append(command)
        return self._call("step", command)

    def outcomes(self, actions: tuple[str, ...]) -> list[GameState]:
        seed, limit = self._game.walkthrough_seed, self._settings.describe_timeout_s
        return self._process.call("outcomes", seed, self._played, actions, timeout_s=limit)

    def details(self, state: GameState) -> StateDetails:
        """From the cache that runs share, else from the interpreter."""
        if state.details is not None:
            return state.details
        key = self._game.story_key, state.state_hash
        known = self._cache.get(*key)
        if known is None:
            limit = self._settings.describe_timeout_s
            known = self._cache.put(*key, self._process.call("describe", timeout_s=limit))
        return known

    def text(self, state: GameState, details: StateDetails) -> str:
        """The observation, as `TextGameEnv` composes it."""
        return compose_text(state, details, self._settings.observation_parts)

    def _call(self, method: str, argument: int | str) -> GameState:
        return self._process.call(method, argument, timeout_s=self._settings.step_timeout_s)


def _steps(
    guide: _Guide, commands: Sequence[str], goal: str, history_length: int
) -> Iterator[WalkStep]:
    """The steps, one by one, so that those before a fault are kept."""
    history: list[HistoryItem] = []
    state = guide.start()
    for command in commands:
        if state.terminated:
            return
        details = guide.details(state)
        actions = details.valid_actions or tuple(sorted(TextGameEnv.config["fallback_actions"]))
        text = guide.text(state, details)

        # The walkthrough's own command first: its outcome is number 0.
        led_to = guide.outcomes((command, *actions))
        numbers: dict[tuple, int] = {}
        outcomes = [numbers.setdefault(_key(one), len(numbers)) for one in led_to][1:]
        shown = history[-history_length:] if history_length else []
        step = WalkStep(
            state=TextState(text, actions, tuple(shown), goal, state.score),
            command=command,
            outcomes=tuple(outcomes),
            idle=_key(led_to[0]) == _key(state),
        )
        yield step

        # The spelling an agent would have read here: many walkthroughs abbreviate. (What is equal
        # to an idle command may be anything else that does nothing.)
        respelled = step.judged and command not in actions
        spelled = actions[outcomes.index(0)] if respelled else command
        before = state.score
        state = guide.type(command)
        history.append(HistoryItem(text, spelled, state.score - before))


def _key(state: GameState) -> tuple:
    """Equal for states that mean the same: the world, the score, and whether the game is over.

    Some games give points without changing anything that the hash covers.
    """
    return state.state_hash, state.score, state.terminated, state.won
