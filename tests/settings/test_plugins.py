"""Plug-ins are found by their files, and imported only when asked for."""

from __future__ import annotations

import sys

import pytest

from priorzero import plugins
from priorzero.types import PriorZeroError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    package = tmp_path / "plugin_rooms" / "players"
    package.mkdir(parents=True)
    for place in (package.parent, package):
        (place / "__init__.py").touch()
    (package / "good.py").write_text("ANSWER = 42\n")
    (package / "broken.py").write_text("raise RuntimeError('imported')\n")
    (package / "_shared.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.startswith("plugin_rooms")]:
        del sys.modules[name]


def test_files_are_names(folder):
    assert plugins.names("plugin_rooms.players") == ("broken", "good")  # nothing was imported
    assert plugins.load("plugin_rooms.players", "good").ANSWER == 42
    (folder / "new.py").touch()
    assert "new" in plugins.names("plugin_rooms.players")


def test_a_missing_one_is_told_with_those_there_are(folder):
    with pytest.raises(PriorZeroError, match="plugin_rooms/players has no 'best'.*broken, good"):
        plugins.load("plugin_rooms.players", "best")
    with pytest.raises(PriorZeroError, match="has no '_shared'"):
        plugins.load("plugin_rooms.players", "_shared")
    with pytest.raises(RuntimeError, match="imported"):  # a fault of the plug-in is not hidden
        plugins.load("plugin_rooms.players", "broken")


def test_our_folders_are_found():
    assert "builtin" in plugins.names("priorzero.llm.update.trainers")
