"""Games that TextWorld generates: ids with options, built once by `tw-make` and cached.

An id is `<game>[:option=value,...]`, e.g. `tw-coin:level=5,seed=3`. The same id is the same
game everywhere (one TextWorld version given): the seed is part of it.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from priorzero.games.valid_actions import cache_root
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

GENERATE_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class _Option:
    """One option of a game.

    Attributes:
        parse: from its text; ValueError for what is not allowed. Of a bool, a bare flag is True.
        default: None leaves the option out.
        allowed: the values in words.
    """

    parse: Callable[[str], object]
    default: object
    allowed: str


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"{value} is outside [{low}, {high}]")
        return value

    return parse


def _choice(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"{text} is none of {values}")
        return text

    return parse


def _flag(text: str) -> bool:
    values = {
        "": True,
        "1": True,
        "true": True,
        "yes": True,
        "0": False,
        "false": False,
        "no": False,
    }
    if text.lower() not in values:
        raise ValueError(f"{text} is neither true nor false")
    return values[text.lower()]


_SEED = _Option(_number(0, 2**31 - 1), 1, "0 to 2147483647")
_FLAG = _Option(_flag, False, "true or false")

# Our name -> (tw-make's name, options).
GAMES: dict[str, tuple[str, dict[str, _Option]]] = {
    "tw-simple": (
        "tw-simple",
        {
            "rewards": _Option(
                _choice("dense", "balanced", "sparse"), "dense", "dense, balanced or sparse"
            ),
            "goal": _Option(
                _choice("detailed", "brief", "none"), "brief", "detailed, brief or none"
            ),
            "test": _FLAG,
            "seed": _SEED,
        },
    ),
    "tw-cooking": (
        "tw-cooking",
        {
            "recipe": _Option(_number(1, 5), 2, "1 to 5 ingredients"),
            "take": _Option(_number(0, 5), 2, "0 to recipe"),
            "go": _Option(
                lambda text: int(_choice("1", "6", "9", "12")(text)), 6, "1, 6, 9 or 12 rooms"
            ),
            "open": _Option(_flag, True, "true or false"),
            "cook": _FLAG,
            "cut": _FLAG,
            "drop": _FLAG,
            "recipe_seed": _Option(_number(0, 2**31 - 1), None, "0 to 2147483647"),
            "split": _Option(_choice("train", "valid", "test"), None, "train, valid or test"),
            "seed": _SEED,
        },
    ),
    "tw-coin": (
        "tw-coin_collector",
        {"level": _Option(_number(1, 300), 5, "1 to 300"), "seed": _SEED},
    ),
}


def parse_id(env_id: str) -> tuple[str, dict[str, object]]:
    """`"tw-coin:level=3"` -> `("tw-coin", {"level": 3, "seed": 1})`.

    Raises:
        PriorZeroError: an option is unknown or has an impossible value.
    """
    name, _, text = env_id.partition(":")
    options = GAMES[name][1]
    chosen = {key: option.default for key, option in options.items()}

    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key not in options:
            raise PriorZeroError(
                f"{env_id!r}: {name} has no option {key!r}; it has " + describe_options(name)
            )
        try:
            chosen[key] = options[key].parse(value)
        except ValueError as error:
            raise PriorZeroError(
                f"{env_id!r}: {key}={value} is not allowed ({error}); give {options[key].allowed}"
            ) from error

    if name == "tw-cooking" and chosen["take"] > chosen["recipe"]:
        raise PriorZeroError(
            f"{env_id!r}: take={chosen['take']} ingredients must not exceed"
            f" recipe={chosen['recipe']}"
        )
    return name, chosen


def describe_options(name: str) -> str:
    """One line naming a game's options, for messages."""
    return ", ".join(f"{key} ({option.allowed})" for key, option in GAMES[name][1].items())


def canonical_id(name: str, options: dict[str, object]) -> str:
    """The id with every option spelled out: the game's identity."""
    spelled = (
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in options.items()
        if value is not None
    )
    return f"{name}:{','.join(spelled)}"


def generate(env_id: str) -> Path:
    """The story file of a generated game; its `.json` lies beside it.

    It is built at the first request, which takes some seconds. Safe with several processes: a lock
    lets one build while the others wait, and the finished folder appears by one rename.

    Raises:
        PriorZeroError: TextWorld is missing, or cannot build this game.
    """
    name, options = parse_id(env_id)
    try:
        version = importlib.metadata.version("textworld")
    except importlib.metadata.PackageNotFoundError as error:
        raise PriorZeroError(
            f"{env_id!r} needs TextWorld, which is not installed; pip install textworld"
        ) from error

    label = canonical_id(name, options).replace(":", "-").replace(",", "-").replace("=", "_")
    root = cache_root() / f"textworld-{version}"
    story = root / label / "game.z8"
    if _is_complete(story):
        return story

    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f"{label}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_complete(story):
                _build(name, options, story.parent)
    except OSError as error:
        raise PriorZeroError(
            f"{env_id!r} cannot be generated into {root}: {error}; set PRIORZERO_CACHE to a"
            " writable folder"
        ) from error
    return story


def _is_complete(story: Path) -> bool:
    return story.is_file() and story.with_suffix(".json").is_file()


def _build(name: str, options: dict[str, object], final: Path) -> None:
    """Run tw-make and move what it built to the folder `final`."""
    game_id = canonical_id(name, options)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
    logger.info("generating %s with tw-make", game_id)
    try:
        done = subprocess.run(
            _command(name, options, scratch / "game.z8"),
            capture_output=True,
            text=True,
            timeout=GENERATE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode or not _is_complete(scratch / "game.z8"):
            tail = (done.stdout + done.stderr)[-1500:]
            raise PriorZeroError(
                f"tw-make could not build {game_id} (exit {done.returncode}); other options or"
                f" another seed may work. Its last words:\n{tail}"
            )

        # What is there is incomplete: a removal that was interrupted.
        if final.exists():
            shutil.rmtree(final)
        os.replace(scratch, final)
    except subprocess.TimeoutExpired as error:
        raise PriorZeroError(
            f"tw-make did not finish {game_id} within {GENERATE_TIMEOUT_S:g} s; choose smaller"
            " options"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _command(name: str, options: dict[str, object], output: Path) -> list[str]:
    command = [*_tw_make(), GAMES[name][0], "--output", str(output), "--silent"]
    for key, value in options.items():
        if value is not None and value is not False:
            command.append("--" + key.replace("_", "-"))
            command += [] if value is True else [str(value)]
    return command


def _tw_make() -> list[str]:
    """TextWorld installs `tw-make` as a script beside the interpreter; it is not a module."""
    beside = Path(sys.executable).with_name("tw-make")
    found = str(beside) if beside.is_file() else shutil.which("tw-make")
    if not found:
        raise PriorZeroError(
            f"TextWorld's tw-make was found neither beside {sys.executable} nor on PATH; reinstall"
            " textworld"
        )
    return [sys.executable, found]
