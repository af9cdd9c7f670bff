"""Ids to games: look-up order, options, catalogue against Jericho's and TextWorld's own figures,
error texts.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from priorzero.games import tw_make
from priorzero.games.catalogue import list_games, resolve_game
from priorzero.games.jericho_stories import STORIES, default_settings
from priorzero.types import PriorZeroError


def test_story_by_name_path_and_environment(detective, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRIORZERO_GAMES", raising=False)
    by_path = resolve_game(detective)
    assert (by_path.kind, by_path.max_score, by_path.max_steps) == ("jericho", 360.0, 100)
    with pytest.raises(PriorZeroError):
        resolve_game("detective.z5")
    (tmp_path / "games").mkdir()
    shutil.copy(detective, tmp_path / "games")
    assert Path(resolve_game("detective.z5").path) == tmp_path / "games" / "detective.z5"
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(detective, other)
    monkeypatch.setenv("PRIORZERO_GAMES", str(other))
    assert Path(resolve_game("detective").path) == other / "detective.z5"
    # A renamed file is still the same game: it is known by its contents.
    shutil.copy(detective, other / "mystery.z5")
    renamed = resolve_game("mystery.z5")
    assert (renamed.title, renamed.story_key) == ("Detective", by_path.story_key)


def test_catalogue_agrees_with_jericho(detective, zork1):
    import jericho
    from jericho.defines import BINDINGS_DICT

    assert set(STORIES) == {record["name"] for record in BINDINGS_DICT.values()}
    for path in (detective, zork1):
        assert resolve_game(path).max_score == jericho.FrotzEnv(path, seed=1).get_max_score()


def test_unknown_supported_game_gets_settings_from_the_file(detective, monkeypatch):
    monkeypatch.delitem(STORIES, "detective")
    spec = resolve_game(detective)
    assert (spec.max_score, spec.max_steps) == (360.0, 102)  # twice 51 steps
    assert default_settings("new", 10, 0).max_steps == 200


def test_a_story_that_crashes_when_opened_leaves_the_parent_alive(failing_story, monkeypatch):
    """Only the opened game tells the maximum of one that the table lacks."""
    monkeypatch.delitem(STORIES, "detective")
    assert resolve_game(failing_story()).max_score == 42.0
    with pytest.raises(PriorZeroError, match="cannot open .*status -11.*choose another game"):
        resolve_game(failing_story("open:crash"))


def test_unknown_game_lists_what_there_is(detective, monkeypatch):
    monkeypatch.setenv("PRIORZERO_GAMES", str(Path(detective).parent))
    with pytest.raises(PriorZeroError) as caught:
        resolve_game("zorkk.z5")
    text = str(caught.value)
    for part in (
        "zorkk.z5",
        "detective.z5",
        "tw-simple",
        "tw-cooking",
        "tw-coin",
        "auto",
        "PRIORZERO_GAMES",
        "./games",
    ):
        assert part in text
    assert any("supported by Jericho as detective" in line for line in list_games())


def test_unsupported_story_file(tmp_path):
    story = tmp_path / "home-made.z5"
    story.write_bytes(b"\x05" + bytes(500))
    with pytest.raises(PriorZeroError, match="Jericho does not support"):
        resolve_game(str(story))


def test_damaged_textworld_record(tmp_path):
    (tmp_path / "game.z8").write_bytes(b"\x08" + bytes(500))
    (tmp_path / "game.json").write_text("{}")
    with pytest.raises(PriorZeroError, match="not a game record"):
        resolve_game(str(tmp_path / "game.z8"))


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("tw-coin:level=0", "outside"),
        ("tw-coin:level=x", "level"),
        ("tw-coin:depth=3", "no option 'depth'.*level"),
        ("tw-simple:rewards=huge", "dense, balanced or sparse"),
        ("tw-cooking:recipe=1,take=2", "must not exceed"),
        ("tw-cooking:go=7", "1, 6, 9 or 12"),
    ],
)
def test_wrong_options_are_named(env_id, message):
    with pytest.raises(PriorZeroError, match=message):
        resolve_game(env_id)


def test_options_and_flags_are_parsed():
    assert tw_make.parse_id("tw-coin:level=7, seed=3") == ("tw-coin", {"level": 7, "seed": 3})
    _, options = tw_make.parse_id("tw-cooking:cook,cut=true,open=no,seed=0")
    assert (options["cook"], options["cut"], options["open"], options["drop"], options["seed"]) == (
        True,
        True,
        False,
        False,
        0,
    )
    assert tw_make.canonical_id("tw-coin", {"level": 7, "seed": 3}) == "tw-coin:level=7,seed=3"


def test_concurrent_generators_build_once(monkeypatch):
    builds = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (builds.append(a), run(*a, **k))[1])
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(tw_make.generate("tw-coin:level=2,seed=9")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(set(results)) == 1 and len(results) == 3
    spec = resolve_game("tw-coin:level=2,seed=9")
    assert spec.max_score == 1.0 and len(spec.walkthrough) == 2
    assert not list(results[0].parent.parent.glob(".building-*"))


def test_failed_generation_leaves_nothing_and_quotes_tw_make(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path))
    (tmp_path / "tw-make").write_text("import sys; sys.exit('no quest possible')")
    (tmp_path / "python").symlink_to(Path(sys.executable).resolve())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(PriorZeroError, match="no quest possible"):
        resolve_game("tw-coin:level=3")
    assert not list(tmp_path.glob("textworld-*/*/game.z8")) and not list(
        tmp_path.glob("textworld-*/.building-*")
    )


def test_auto_says_which_game_and_why(zork1, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="priorzero")
    assert resolve_game("auto", Path(zork1).parent).title == "Zork I"
    monkeypatch.delenv("PRIORZERO_GAMES", raising=False)
    assert resolve_game("auto", tmp_path).title == "tw-simple"
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("game auto")]
    assert "was found" in said[0] and "no zork1.z5" in said[1]
