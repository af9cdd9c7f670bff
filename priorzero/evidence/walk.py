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


def walk(game: GameSpec, limit: int, history_length: int, *, compare: bool = True) -> Walk:
    """Type the walkthrough, and look at every step where each valid command would lead.

    Args:
        limit: commands at most; 0: all.
        history_length: past steps kept in the states.
        compare: False: only where the walkthrough's command is not in the list; elsewhere it alone
            counts as right. Where a kind has no snapshots, looking plays again from the start.

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
        guide = _Guide(game, process)
        for step in _steps(guide, commands, game.goal, history_length, compare):
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


def wander(
    game: GameSpec, limit: int, history_length: int, stray: float, rng: np.random.Generator
) -> Walk:
    """One episode that strays from the path, with what the game's own solver would type in each of
    its states: so that a learner sees states that no walkthrough shows, and the way back (as in
    DAgger, arXiv:1011.0686, with the solver as its own roll-in policy plus noise).

    Args:
        game: of a kind that can advise.
        limit: commands at most.
        history_length: past steps kept in the states.
        stray: probability that the next command is a random valid one instead of the solver's.
        rng: of the straying.

    Returns:
        the states in which the solver knows a command that is in the list; the walk ends where it
        knows none (the game cannot be won any more), and at a fault.
    """
    process = GameProcess(game.kind, game.path)
    guide = _Guide(game, process)
    steps: list[WalkStep] = []
    fault = ""
    try:
        for step in _strayed(guide, game.goal, limit, history_length, stray, rng):
            steps.append(step)
    except WorkerFault as error:
        fault = str(error).strip().splitlines()[0]
        logger.warning("%s: an episode ends after %d steps: %s", game.env_id, len(steps), fault)
    finally:
        process.close()
    return Walk(game, tuple(steps), fault)


def _strayed(
    guide: _Guide,
    goal: str,
    limit: int,
    history_length: int,
    stray: float,
    rng: np.random.Generator,
) -> Iterator[WalkStep]:
    history: list[HistoryItem] = []
    state = guide.start()
    for _ in range(limit):
        advised = guide.advice()
        if state.terminated or not advised:
            return
        text_state = guide.text_state(state, goal, _last(history, history_length))
        if advised[0] in text_state.valid_actions:
            yield chosen_step(text_state, advised[0], idle=False)

        typed = advised[0]
        if rng.random() < stray:
            typed = str(rng.choice(text_state.valid_actions))
        before, state = state, guide.type(typed)
        history.append(HistoryItem(text_state.observation, typed, state.score - before.score))


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

    def advice(self) -> tuple[str, ...]:
        """What the game's own solver would type from here on."""
        seed, limit = self._game.walkthrough_seed, self._settings.describe_timeout_s
        return self._process.call("advise", seed, self._played, timeout_s=limit)

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

    def text_state(
        self, state: GameState, goal: str, history: tuple[HistoryItem, ...]
    ) -> TextState:
        """What an agent would read, the observation as `TextGameEnv` composes it."""
        details = self.details(state)
        actions = details.valid_actions or tuple(sorted(TextGameEnv.config["fallback_actions"]))
        text = compose_text(state, details, self._settings.observation_parts)
        return TextState(text, actions, history, goal, state.score)

    def _call(self, method: str, argument: int | str) -> GameState:
        return self._process.call(method, argument, timeout_s=self._settings.step_timeout_s)


def _steps(
    guide: _Guide, commands: Sequence[str], goal: str, history_length: int, compare: bool
) -> Iterator[WalkStep]:
    """The steps, one by one, so that those before a fault are kept."""
    history: list[HistoryItem] = []
    state = guide.start()
    for command in commands:
        if state.terminated:
            return
        text_state = guide.text_state(state, goal, _last(history, history_length))
        actions = text_state.valid_actions

        if compare or command not in actions:
            # The walkthrough's own command first: its outcome is number 0.
            led_to = [_key(one) for one in guide.outcomes((command, *actions))]
            numbers: dict[tuple, int] = {}
            outcomes = [numbers.setdefault(one, len(numbers)) for one in led_to][1:]
            step = WalkStep(text_state, command, tuple(outcomes), led_to[0] == _key(state))
            yield step
            before, state = state, guide.type(command)
        else:
            before, state = state, guide.type(command)
            step = chosen_step(text_state, command, idle=_key(before) == _key(state))
            yield step

        # The spelling an agent would have read here: many walkthroughs abbreviate. (What is equal
        # to an idle command may be anything else that does nothing.)
        respelled = step.judged and command not in actions
        spelled = actions[step.outcomes.index(0)] if respelled else command
        earned = state.score - before.score
        history.append(HistoryItem(text_state.observation, spelled, earned))


def chosen_step(state: TextState, command: str, *, idle: bool) -> WalkStep:
    """A step of which no more is known than that this one of the valid commands is right."""
    others = iter(range(1, len(state.valid_actions) + 1))
    outcomes = tuple(0 if a == command else next(others) for a in state.valid_actions)
    return WalkStep(state, command, outcomes, idle)


def _last(history: Sequence[HistoryItem], length: int) -> tuple[HistoryItem, ...]:
    return tuple(history[-length:]) if length else ()


def _key(state: GameState) -> tuple:
    """Equal for states that mean the same: the world, the score, and whether the game is over.

    Some games give points without changing anything that the hash covers.
    """
    return state.state_hash, state.score, state.terminated, state.won
