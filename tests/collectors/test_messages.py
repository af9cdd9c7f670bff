"""What goes between learner and workers."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.collectors.messages import Share, pack_played, unpack_played
from priorzero.data.packing import pack
from priorzero.games.env import episode_seed
from priorzero.games.group import GameEnvGroup
from priorzero.settings.experiment import ExperimentSettings
from tests.collectors.scripted import collector_of, policy_of, settings_of
from tests.playing import FakePrior, ScriptedEnv


@pytest.fixture
def played(one_thread):
    """`await played(segments, answers=…)`: what a collector with a made-up LLM played."""
    groups = []

    async def play(segments: int, answers: bool = True, before: int = 0):
        settings, create = settings_of()
        settings.policy.root_prior.mode = "llm_plus_wm_logits"
        groups.append(GameEnvGroup([ScriptedEnv(i) for i in range(3)], seed=0))
        policy, prior = policy_of(settings, create), FakePrior(answers)
        collector = collector_of(settings, policy, groups[-1], prior=prior)
        return await collector.play(segments, before, 1.0)

    yield play
    for group in groups:
        group.close()


async def test_played_comes_back_with_the_same_figures(played):
    played = await played(7, before=100)
    message = pack_played(played)
    back = unpack_played(message, 100, {})

    ours, theirs = pack(played.segments), pack(back.segments)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)
    told = [one.result(running=3, by_game=True) for one in (played, back)]
    assert told[0].collect == told[1].collect and told[0].prior == told[1].prior
    assert told[0].steps == told[1].steps > 20 and told[0].begun == told[1].begun

    # Nothing of it lies in the message's memory any more.
    step = back.segments[0].steps[0]
    assert not any(
        np.shares_memory(mine, theirs)
        for mine in (step.observation, step.valid_ids, step.visit_counts)
        for theirs in message["segments"].values()
        if theirs.size
    )


async def test_decisions_without_an_answer_keep_their_figures_apart(played):
    """Where the LLM answers now and then, the means are over the decisions that it answered."""
    one, other = await played(2), await played(2, answers=False)
    one.join(other)
    back = unpack_played(pack_played(one), 0, {})
    assert back.effects == one.effects
    assert {len(effect) for effect in back.effects} == {4, 6}


def share(first: int, count: int, life: int = 0, number: int = 0, gpus: float = 0.0) -> Share:
    return Share(number, first, count, 8, life, gpus, seed=5)


def test_no_episode_is_played_twice():
    """Places of all workers of several lives and splits, and what the games' seeds are made of."""
    shares = [share(0, 3), share(3, 3), share(6, 2), share(3, 3, life=1), share(0, 8, life=2)]
    places = [s.place + i for s in shares for i in range(s.environments)]
    assert len(places) == len(set(places))
    seeds = {episode_seed(5, place, episode, "train") for place in places for episode in range(3)}
    assert len(seeds) == 3 * len(places)
    own = {s.settings(ExperimentSettings().as_dict()).seed for s in shares}
    assert len(own) == len(shares)


def test_the_first_worker_has_the_settings_of_the_run():
    run = ExperimentSettings(seed=5)
    run.env.listing_workers, run.policy.device, run.llm.device = None, "cuda", "auto"
    run.llm.rft.kl_reference = "initial"
    mine = share(0, 4).settings(run.as_dict())
    assert (mine.seed, mine.policy.device, mine.llm.device) == (5, "cpu", "cpu")
    assert mine.env.listing_workers == 0 and mine.llm.rft.kl_reference == "collected"

    run.env.listing_workers = 2
    mine = share(0, 4, gpus=0.5).settings(run.as_dict())
    assert (mine.policy.device, mine.env.listing_workers) == ("cuda", 2)
    mine.env.listing_workers, mine.llm.rft.kl_reference = 2, "initial"
    assert mine.as_dict() == run.as_dict(), "all else is the run's"


@pytest.mark.parametrize("total", [1, 4, 7, 8])
def test_seeds_lie_within_their_bounds(total):
    wide = Share(0, 0, total, total, 10_000, 0.0, seed=2**31 - 1)
    assert 0 <= wide.settings(ExperimentSettings().as_dict()).seed < 2**31
