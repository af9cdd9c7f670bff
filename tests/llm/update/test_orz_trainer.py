"""The ORZ trainer around its workers, which a stand-in replaces here: what it asks of them, takes
from them, saves, and does when they fail. The real ones: test_orz_real.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging

import pytest
import torch

from priorzero.llm.update.build import make_objectives
from priorzero.llm.update.objectives import token
from priorzero.llm.update.orz.contract import OrzFailure
from priorzero.llm.update.trainers import builtin, orz
from priorzero.settings.llm import LLMSettings, PromptSettings, SFTSettings
from priorzero.settings.orz import OrzSettings
from priorzero.types import PriorZeroError
from tests.llm.decisions import REQUESTS, rft_settings, sample, settings
from tests.llm.orz_standin import StandIn

PHASES = [
    [
        sample(r, action_index=i % 2, value_target=(-1.0) ** (i + phase) * (i + 1))
        for i, r in enumerate(REQUESTS)
    ]
    for phase in range(3)
]


def orz_settings(on_failure: str = "error", workers: int = 1, **train) -> LLMSettings:
    return settings(
        **dict(batch_size=4, max_batch_tokens=80) | train,
        trainer="orz",
        prompt=PromptSettings(),
        sft=SFTSettings(enable=False),
        rft=rft_settings(objective="token", max_importance=2.0, advantage="running"),
        orz=OrzSettings(on_failure=on_failure, actor_gpus_per_node=workers),
    )


def trainer_of(model, of: LLMSettings, folder=None, workers=StandIn):
    """The trainer, and its stand-in."""
    opened = []

    def open_session(base, own):
        opened.append(workers(base, of))
        return opened[-1]

    trainer = orz.OrzTrainer(
        model,
        of,
        make_objectives(of, "sum"),
        folder,
        rating=token.make("sum", of.rft.cot_weight),
        open_session=open_session,
    )
    return trainer, opened[0]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.weights().tensors().items()}


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.mark.parametrize("workers", [1, 2])
def test_it_learns_what_the_built_in_trainer_learns(byte_model, workers):
    """Phases of two optimiser steps, of four and two decisions: the same weights to rounding."""
    of = orz_settings(workers=workers)
    theirs = builtin.make(copy.deepcopy(byte_model), None, of, "sum")
    ours, _ = trainer_of(byte_model, of)
    before = weights(ours)

    for number, phase in enumerate(PHASES, 1):
        expected, metrics = (t.update({"rft": phase}) for t in (theirs, ours))
        assert far(weights(ours), weights(theirs)) < 1e-4
        assert ours.version == theirs.version == number
        same = ("advantage_raw", "importance_mean", "grad_norm", "samples", "epochs", "kl_coef")
        for name in (f"rft_{name}" for name in same):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3), name
    assert far(weights(ours), before) > 1e-3
    assert ours.update({"sft": PHASES[0]}) == {}


@pytest.mark.parametrize("on_failure", ["error", "builtin"])
def test_either_trainer_goes_on_from_the_others_checkpoint(byte_model, on_failure):
    of = orz_settings(on_failure)
    ours, _ = trainer_of(copy.deepcopy(byte_model), of)
    ours.update({"rft": PHASES[0]})
    saved = copy.deepcopy(ours.state_dict())
    ours.update({"rft": PHASES[1]})

    theirs = builtin.make(copy.deepcopy(byte_model), None, of, "sum")
    theirs.load_state_dict(copy.deepcopy(saved))
    theirs.update({"rft": PHASES[1]})
    assert far(weights(ours), weights(theirs)) < 1e-4

    # And back, on workers that have begun anew.
    again, _ = trainer_of(byte_model, of)
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert far(weights(again), weights(theirs)) == 0.0
    for trainer in (again, theirs):
        trainer.update({"rft": PHASES[2]})
    assert far(weights(again), weights(theirs)) < 1e-4


@pytest.mark.parametrize("spoils", [False, True])
def test_the_built_in_trainer_takes_over_where_it_may(byte_model, spoils, caplog):
    """From the same weights, moments, and memory of advantages: to the last bit what it would have
    done from a checkpoint.
    """
    of = orz_settings("builtin")
    ours, workers = trainer_of(copy.deepcopy(byte_model), of)
    ours.update({"rft": PHASES[0]})
    theirs = builtin.make(byte_model, None, of, "sum")
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    theirs.version = ours.version

    workers.fails, workers.spoils = None if spoils else OrzFailure("a worker is gone"), spoils
    with caplog.at_level(logging.ERROR):
        for phase in PHASES[1:]:
            expected, metrics = (t.update({"rft": phase}) for t in (theirs, ours))
            assert far(weights(ours), weights(theirs)) == 0.0
            assert {k: v for k, v in metrics.items() if k != "rft_seconds"} == {
                k: v for k, v in expected.items() if k != "rft_seconds"
            }
    assert ours.version == theirs.version == 3
    assert workers.closed and ours.stats()["orz_failures"] == 1
    assert ("NaN" if spoils else "a worker is gone") in caplog.text


@pytest.mark.parametrize("spoils", [False, True])
def test_a_failure_leaves_everything_as_it_was(byte_model, spoils):
    ours, workers = trainer_of(byte_model, orz_settings())
    ours.update({"rft": PHASES[0]})
    before = weights(ours)

    workers.fails, workers.spoils = None if spoils else OrzFailure("a worker is gone"), spoils
    with pytest.raises(PriorZeroError, match="--resume.*on_failure to builtin"):
        ours.update({"rft": PHASES[1]})

    assert far(weights(ours), before) == 0.0 and ours.version == 1
    assert workers.closed


def test_a_checkpoint_is_written_though_the_workers_are_gone(byte_model, caplog):
    ours, workers = trainer_of(byte_model, orz_settings())
    ours.update({"rft": PHASES[0]})
    workers.fails = OrzFailure("a worker is gone")
    saved = ours.state_dict()
    assert set(saved["model"]) and saved["optimizer"]["state"] == {}
    assert "does not hand its optimiser over" in caplog.text

    again, _ = trainer_of(copy.deepcopy(byte_model), orz_settings())
    again.load_state_dict(saved)
    again.update({"rft": PHASES[1]})
    assert far(weights(again), weights(ours)) > 0


def test_workers_are_told_to_load_float32(byte_model):
    """Published models say bfloat16, and ORZ loads what the folder says."""
    byte_model.config.dtype = torch.bfloat16
    told = {}

    class Reads(StandIn):
        def __init__(self, base, of) -> None:
            told.update(json.loads((base / "config.json").read_text(encoding="utf-8")))
            super().__init__(base, of)

    trainer_of(byte_model, orz_settings(), workers=Reads)
    assert told["dtype"] == "float32"


def test_the_workers_folder_is_gone_and_so_are_workers_that_do_not_start(byte_model, tmp_path):
    ours, workers = trainer_of(byte_model, orz_settings(), tmp_path)
    assert list((tmp_path / "orz").iterdir()) == []
    ours.close()
    assert workers.closed

    def broken(base, of):
        raise OrzFailure("no answer in 3 s")

    with pytest.raises(PriorZeroError, match="do not start: no answer in 3 s"):
        trainer_of(copy.deepcopy(byte_model), orz_settings(), tmp_path, broken)


def test_a_decision_that_cannot_be_scored_is_skipped_as_always(byte_model):
    of = dataclasses.replace(orz_settings())
    ours, _ = trainer_of(byte_model, of)
    with torch.no_grad():
        ours.weights().module.model.norm.weight[0] = torch.nan
    metrics = ours.update({"rft": PHASES[0]})
    assert metrics["rft_skipped_steps"] == 1.0 and "rft_policy_loss" not in metrics


def test_asking_for_orz_where_it_is_not_says_what_is_missing(byte_model, monkeypatch, tmp_path):
    monkeypatch.setenv("ORZ_HOME", str(tmp_path))
    with pytest.raises(PriorZeroError, match="is not Open-Reasoner-Zero.*docs/ORZ.md"):
        orz.make(byte_model, None, orz_settings(), "sum")
