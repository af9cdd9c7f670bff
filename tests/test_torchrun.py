"""Runs of two real processes under torchrun, on gloo; and what such a run refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import priorzero_orz_entry as entry
from priorzero import ranks as ranks_module
from priorzero.ranks import ALONE, Ranks, join
from priorzero.run.data_parallel import CommonStop, own_settings, require_possible
from priorzero.types import PriorZeroError
from priorzero_config import HybridTrainingConfig
from tests.ranks import launch
from tests.test_entry import SETTINGS

COMMON = [*SETTINGS, "--env-id", "tw-simple", "--no-llm", "--save-freq", "2", "--eval-freq", "4"]


def kept(folder) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_equal(ours, theirs, where: str = "") -> None:
    """To the last bit, all the way down."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name in ours:
            assert_equal(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def actions_played(rank: dict) -> list[tuple[str, int]]:
    return [(action, number) for episode in rank["played"] for _, action, number in episode]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_one_network_and_leave_an_ordinary_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = [*COMMON, "--exp-name", str(run)]
    done = launch("run", tmp_path, *arguments, "--iterations", "4", DEBUG_MODE="True")
    assert done.returncode == 0, done.stdout
    assert "[rank 1]" not in done.stdout and "Processes:       2" in done.stdout
    first, second = kept(tmp_path)

    # One network: weights, target, optimiser, and what its outputs mean.
    for part in ("learnt", "texts"):
        for own in (first, second):
            own[part].pop("rng", None)
        ours, theirs = first[part], second[part]
        ours.pop("vocabulary", None), theirs.pop("vocabulary", None)
        assert_equal(ours, theirs, part)
    ids: dict[str, set[int]] = {}
    for action, number in actions_played(first) + actions_played(second):
        ids.setdefault(action, set()).add(number)
    assert all(len(own) == 1 for own in ids.values())
    assert len({min(own) for own in ids.values()}) == len(ids) > 3

    # Each played and holds its own; both count all of it.
    assert first["seed"] != second["seed"] and first["played"] != second["played"]
    assert asdict(first["progress"]) == asdict(second["progress"])
    assert first["progress"].transitions == first["held"] + second["held"]
    assert first["progress"].updates >= 4 and first["held"] > 0 and second["held"] > 0
    assert first["history"] == second["history"] and len(first["history"].evaluations) == 2

    # The folder is that of an ordinary run, and the second process's share lies apart.
    lines = (run / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row for row in map(json.loads, lines) if row["namespace"] == "wm"]
    assert len(losses) == 4
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["env_steps"] == first["progress"].env_steps
    assert sorted(path.name for path in (run / "ranks").iterdir()) == ["1"]
    assert sorted(path.name for path in (run / "ranks" / "1").iterdir()) == ["ckpt", "replay"]

    # They go on from it, each with its own buffer; then one process does alone.
    again = launch("run", tmp_path, *arguments, "--iterations", "6", "--resume", DEBUG_MODE="True")
    assert again.returncode == 0, again.stdout
    assert "[rank 1]" not in again.stdout
    before, (first, second) = [first["held"], second["held"]], kept(tmp_path)
    assert first["held"] > before[0] and second["held"] > before[1]
    assert_equal(first["learnt"]["model"], second["learnt"]["model"], "after a resume")

    monkeypatch.setenv("DEBUG_MODE", "True")
    command = [*arguments, "--iterations", "7", "--resume"]
    assert entry.asyncio.run(entry.main(command)) == 0
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["iterations"] == 7 and summary["env_steps"] > first["progress"].env_steps


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_refused_is_said_once(tmp_path):
    """By the first process, before anything is made; the others end without a word."""
    arguments = ["--env-id", "tw-simple", "--exp-name", str(tmp_path / "run"), "--iterations", "1"]
    done = launch("run", tmp_path, *arguments, DEBUG_MODE="True")
    assert done.returncode != 0
    said = [line for line in done.stdout.splitlines() if line.startswith(("Error: ", "[rank"))]
    assert len(said) == 1 and "these settings are impossible" in said[0], done.stdout
    assert "torchrun trains the world model alone" in done.stdout
    assert not (tmp_path / "run" / "ckpt").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(presets=("frozen",)), None),
        (dict(enable_llm=False), None),
        (dict(), "llm"),
        (dict(wm_training_mode="alternating"), "wm_training_mode"),
        (dict(enable_llm=False, off_policy_degree=1), "off_policy_degree"),
        (dict(enable_llm=False, async_eval=True), "async_eval"),
        (dict(enable_llm=False, collector_workers=2), "collector_workers"),
        (
            dict(
                presets=("frozen",),
                overrides=dict(policy=dict(root_prior=dict(temperature="auto"))),
            ),
            "policy.root_prior.temperature",
        ),
        (
            dict(
                enable_llm=False,
                overrides=dict(policy=dict(action_vocabulary=dict(kind="positional"))),
            ),
            "policy.action_vocabulary.kind",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(changes, named):
    config = HybridTrainingConfig(env_id="tw-simple", debug_mode=True, **changes)
    if named is None:
        require_possible(config, eval_only=False)
        with pytest.raises(PriorZeroError, match="eval_only"):
            require_possible(config, eval_only=True)
    else:
        with pytest.raises(PriorZeroError, match=named):
            require_possible(config, eval_only=False)


def test_a_process_has_a_seed_of_its_own_and_all_but_the_first_write_nothing():
    settings = HybridTrainingConfig(env_id="tw-simple", seed=3, debug_mode=True).priorzero_cfg
    assert own_settings(settings, Ranks(0, 2)) is settings

    own = own_settings(settings, Ranks(1, 2))
    assert own.seed not in (3, 4) and settings.seed == 3
    assert own.seed != own_settings(settings, Ranks(2, 3)).seed
    assert own.decisions.collect_share == 0 and not own.decisions.evaluation
    assert not own.eval.transcripts and own.metrics.wandb == "off"
    own.validate()


def test_alone_nobody_is_asked(monkeypatch):
    """torch.distributed is not even imported."""
    monkeypatch.setitem(__import__("sys").modules, "torch.distributed", None)
    value = torch.ones(2)
    assert ALONE.mean(value) is value and ALONE.total(3, 4) == [3, 4]
    assert ALONE.from_first("x") == "x" and ALONE.gather(1) == [1]
    assert ALONE.any(True) and not ALONE.any(False)
    assert CommonStop(SimpleNamespace(requested=True), ALONE).requested
    with ALONE.in_order():
        pass
    monkeypatch.delenv("RANK", raising=False)
    assert join() is ALONE


@pytest.mark.parametrize(
    ("visible", "local", "own"),
    [("0,1", 1, "1"), ("GPU-a, GPU-b", 1, "GPU-b"), ("", 1, ""), ("3", 0, "3"), ("3", 1, None)],
)
def test_a_process_sees_the_gpu_that_is_its_own(monkeypatch, visible, local, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if own is None:
        with pytest.raises(PriorZeroError, match="has no GPU"):
            ranks_module._choose_gpu(local)
        return
    ranks_module._choose_gpu(local)
    assert ranks_module.os.environ["CUDA_VISIBLE_DEVICES"] == own
