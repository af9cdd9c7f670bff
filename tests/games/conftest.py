"""Story files, generated games and interpreters for the tests of `priorzero.games`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).resolve().parents[2]
_STAND_INS = Path(__file__).with_name("stand_ins")


@pytest.fixture(scope="package", autouse=True)
def cache_folder(tmp_path_factory):
    """Generated games and known states of these tests alone: nothing earlier can help one to pass,
    and no later test of the same process finds its models missing.
    """
    folder = tmp_path_factory.mktemp("priorzero-cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("PRIORZERO_CACHE", str(folder))
    yield folder
    patch.undo()


def story_folders() -> list[Path]:
    """Where story files may lie that the repository does not hold."""
    named = [Path(p) for p in os.environ.get("PRIORZERO_GAMES", "").split(os.pathsep) if p]
    return [*named, _CHECKOUT.parent / "shared" / "games"]


def _story(name: str) -> str:
    for folder in story_folders():
        if (folder / name).is_file():
            return str(folder / name)
    pytest.skip(f"{name} is neither in $PRIORZERO_GAMES nor in ../shared/games")


@pytest.fixture
def detective() -> str:
    return _story("detective.z5")


@pytest.fixture
def zork1() -> str:
    return _story("zork1.z5")


@pytest.fixture
def make_env():
    """TextGameEnv(**settings), closed at the test's end."""
    from priorzero.games.env import TextGameEnv

    envs = []

    def make(**settings):
        envs.append(TextGameEnv(settings))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


@pytest.fixture
def failing_story(tmp_path, monkeypatch):
    """Path of a Jericho story whose interpreter fails as the words say, e.g. `"open:crash"`.

    The parent believes it is detective; the interpreter processes load the stand-in for Jericho.
    """
    from jericho import defines

    from priorzero.games.process import Nursery

    monkeypatch.setenv("PYTHONPATH", str(_STAND_INS))
    Nursery.of("jericho").close()

    def make(words: str = "") -> str:
        path = tmp_path / f"failing-{words.replace(':', '-').replace(' ', '-')}.z5"
        path.write_text(f"story {words}")
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(defines.BINDINGS_DICT, digest, {"name": "detective"})
        return str(path)

    yield make
    Nursery.of("jericho").close()
