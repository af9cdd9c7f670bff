"""What a run's search makes of its prior: along a real walkthrough, with a tiny run's agent."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
from pathlib import Path

import numpy as np
import pytest

from priorzero.evidence.search import STAGES, measure_search
from priorzero.evidence.walk import walk
from priorzero.games.catalogue import resolve_game
from priorzero.prior_report import main
from priorzero.settings.record import merge
from priorzero.types import PriorZeroError

STEPS = 4
SIZES = dict(
    env=dict(max_steps=4, collector_env_num=2, evaluator_env_num=1),
    policy=dict(
        device="cpu",
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        group_size=8,
        support_scale=10,
        num_simulations=30,
        game_segment_length=4,
        num_segments=2,
        batch_size=4,
    ),
    llm=dict(engine="transformers", dtype="float32", prompt=dict(history_length=2)),
)


@pytest.fixture(scope="module")
def run(tiny_llm, tmp_path_factory) -> Path:
    """One iteration, saved."""
    from priorzero_config import HybridTrainingConfig
    from priorzero_orz_entry import train_priorzero_orz

    config = HybridTrainingConfig(
        env_id="tw-simple",
        debug_mode=True,
        overrides=merge(SIZES, dict(llm=dict(model=tiny_llm))),
        iterations=1,
        eval_freq=0,
    )
    config.priorzero_cfg.exp_name = str(tmp_path_factory.mktemp("run") / "tiny")
    asyncio.run(train_priorzero_orz(config))
    return Path(config.priorzero_cfg.exp_name)


async def test_every_stage_is_judged_on_the_same_decisions(run):
    rows = await measure_search(run, "latest", STEPS)
    assert [row["stage"] for row in rows] == ["uniform", *STAGES]
    judged = len(walk(resolve_game("tw-simple"), STEPS, 0).judged)
    assert {row["decisions"] for row in rows} == {judged} and judged > 1
    assert {row["dropped"] for row in rows} == {0} and not rows[0]["judging_only"]

    # The search plans from the mixture, which lies between the LLM and the world model.
    by = {row["stage"]: row for row in rows}
    ends = sorted((by["LLM"]["log_loss"], by["world model"]["log_loss"]))
    assert ends[0] - 0.5 < by["mixture"]["log_loss"] < ends[1] + 0.5
    assert len({row["log_loss"] for row in rows}) == len(rows)


async def test_visits_that_are_one_sided_are_told_as_such(run, monkeypatch):
    """With all visits and the whole target on the walkthrough's command both are perfect."""
    from dataclasses import replace

    from priorzero.agent.agent import Agent

    walked = walk(resolve_game("tw-simple"), STEPS, 0)
    right = iter(step.outcomes.index(0) for step in walked.judged)
    plan = Agent.plan

    def perfect(self, root, env_steps, use_llm=True):
        found = plan(self, root, env_steps, use_llm)
        one = np.eye(len(root.valid_ids))[next(right)]
        return replace(found, visit_counts=30 * one, target_policy=one)

    monkeypatch.setattr(Agent, "plan", perfect)
    by = {row["stage"]: row for row in await measure_search(run, "latest", STEPS)}
    for stage in ("search target", "visits"):
        assert by[stage]["top1"] == by[stage]["mrr"] == 1.0
        assert by[stage]["log_loss"] == pytest.approx(0, abs=1e-9)
    assert by["LLM"]["mrr"] < 1


def test_the_report_shows_it(run, tiny_llm, tmp_path):
    handlers = logging.getLogger().handlers[:]
    command = f"--llm {tiny_llm} --games tw-simple --steps 2 --episodes 0 --variants bare "
    command += f"--temperatures 1 --out {tmp_path} --run {run} --device cpu --commit abc"
    assert asyncio.run(main(shlex.split(command))) == 0
    logging.getLogger().handlers[:] = handlers
    rows = json.loads((tmp_path / "report.json").read_text())["search"]
    page = (tmp_path / "README.md").read_text()
    assert "## What the search makes of the prior" in page
    for row in rows:
        assert f"| {row['stage']} | {row['top1']:.3f} |" in page


async def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(PriorZeroError, match="no run's folder"):
        await measure_search(tmp_path, "latest", 1)
