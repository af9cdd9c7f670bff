"""Which games a warm-up uses: nothing that results are judged on, and none of its relatives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from priorzero.games.catalogue import resolve_game
from priorzero.games.jericho_stories import STORIES
from priorzero.games.judging import JUDGING_GAMES
from priorzero.games.records import GameSpec
from priorzero.settings.warmup import GENERATORS, WarmupSettings
from priorzero.types import PriorZeroError
from priorzero.warmup import games as module
from priorzero.warmup.games import FIRST_SEED, choose_games, generated_ids

SPEC = GameSpec("", "jericho", "", "", "Win.", 10.0, 50, "key", ("look",))


@pytest.fixture
def stories(tmp_path, monkeypatch) -> Path:
    """A folder of made-up files that are taken for the stories they are named after; `mute` has no
    walkthrough.
    """
    for name in ("zork1", "zork2", "enchanter", "curses", "detective", "pentari", "mute"):
        (tmp_path / f"{name}.z5").write_bytes(b"")

    def find(name: str) -> GameSpec:
        stem = Path(name).stem
        if stem == "unknown" or not (stem in STORIES or stem == "mute" or ":" in name):
            raise PriorZeroError(f"game {name!r} is unknown")
        title = STORIES[stem].title if stem in STORIES else stem
        if ":" in name:
            return replace(SPEC, env_id=name, kind="textworld", title=name.partition(":")[0])
        walkthrough = () if stem == "mute" else ("look",)
        return replace(SPEC, env_id=name, path=name, title=title, walkthrough=walkthrough)

    monkeypatch.setattr(module, "resolve_game", find)
    return tmp_path


def titles(choice) -> set[str]:
    return {game.title for game in choice.games}


def test_a_folder_less_what_is_judged_on_and_relatives(stories):
    choice = choose_games(WarmupSettings(games=[str(stories)], textworld=0))
    assert titles(choice) == {"Curses"}
    why = choice.left_out
    assert why["Zork II"] == why["Enchanter"] == "relative of zork1.z5"
    assert why["Detective"] == "relative of detective.z5"
    assert why["Pentari"] == "results are judged on it" and why["mute"] == "no walkthrough"


def test_the_default_is_overruled_by_name_and_judging_games_are_not(stories):
    settings = WarmupSettings(games=[str(stories)], textworld=0, exclude=[])
    assert titles(choose_games(settings)) == {
        STORIES[n].title for n in ("zork1", "zork2", "enchanter", "curses", "detective")
    }


@pytest.mark.parametrize("name", JUDGING_GAMES)
def test_a_judging_game_that_is_named_is_refused(stories, name):
    with pytest.raises(PriorZeroError, match="judging only"):
        choose_games(WarmupSettings(games=[f"{name}.z5"], exclude=[]))


def test_exclusion_needs_no_file_but_a_known_name(stories):
    settings = WarmupSettings(games=[str(stories)], textworld=0, exclude=["spellbrkr.z3", "curses"])
    assert titles(choose_games(settings)) == {STORIES["detective"].title}
    with pytest.raises(PriorZeroError, match="unknown"):
        choose_games(WarmupSettings(games=[str(stories)], exclude=["zrok1.z5"]))


def test_an_excluded_generator_builds_nothing(stories):
    settings = WarmupSettings(textworld=6, exclude=["tw-cooking:seed=3"])
    choice = choose_games(settings)
    assert titles(choice) == {"tw-simple", "tw-coin"} and len(choice.games) == 6
    assert choice.left_out == {"tw-cooking": "relative of tw-cooking:seed=3"}


def test_nothing_left_is_an_error(stories):
    with pytest.raises(PriorZeroError, match="no game is left"):
        choose_games(WarmupSettings(games=["zork2.z5"], textworld=0))


def test_generated_games_are_possible_and_not_those_of_runs():
    ids = generated_ids(30, GENERATORS, 3)
    assert len(set(ids)) == 30 and ids == generated_ids(30, GENERATORS, 3)
    assert ids != generated_ids(30, GENERATORS, 4)
    for one in ids:
        name, options = module.tw_make.parse_id(one)  # an impossible one raises
        assert options["seed"] >= FIRST_SEED
        assert name != "tw-cooking" or options["split"] == "train"


def test_a_real_story_is_a_relative_by_its_contents(story, tmp_path):
    renamed = tmp_path / "harmless.z5"
    renamed.write_bytes(Path(story("zork1.z5")).read_bytes())
    with pytest.raises(PriorZeroError, match="relative of zork1.z5"):
        choose_games(WarmupSettings(games=[str(tmp_path)], textworld=0))
    assert resolve_game(str(renamed)).title == STORIES["zork1"].title
