"""What the kinds of games share that run in a Java virtual machine, behind py4j.

An id is `<prefix>-<game>[:option=value,...]`, e.g. `twx-coin:seed=3`; it is also what an
interpreter process opens. The parent asks a process of its own for what only the opened game knows
(`Game.examine`), once: the answer is kept in the cache folder.

Standard library only at module level: interpreter processes load this too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.games import kinds
from priorzero.games.records import GameSpec
from priorzero.games.valid_actions import cache_root
from priorzero.types import PriorZeroError

EXAMINE_TIMEOUT_S = 180.0
MAX_SCORE = 100.0
MAX_STEPS = 100
"""Both packages' own default, and the steps of their published scores."""

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_JAVA_OPTIONS = (
    "-XX:+UseSerialGC -Xmx512m"
    " -XX:+IgnoreUnrecognizedVMOptions -XX:+UnlockExperimentalVMOptions -XX:hashCode=2"
)
"""One of these machines stands beside every environment: with its own defaults it would take a
quarter of the computer's memory as it pleases, and a collector's thread for every core.

hashCode=2 gives all objects one identity hash. ScienceWorld goes through sets of objects in the
order of theirs, which otherwise depends on what the machine has done before: then heat flows in
another order, and the same commands lead to temperatures that differ in the fourth digit."""


@dataclass(frozen=True)
class GameId:
    """An id taken apart. `options` are in the order of their names."""

    prefix: str
    game: str
    options: dict[str, str]

    @classmethod
    def parse(cls, env_id: str) -> GameId:
        """`"twx-coin:seed=3"` -> `GameId("twx", "coin", {"seed": "3"})`.

        Raises:
            PriorZeroError: an option without a value, or one given twice.
        """
        name, _, text = env_id.partition(":")
        prefix, _, game = name.partition("-")
        options: dict[str, str] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = (part.strip() for part in item.partition("="))
            if not value or key in options:
                raise PriorZeroError(
                    f"{env_id!r}: {item!r} is not allowed; options are option=value, each once,"
                    " with commas between them"
                )
            options[key] = value
        return cls(prefix, game, dict(sorted(options.items())))

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.prefix}-{self.game}" + (f":{options}" if options else "")

    def number(self, key: str) -> int | None:
        """An option that is a whole number; None where it is not given.

        Raises:
            PriorZeroError: it is something else.
        """
        text = self.options.get(key)
        if text is not None and not text.isdecimal():
            raise PriorZeroError(
                f"'{self}': {key}={text} is not allowed; give a whole number from 0 on"
            )
        return None if text is None else int(text)


def variation_of(
    seed: int, training: Sequence[int], evaluation: Sequence[int], fixed: int | None
) -> int:
    """The variation of the game that an episode plays.

    Args:
        seed: the episode's.
        training, evaluation: the package's variations for either.
        fixed: the one that the id names; None: it names none.
    """
    if fixed is not None:
        return fixed
    pool = evaluation if kinds.for_evaluation(seed) else training
    return pool[(seed // 2) % len(pool)]


def with_task(task: str, look: str) -> str:
    """A room's description in a game whose task differs from episode to episode: no observation
    leaves it out, and a reader that stops early reads it first."""
    return f"Your task: {task}\n{look}".strip()


def require_package(env_id: str, package: str, pinned: str) -> str:
    """The version of a package that is installed, with a Java to run it.

    Args:
        env_id: the game that needs it. package: the distribution.
        pinned: the version this project is tested with.

    Raises:
        PriorZeroError: package or Java is missing.
    """
    try:
        version = importlib.metadata.version(package)
        importlib.metadata.version("py4j")
    except importlib.metadata.PackageNotFoundError as error:
        raise PriorZeroError(
            f"{env_id!r} needs the package {package} {pinned}, which is not installed; "
            "pip install --no-deps -r requirements/more_games.txt"
        ) from error
    if shutil.which("java") is None:
        raise PriorZeroError(
            f"{env_id!r} runs in a Java virtual machine and there is no `java` on PATH; install a"
            " Java runtime of version 8 or later, such as the package default-jre-headless"
        )
    return version


def is_installed(package: str) -> bool:
    """Whether games of the package can be played now."""
    try:
        require_package("", package, "")
    except PriorZeroError:
        return False
    return True


def set_java_options() -> None:
    """For virtual machines that this process starts; what the user has set comes last and wins."""
    users = os.environ.get("JAVA_TOOL_OPTIONS", "")
    if not users.startswith(_JAVA_OPTIONS):
        os.environ["JAVA_TOOL_OPTIONS"] = f"{_JAVA_OPTIONS} {users}".strip()


def java_game(
    env_id: str, kind: str, game: GameId, package: str, version: str, *, fixed: str, revision: int
) -> GameSpec:
    """A game as its kind's `find` returns it; the package tells task and expert's commands, once
    per id.

    Args:
        env_id: as it was asked for.
        kind: file name of the kind.
        game: the id taken apart, which exists as far as the parent can tell.
        package, version: the distribution that generates it, as installed.
        fixed: the option that names the variation. Without it the task changes by the episode.
        revision: of what the kind's `examine`, state and hash are; raised when they change.

    Raises:
        PriorZeroError: the game does not exist or cannot be opened.
    """
    found = _examine(kind, game, package, version, revision)
    goal = found["task"] if fixed in game.options else "Do what the task says."
    return GameSpec(
        env_id=env_id,
        kind=kind,
        path=str(game),
        title=f"{game.prefix}-{game.game}",
        goal=f"{goal} The best possible score is {MAX_SCORE:g}.",
        max_score=MAX_SCORE,
        max_steps=MAX_STEPS,
        story_key=f"{game}/{package}-{version}/v{revision}",
        walkthrough=tuple(found["walkthrough"]),
    )


def _examine(kind: str, game: GameId, package: str, version: str, revision: int) -> dict[str, Any]:
    """What `Game.examine(game)` of a kind answers in a process of its own, or answered before.

    Args:
        revision: of the answer; raised when the kind's `examine` changes.

    Raises:
        PriorZeroError: the game does not exist or cannot be opened.
    """
    label = re.sub(r"[^\w.+-]", "_", str(game))
    kept = cache_root() / f"{package}-{version}" / f"{label}.v{revision}.json"
    try:
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        answer = _ask(kind, game)
        kept.parent.mkdir(parents=True, exist_ok=True)
        # By one rename: another run may ask for the same game now.
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            json.dump(answer, file, indent=1)
        os.replace(file.name, kept)
    except (OSError, ValueError) as error:
        raise PriorZeroError(
            f"what is known of '{game}' cannot be kept in {kept}: {error}; delete that file, or set"
            " PRIORZERO_CACHE to a writable folder"
        ) from error
    return answer


def _ask(kind: str, game: GameId) -> dict[str, Any]:
    path = os.pathsep.join(p for p in (_PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")) if p)
    call = "import sys; from priorzero.games.java_games import tell; tell(*sys.argv[1:])"
    try:
        done = subprocess.run(
            [sys.executable, "-c", call, kind, str(game)],
            capture_output=True,
            text=True,
            timeout=EXAMINE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PriorZeroError(
            f"'{game}' could not be examined: no answer within {EXAMINE_TIMEOUT_S:g} s; is the"
            " machine short of memory or cores?"
        ) from error
    if done.returncode:
        raise PriorZeroError(
            f"'{game}' could not be examined: exit status {done.returncode}; check that `java"
            f" -version` works. Its last words:\n{done.stderr[-1500:].strip()}"
        )

    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise PriorZeroError(f"'{game}' cannot be played: {answer['error']}")
    return answer


def tell(kind: str, game: str) -> None:
    """In the process that is asked: print the answer as the last line."""
    set_java_options()
    game_class = kinds.load(kind)
    try:
        game_class.preload()
        answer = game_class.examine(GameId.parse(game))
    except (PriorZeroError, ImportError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
