"""Story files, generated games and interpreters for the tests of ``priorzero.games``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Generated games and known states of this test session: nothing from an earlier run can help a
    test to pass.
    """
    folder = tmp_path_factory.mktemp("priorzero-cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("PRIORZERO_CACHE", str(folder))
    yield folder
    patch.undo()


def _story(name: str) -> Path:
    folders = [Path(p) for p in os.environ.get("PRIORZERO_GAMES", "").split(os.pathsep) if p]
    for folder in (*folders, _CHECKOUT.parent / "shared" / "games"):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is neither in $PRIORZERO_GAMES nor in ../shared/games")


@pytest.fixture
def detective() -> str:
    return str(_story("detective.z5"))


@pytest.fixture
def zork1() -> str:
    return str(_story("zork1.z5"))


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
