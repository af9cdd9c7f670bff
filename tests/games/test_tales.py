"""The games of TALES: ids that exist, in the variations its benchmark plays."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from priorzero.comparison import published
from priorzero.games.java_games import GameId, is_installed
from priorzero.games.kinds import textworld_express
from priorzero.settings import tales
from priorzero.settings.env import plain_name
from priorzero_config import HybridTrainingConfig

FILE = json.loads(Path(published.__file__).with_name("published.json").read_text(encoding="utf-8"))


def test_all_games_are_there_once():
    express = [GameId.parse(one) for one in tales.TEXTWORLD_EXPRESS]
    assert len(express) == 16 and {g.game for g in express} == set(textworld_express.GAMES)
    tasks = [GameId.parse(one) for one in tales.SCIENCEWORLD]
    told = {f["game"].removeprefix("sw-") for f in FILE["figures"] if f["game"].startswith("sw-")}
    assert len(tasks) == 30 and {g.game for g in tasks} == told - {"*"}
    names = {plain_name(one) for one in (*tales.TEXTWORLD_EXPRESS, *tales.SCIENCEWORLD)}
    assert len(names) == 46  # in metrics and files


@pytest.mark.parametrize("preset, count", [("tales_twx", 16), ("tales_sw", 30)])
def test_the_presets_evaluate_each_game_once_for_100_steps(preset, count):
    protocol = FILE["protocols"]["tales"]
    plan = HybridTrainingConfig(env_id="tw-simple", debug_mode=True, presets=(preset,))
    env = plan.priorzero_cfg.env
    assert len(env.eval_env_id) == count and env.n_evaluator_episode == 1
    assert env.max_steps == protocol["max_steps"] and env.env_id == "tw-simple"


@pytest.mark.slow
@pytest.mark.skipif(
    not is_installed(textworld_express.PACKAGE), reason="TextWorld-Express is not here"
)
def test_textworld_express_takes_the_options_and_the_seed_is_its_first_of_the_test_set():
    for one in tales.TEXTWORLD_EXPRESS:
        game = textworld_express.Game(one)
        assert game._sets["test"][0] == int(GameId.parse(one).options["seed"])
        assert game.reset(1001).details.valid_actions


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("scienceworld"), reason="ScienceWorld is not here")
def test_scienceworld_has_the_variations_as_the_first_of_the_test_set():
    assert importlib.metadata.version("scienceworld")
    from scienceworld import ScienceWorldEnv

    opened = ScienceWorldEnv()
    for one in tales.SCIENCEWORLD:
        game = GameId.parse(one)
        opened.load(game.game, 0, "")
        assert opened.get_variations_test()[0] == int(game.options["variation"]), one
    opened.close()
