"""Decisions of a real generated game, and what is kept of them on disk."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from priorzero.evidence import walk as walking
from priorzero.evidence.walk import wander
from priorzero.games.catalogue import resolve_game
from priorzero.games.process import GameProcess
from priorzero.games.valid_actions import cache_root
from priorzero.settings.warmup import WarmupSettings
from priorzero.warmup.collect import collect

GAME = "tw-coin:level=3,seed=5"
SETTINGS = WarmupSettings(textworld=1, wanders=2, jobs=1)


@pytest.fixture
def game(tmp_path_factory, monkeypatch):
    """The cache is this module's own."""
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path_factory.getbasetemp() / "warmup-cache"))
    return resolve_game(GAME)


def test_walkthrough_and_straying_episodes_are_collected_once(game, monkeypatch, caplog):
    walks, without = collect([game], SETTINGS)
    assert without == {} and len(walks) == 1
    steps = walks[0].steps
    assert len(set(steps)) == len(steps) > len(game.walkthrough)
    assert {s.command for s in steps} >= set(game.walkthrough)
    for step in steps:
        assert step.state.valid_actions[step.outcomes.index(0)] == step.command
        assert sorted(step.outcomes) == list(range(len(step.state.valid_actions)))

    # The second time nothing is played.
    monkeypatch.setattr(walking, "GameProcess", None)
    assert collect([game], SETTINGS)[0] == walks

    # Other settings are other data, and a damaged file is no data.
    with pytest.raises(TypeError):
        collect([game], WarmupSettings(textworld=1, wanders=1, jobs=1))
    monkeypatch.undo()


def test_a_damaged_file_is_walked_again(game, caplog):
    walks, _ = collect([game], SETTINGS)
    (path,) = (cache_root() / "warmup").glob("*.json.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert collect([game], SETTINGS)[0] == walks
    assert "is damaged" in caplog.text


def test_the_solver_leads_back_from_wherever_one_strayed(game):
    """From the last state of a straying episode the solver's commands win, in another process."""
    rng = np.random.default_rng(1)
    strayed = wander(game, 12, 3, 0.6, rng).steps
    typed = [item.action for item in strayed[-1].state.history]
    assert len(typed) == 3 and max(len(s.state.history) for s in strayed) == 3

    # Of the whole episode: the history of each step ends with what was typed before it.
    played = [s.state.history[-1].action for s in strayed[1:]]
    assert any(p != s.command for p, s in zip(played, strayed, strict=False))
    twin = GameProcess(game.kind, game.path)
    try:
        twin.call("reset", 0, timeout_s=60)
        for command in played:
            twin.call("step", command, timeout_s=60)
        advised = twin.call("advise", 0, played, timeout_s=60)
        assert advised[0] == strayed[-1].command
        for command in advised:
            state = twin.call("step", command, timeout_s=60)
        assert state.won
        # Step by step it says what it says at once.
        assert twin.call("advise", 0, played[:1], timeout_s=60)
        assert twin.call("advise", 0, played, timeout_s=60) == advised
    finally:
        twin.close()
