"""The schedule llm_only on made-up parts: when it plays, when the LLM trains, what is told."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

from priorzero.data.episodes import Episode
from priorzero.llm.update.groups import GroupDraw
from priorzero.loop import saving
from priorzero.loop.train import train
from priorzero.settings.llm import RFTSettings
from tests.llm.update.test_groups import alone as played_alone

GO = SimpleNamespace(requested=False)
PLAN = dict(
    wm_training_mode="llm_only", llm_only_episodes=3, iterations=5, eval_freq=0, save_freq=0
)
# Two begin, the third after one of them; the round is over in the third iteration.
ROUND = [(2, 2), (1, 2), (0, 0)]
EVENTS = ["collect from 0 alone, 3", "collect from 5 alone, 1", "collect from 10 alone, 0", "llm"]
NEXT = ["collect from 15 alone, 3", "collect from 20 alone, 1"]


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def alone(made):
    """Parts whose LLM learns in groups; `Made.drawn` holds what each phase drew with."""

    def make(**schedule):
        run = made(**PLAN | schedule)
        run.parts.settings.llm.rft = RFTSettings(enable=True, advantage="group", max_staleness=0)
        # One episode of the present weights, one of others.
        held = [Episode(tuple(played_alone(v, [1.0], version=v).steps)) for v in (0, 3)]
        run.parts.buffer.sample_episodes = lambda count, recent, rate: rate(held)
        run.trainer.version = 3
        run.drawn = []

        async def phase(draw):
            run.events.append("llm")
            run.drawn.append(draw)
            draw(3, 10)
            return {}

        run.parts.llm.phase.run = phase
        run.episodes = [*ROUND, *ROUND]
        return run

    return make


async def test_the_llm_trains_when_the_last_episode_of_a_round_has_ended(alone, tmp_path):
    run = alone()
    await train(run.parts, GO)
    assert run.take() == EVENTS + NEXT
    assert all(isinstance(draw, GroupDraw) for draw in run.drawn) and len(run.drawn) == 1
    assert run.parts.progress.round_episodes == 3 and run.parts.progress.updates == 0

    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").open()]
    rounds = [(r["round_episodes"], r["round_running"]) for r in rows if r["namespace"] == "perf"]
    assert rounds == [(2, 2), (3, 2), (3, 0), (2, 2), (3, 2)]
    (llm,) = [r for r in rows if r["namespace"] == "llm"]
    assert (llm["rft_groups"], llm["rft_groups_flat"]) == (1.0, 1.0)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
async def test_a_resumed_run_goes_on_within_its_round(alone, stop):
    first = alone(iterations=stop)
    await train(first.parts, GO)
    second = alone()
    second.episodes = first.episodes
    await saving.load(second.parts, "latest")
    second.take()
    await train(second.parts, GO)
    assert first.take() + second.take() == EVENTS + NEXT


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        (dict(rft_groups=1.0, rft_groups_flat=1.0), "teaches nothing: of its 1 groups, 1 have"),
        (
            dict(rft_loss=0.1, rft_group_episodes=8.0, rft_group_return=2.5, rft_group_spread=1.0),
            "8 episodes of these weights, return 2.50 ± 1.00",
        ),
    ],
)
async def test_a_rounds_end_is_told(alone, told, metrics, line):
    run = alone(iterations=3)

    async def phase(draw):
        draw.metrics = metrics
        return {}

    run.parts.llm.phase.run = phase
    await train(run.parts, GO)
    assert line in told.text
