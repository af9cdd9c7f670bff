"""Games as they are named in settings, on the command line and in folders."""

from __future__ import annotations

import pytest

from priorzero.settings.env import EnvSettings, in_words, plain_name, run_name, split_games
from priorzero.types import PriorZeroError
from priorzero_config import get_priorzero_config
from priorzero_orz_entry import config_from, parse_arguments

COIN = "tw-coin:level=5,seed=3"


def test_a_text_of_games_keeps_the_options_of_generated_ones():
    assert split_games(COIN) == [COIN]
    assert split_games(f"{COIN},zork1.z5, {COIN}") == [COIN, "zork1.z5", COIN]
    assert split_games("a.z5,tw-simple") == ["a.z5", "tw-simple"]


def test_plain_names():
    assert plain_name("/games/zork1.z5") == plain_name("zork1") == "zork1"
    assert plain_name(COIN) == "tw-coin-level-5-seed-3"
    assert run_name(["a.z5", COIN]) == "a-and-tw-coin-level-5-seed-3"
    assert run_name([f"{i}.z5" for i in range(7)]) == "0-and-1-and-2-and-4-more"
    assert in_words(["a.z5", "b.z5"]) == "a.z5 + b.z5" and in_words(list("abcd")) == "4 games"


@pytest.mark.parametrize(
    "words", [["tw-simple", COIN], [f"tw-simple,{COIN}"], [f"{COIN},tw-simple"]], ids=len
)
def test_the_command_line_names_several_games(words):
    config = config_from(parse_arguments(["--env-id", *words, "--seed", "3"]), debug_mode=False)
    settings = config.priorzero_cfg
    assert sorted(settings.env.env_id) == [COIN, "tw-simple"] and settings.env.several
    assert settings.seed == 3 and settings.exp_name.endswith("_priorzero_seed3")


def test_one_game_is_what_it_was_and_others_can_be_evaluated():
    arguments = ["--env-id", "tw-simple", "--eval-env-id", "tw-simple", COIN]
    env = config_from(parse_arguments(arguments), debug_mode=False).priorzero_cfg.env
    assert env.env_id == "tw-simple" and not env.several
    assert env.eval_env_id == ["tw-simple", COIN]
    assert EnvSettings(env_id="jericho-suite").several
    assert not EnvSettings(env_id=["zork1.z5"]).several


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (dict(env_id=[]), "env.env_id is .*at least one game"),
        (dict(env_id=["zork1", "x/zork1.z5"]), "env.env_id is .*none twice"),
        (dict(eval_env_id=["a", "a"]), "env.eval_env_id is .*none twice"),
        (dict(env_id=["a", "b"], game_weights=[1.0]), "env.game_weights is .*one positive weight"),
        (dict(env_id=["a", "b"], game_weights=[1.0, 0.0]), "env.game_weights is"),
        (dict(env_id="jericho-suite", game_weights=[1.0]), "env.game_weights is"),
        (dict(env_id=["a", 3]), "'env.env_id' is"),
    ],
)
def test_impossible_games_are_refused(values, told):
    with pytest.raises(PriorZeroError, match=told):
        get_priorzero_config(overrides=dict(env=values))


def test_weights_fit():
    settings, _ = get_priorzero_config(["a", "b"], overrides=dict(env=dict(game_weights=[1, 3])))
    assert settings.env.game_weights == [1, 3]
