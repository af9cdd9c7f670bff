"""Collector and evaluator over several games, on scripted ones whose every answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from priorzero.data.packing import pack, unpack
from priorzero.decisions.reader import read_episodes
from priorzero.decisions.recorder import Recorder
from priorzero.games.group import GameEnvGroup
from priorzero.play.results import EvalResult, joined
from priorzero.settings.decisions import DecisionSettings
from priorzero_collector import PriorZeroCollector
from priorzero_evaluator import PriorZeroEvaluator
from tests.playing import FakePrior, ScriptedEnv, make_watched

SIZES = dict(num_simulations=4, action_vocabulary=dict(capacity=64, overflow=4))
LENGTHS = {"short.z5": 3, "long.z5": 5}
GAMES = tuple(SimpleNamespace(env_id=n, goal=n, max_score=40.0) for n in LENGTHS)


class Console(ScriptedEnv):
    """Plays the game it is given; its length is the game's."""

    def __init__(self, number: int, game) -> None:
        super().__init__(number)
        self.play(game)

    def play(self, game) -> None:
        self.game, self.length = game, LENGTHS[game.env_id]


class Listening:
    """An encoder that keeps what it was given."""

    def __init__(self, encoder) -> None:
        self.dim, self._encode = encoder.dim, encoder.encode
        self.heard: list[str] = []

    def encode(self, texts):
        self.heard += texts
        return self._encode(texts)


@pytest.fixture
def make(compiled_cfg, encoder, one_thread, tmp_path):
    """make(of collector or evaluator, several games trained on, its own arguments)."""
    opened = []

    def make_player(kind, several: bool = True, **arguments):
        cfg = compiled_cfg(**SIZES)
        ears = Listening(encoder)
        envs = [Console(i, GAMES[i]) for i in range(2)]
        group, prior = GameEnvGroup(envs, seed=0), FakePrior()
        recorder = Recorder(
            tmp_path / "decisions", DecisionSettings(collect_share=1.0), reduction="sum"
        )
        player = kind(
            cfg.policy.settings,
            make_watched(cfg, ears),
            group,
            ears,
            prior,
            history_length=2,
            seed=0,
            recorder=recorder,
            several_games=several,
            **arguments,
        )
        opened.extend([group, recorder])
        return SimpleNamespace(player=player, heard=ears.heard, prior=prior, recorder=recorder)

    yield make_player
    for one in opened:
        one.close()


def evaluator(make, games=GAMES, judged_by=("short", "long"), **arguments):
    fixed = dict(temperature=0.0, transcripts=None, games=games, judged_by=judged_by)
    return make(PriorZeroEvaluator, **fixed | arguments)


async def test_the_world_model_is_told_the_game_and_the_llm_is_not(make):
    made = make(PriorZeroCollector)
    result = await made.player.collect(6, 0, 1.0)
    told = {text for text in made.heard if " episode " in text}
    assert {text.splitlines()[0] for text in told} == {"Game: short.", "Game: long."}
    # Environment 0 plays the short game and environment 1 the long one.
    assert all(text.startswith(("Game: short.\nenv 0 ", "Game: long.\nenv 1 ")) for text in told)
    assert all(text.startswith("env ") for text, _ in made.prior.told)

    for segment in result.segments:
        assert segment.game == ("short", "long")[segment.env_id]
    assert [s.game for s in unpack(pack(result.segments))] == [s.game for s in result.segments]


async def test_collection_is_told_by_game(make):
    result = await make(PriorZeroCollector).player.collect(8, 0, 1.0)
    ended = {name: 0 for name in LENGTHS}
    for segment in result.segments:
        ended[GAMES[segment.env_id].env_id] += segment.done_kind == "terminated"

    told = result.collect
    for name, length in LENGTHS.items():
        game = name.removesuffix(".z5")
        score = length * (length + 1) / 2
        assert told[f"{game}/episodes"] == ended[name] > 0
        assert told[f"{game}/episode_return_mean"] == told[f"{game}/episode_return_max"] == score
        assert told[f"{game}/episode_length"] == length
        assert told[f"{game}/score_share"] == score / 40
    assert told["score_share"] == pytest.approx((6 + 15) / 2 / 40)
    assert told["short/steps"] + told["long/steps"] == result.steps


async def test_one_game_is_told_as_it_was(make):
    made = make(PriorZeroCollector, several=False)
    result = await made.player.collect(6, 0, 1.0)
    assert not any("Game:" in text for text in made.heard)
    assert not any("/" in name or name == "score_share" for name in result.collect)
    assert {segment.game for segment in result.segments} == {""}


@pytest.mark.parametrize("mode", ["world_model_llm", "random"])
async def test_each_game_is_evaluated_as_if_it_were_alone(make, mode, tmp_path):
    """Seeds, draws and results."""
    made = [evaluator(make)]
    both = await made[0].player.evaluate(mode, 3, 0, "both")
    for game in GAMES:
        made.append(evaluator(make, games=(game,)))
        alone = await made[-1].player.evaluate(mode, 3, 0, "alone")
        name = game.env_id.removesuffix(".z5")
        assert both.by_game[name] == alone.by_game[name]
        assert alone.by_game[name].lengths == (LENGTHS[game.env_id],) * 3

    for one in made:
        one.recorder.close()
    played = {
        episode.name: [(step["seed"], step["commands"][step["chosen"]]) for step in episode.steps]
        for episode in read_episodes(tmp_path)
    }
    for name, moves in played.items():
        assert moves == played[name.replace("both", "alone")]
    assert len(played) == 2 * 2 * 3
    assert both.returns == (6,) * 3 + (15,) * 3 and both.lengths == (3,) * 3 + (5,) * 3


async def test_recorded_episodes_name_their_game(make, tmp_path):
    made = evaluator(make)
    await made.player.evaluate("world_model_llm", 2, 0, "it1")
    made.recorder.close()
    told = {e.name: (e.steps[0]["game"], len(e.steps)) for e in read_episodes(tmp_path)}
    assert told == {
        f"it1/world_model_llm/{game}/{n}": (f"{game}.z5", LENGTHS[f"{game}.z5"])
        for game in ("short", "long")
        for n in range(2)
    }


# ---- several results as one ----------------------------------------------------------------------


def result(returns, scores, top) -> EvalResult:
    ends = ("terminated",) * len(returns)
    return EvalResult("llm", tuple(returns), tuple(scores), (4,) * len(returns), ends, top)


THREE = {
    "a": result([10.0, 30.0], [10.0, 30.0], 100.0),  # mean 20, share 0.2
    "b": result([1.0, 2.0], [4.0, 4.0], 8.0),  # mean 1.5, share 0.5
    "c": result([7.0, 7.0], [7.0, 7.0], float("nan")),
}


def test_what_is_trained_on_is_told_together_and_the_rest_apart():
    whole = joined("llm", THREE, {"a", "b"})
    told = whole.metrics()
    assert told["llm/return_mean"] == pytest.approx((20 + 1.5) / 2)
    assert told["llm/score_share"] == pytest.approx((0.2 + 0.5) / 2)
    assert told["llm/return_std"] == pytest.approx((10 + 0.5) / 2)
    assert told["llm/episodes"] == told["llm/terminated"] == 4 and told["llm/length"] == 4
    assert told["unseen/llm/return_mean"] == told["c/llm/return_mean"] == 7
    assert "unseen/llm/score_share" not in told and told["b/llm/score_share"] == 0.5
    assert whole.judgement() == pytest.approx(0.35)
    assert whole.returns == (10, 30, 1, 2) and set(whole.by_game) == set(THREE)


def test_an_unknown_maximum_is_judged_in_points_and_no_game_by_nothing():
    assert joined("llm", THREE, set(THREE)).judgement() == pytest.approx((20 + 1.5 + 7) / 3)
    unseen = joined("llm", THREE, set())
    assert np.isnan(unseen.judgement())
    told = unseen.metrics()
    assert told["llm/return_mean"] == pytest.approx((20 + 1.5 + 7) / 3)
    assert not any(name.startswith("unseen/") for name in told)
    assert THREE["a"].judgement() == 20 and "llm/return_mean" in THREE["a"].metrics()
