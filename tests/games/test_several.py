"""Several games in one run: their names, the suite, whose turn it is, episodes that come back."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest

from priorzero.games.catalogue import resolve_games
from priorzero.games.env import TextGameEnv, episode_seed
from priorzero.games.group import GameEnvGroup
from priorzero.games.records import GameSpec
from priorzero.games.rota import Rota
from priorzero.types import PriorZeroError

COIN, SIMPLE = "tw-coin:level=3,seed=2", "tw-simple"


def specs(count: int) -> list[GameSpec]:
    return [GameSpec(f"game {i}", "k", f"/{i}", "", "", 1.0, 9, "") for i in range(count)]


def played(rota: Rota, environment: int, episodes: int) -> list[int]:
    return [rota.games.index(rota.game(environment, e)) for e in range(episodes)]


# ---- whose turn it is ----------------------------------------------------------------------------


def test_in_turn_environments_begin_far_apart_and_play_every_game_equally_often():
    few = Rota(specs(2), 4)
    assert [played(few, i, 4) for i in range(4)] == [[0, 1, 0, 1]] * 2 + [[1, 0, 1, 0]] * 2
    many = Rota(specs(5), 2)
    assert played(many, 0, 6) == [0, 1, 2, 3, 4, 0] and played(many, 1, 6) == [2, 3, 4, 0, 1, 2]


def test_weights_are_shares_of_the_episodes_and_depend_on_nothing_but_the_seed():
    def drawn(seed: int) -> list[list[int]]:
        rota = Rota(specs(3), 4, weights=[1, 5, 2], seed=seed)
        return [played(rota, i, 500) for i in range(4)]

    first = drawn(0)
    shares = np.bincount(np.ravel(first), minlength=3) / 2000
    # Three standard errors of a share of 2,000 draws are below 0.034.
    np.testing.assert_allclose(shares, [0.125, 0.625, 0.25], atol=0.034)
    assert first == drawn(0) and first != drawn(1)
    assert len({tuple(one) for one in first}) == 4


# ---- environments --------------------------------------------------------------------------------


@pytest.fixture
def make_group():
    """A group of two environments that plays both generated games, closed at the test's end."""
    groups = []

    def make(*names: str, **rota) -> GameEnvGroup:
        games = resolve_games(names or (SIMPLE, COIN))
        envs = [TextGameEnv({"env_id": games[0].env_id, "max_steps": 3}) for _ in range(2)]
        groups.append(GameEnvGroup(envs, seed=7, rota=Rota(games, 2, **rota)))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


def play_on(group: GameEnvGroup, now: dict, steps: int) -> list:
    """What the first commands of the lists lead to from `now` on; what ended begins anew."""
    told = []
    for _ in range(steps):
        answers = group.step({i: obs["valid_actions"][0] for i, obs in now.items()})
        told.append({i: (a.obs, a.reward, group.envs[i].game.env_id) for i, a in answers.items()})
        ended = [i for i, a in answers.items() if a.done]
        now |= {i: a.obs for i, a in answers.items()} | (group.reset(ended) if ended else {})
    return told


def test_a_group_plays_the_rota_with_the_seeds_of_a_run_of_one_game(make_group):
    group, seconds = make_group(), [0.0]
    for episode in range(3):
        first = group.reset()
        names = [env.game.env_id for env in group.envs]
        assert names == ([SIMPLE, COIN] if episode % 2 == 0 else [COIN, SIMPLE])
        seeds = [episode_seed(7, i, episode, "train") for i in range(2)]
        assert [env.episode_seed for env in group.envs] == seeds
        assert len({obs["text"] for obs in first.values()}) == 2
        stats = group.stats()
        assert (stats["episodes"], stats["respawns"], stats["deaths"]) == (2 * episode + 2, 0, 0)
        seconds.append(stats["spawn_s"])
    assert seconds == sorted(set(seconds))  # those of the interpreters that ended count on


def test_episodes_of_several_games_come_back_and_go_on_in_turn(make_group):
    one, two = make_group(weights=[1.0, 2.0]), make_group(weights=[1.0, 2.0])
    now = one.reset()
    play_on(one, now, 4)  # into the second episodes
    present = two.replay(json.loads(json.dumps(one.state_dict())))
    assert present == now
    told = play_on(one, now, 9)
    assert play_on(two, present, 9) == told
    assert len({name for answers in told for _, _, name in answers.values()}) == 2


def test_an_episode_of_a_game_that_is_played_no_more_ends(make_group, caplog):
    one = make_group()
    one.reset()
    caplog.set_level(logging.WARNING)
    back = make_group(COIN, "tw-coin:level=3,seed=3").replay(one.state_dict())
    assert list(back) == [1] and "episode of tw-simple, which is not played any more" in caplog.text


# ---- names ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(detective, tmp_path, monkeypatch):
    """Two stories, a judging game by its name, and a file that Jericho does not know."""
    monkeypatch.setenv("PRIORZERO_GAMES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("detective.z5", "renamed.z5", "library.z5"):
        shutil.copy(detective, tmp_path / name)
    (tmp_path / "unknown.z5").write_bytes(b"no story")
    return tmp_path


def names_of(*env_id: str) -> list[str]:
    return [game.env_id for game in resolve_games(env_id)]


def test_the_suite_is_all_stories_but_the_judging_games(folder, caplog):
    caplog.set_level(logging.INFO)
    assert [g.env_id for g in resolve_games("jericho-suite")] == ["detective.z5", "renamed.z5"]
    assert "leaves out library.z5: results are judged on these games" in caplog.text
    assert "leaves unknown.z5 out" in caplog.text
    # Named by hand it is played, and what the suite has too is there once.
    named = names_of("jericho-suite", "library.z5", "detective.z5")
    assert named == ["detective.z5", "renamed.z5", "library.z5"]


def test_games_that_cannot_be_told_apart_or_found_are_refused(folder):
    (folder / "more").mkdir()
    shutil.copy(folder / "detective.z5", folder / "more" / "detective.z5")
    with pytest.raises(PriorZeroError, match="would have one name in its metrics"):
        resolve_games(["detective.z5", str(folder / "more" / "detective.z5")])
    for story in folder.glob("[dr]*.z5"):
        story.unlink()
    with pytest.raises(PriorZeroError, match="no story file to train on lies in"):
        resolve_games("jericho-suite")
