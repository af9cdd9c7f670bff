"""The loop and its stages on made-up parts: what happens when, what is counted, what is told."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from priorzero.loop import reporting, saving, stages
from priorzero.loop.schedules import parallel
from priorzero.loop.train import train
from priorzero.types import PriorZeroError

GO = SimpleNamespace(requested=False)


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def evaluation(iteration: int, steps: int) -> list[str]:
    return [
        f"evaluate {mode} iter{iteration:06d} at {steps}"
        for mode in ("world_model", "world_model_llm")
    ]


async def test_a_whole_run(made, tmp_path):
    """Three transitions and five steps an iteration; the world model trains in each, the LLM in
    every second, evaluations come before iterations 0 and 2 and at the end.
    """
    run = made()
    run.returns = [9.0, 1.0, 3.0]
    await train(run.parts, GO)

    updates = ["update"] * 2  # 0.5 * 3, rounded up
    assert run.take() == [
        *evaluation(0, 0),
        *["collect from 0", *updates],
        *["collect from 5", *updates, "llm"],
        *evaluation(2, 10),
        *["collect from 10", *updates],
        *["collect from 15", *updates, "llm"],
        *evaluation(4, 20),
    ]
    progress = run.parts.progress
    assert (progress.iteration, progress.env_steps, progress.updates) == (4, 20, 8)
    assert (progress.segments, progress.transitions, progress.llm_version) == (4, 12, 2)
    # The untrained network's 9 does not count.
    assert progress.best_return == 3.0
    assert run.parts.history.losses == {"wm_loss": [1.5, 3.5, 5.5, 7.5], "sft_loss": [0.25] * 2}
    # Saved after the evaluation of iteration 2, by the clock at 3, and once at the end.
    pointers = {p: (tmp_path / "ckpt" / p).read_text() for p in ("latest", "best")}
    assert pointers == {"latest": "iter_00000004", "best": "iter_00000004"}


async def test_an_evaluation_marks_the_best_checkpoint(made, tmp_path):
    run = made(iterations=2, eval_freq=1, save_freq=0)
    run.returns = [0.0, 5.0, 4.0]
    await train(run.parts, GO)
    pointers = {p: (tmp_path / "ckpt" / p).read_text() for p in ("latest", "best")}
    assert pointers == {"latest": "iter_00000002", "best": "iter_00000001"}


async def test_a_stop_ends_after_the_iteration_with_a_save_and_no_evaluation(made, tmp_path, told):
    class AfterOne:
        """Asks to stop once something was collected."""

        @property
        def requested(self):
            return any(event.startswith("collect") for event in run.events)

    run = made(iterations=9)
    await train(run.parts, AfterOne())
    assert run.take() == [*evaluation(0, 0), "collect from 0", "update", "update"]
    assert (tmp_path / "ckpt" / "latest").read_text() == "iter_00000001"
    assert "Stopped by a signal after iteration 1; continue with --resume" in told.text


async def test_without_evaluations(made):
    run = made(iterations=1, eval_freq=0)
    await train(run.parts, GO)
    assert run.take() == ["collect from 0", "update", "update"]


async def test_parallel_trains_by_its_frequencies(made):
    run = made(wm_train_freq=2, llm_train_freq=3)
    run.plays = [(3, 3), (4, 4)] * 2
    for iteration in range(4):
        run.parts.progress.iteration = iteration
        await parallel.iterate(run.parts)
    assert [event.split()[0] for event in run.take()] == [
        *["collect", *["update"] * 3],  # 0.5 * 3 * 2
        "collect",
        *["collect", *["update"] * 3, "llm"],
        "collect",
    ]


async def test_parallel_waits_for_the_first_env_steps(made):
    run = made()
    run.parts.settings.policy.train_start_after_envsteps = 6
    await parallel.iterate(run.parts)
    assert run.take() == ["collect from 0"]
    await parallel.iterate(run.parts)
    assert run.take() == ["collect from 5", "update", "update"]


async def test_what_trained_is_what_the_log_says(made, told):
    """Defect: "WM training done" was logged where only the LLM had trained."""
    run = made(wm_train_freq=2, llm_train_freq=3)
    lines = []
    for iteration in range(6):
        told.clear()
        run.parts.progress.iteration = iteration
        await parallel.iterate(run.parts)
        lines.append([m for m in told.messages if "training done" in m])
    assert lines[0] == ["✓ WM training done - wm_loss: 2.0000"]
    assert lines[1] == lines[3] == []
    assert lines[2] == ["✓ WM training done - wm_loss: 5.0000, llm_sft_loss: 0.2500"]
    assert lines[5] == ["✓ LLM training done - llm_sft_loss: 0.2500"]


async def test_another_schedule_is_one_file(made, tmp_path, monkeypatch):
    from priorzero.loop import schedules

    (tmp_path / "twice.py").write_text(
        "from priorzero.loop import stages\n"
        "async def iterate(parts):\n"
        "    await stages.collect(parts)\n"
        "    await stages.collect(parts)\n"
    )
    monkeypatch.setattr(schedules, "__path__", schedules.__path__)
    schedules.__path__.append(str(tmp_path))
    try:
        run = made(wm_training_mode="twice", iterations=1, eval_freq=0)
        await train(run.parts, GO)
    finally:
        schedules.__path__.remove(str(tmp_path))
    assert run.take() == ["collect from 0", "collect from 5"]


async def test_stages_without_llm_or_updates(made):
    run = made(llm=False)
    assert await stages.train_llm(run.parts) == {}
    assert await stages.train_world_model(run.parts, 0) == {}
    assert run.take() == [] and run.parts.llm_name == "none (pure UniZero)"


async def test_world_model_metrics_are_means_over_the_updates(made):
    metrics = await stages.train_world_model(made().parts, 3)
    assert metrics["wm_loss"] == 2.0 and metrics["updates"] == 3.0
    assert 0 <= metrics["train_time"] < 1


async def test_what_the_buffer_asks_for_is_searched_anew_before_the_update(made):
    run = made()
    run.revisits.append("a step")
    run.parts.progress.env_steps = 7
    metrics = await stages.train_world_model(run.parts, 2)
    assert run.take() == ["reanalyse ['a step'] at 7", "update"] * 2
    assert metrics["reanalyse_share"] == 0.5 and metrics["wm_loss"] == 1.5
    assert run.parts.watch.calls["reanalyse"] == 2


async def test_progress_is_saved_once_and_comes_back_whole(made, told):
    run = made(save_freq=1)
    await train(run.parts, GO)

    again = made()
    again.held, again.lost = 12, 1
    await saving.load(again.parts, "latest")
    assert again.parts.progress == replace(run.parts.progress, episodes_lost=1)
    assert "holds 12 transitions (3 are not on disk any more), 1 of 2 episodes go on" in told.text
    assert again.parts.llm.engine.thought_calls == 4
    assert again.parts.history.losses == run.parts.history.losses
    assert len(again.parts.history.evaluations) == 3
    # The version of the LLM's weights is the progress record's, and the engine is told.
    assert again.take() == [
        *["world model {'model': 1}", "llm {'weights': 1}", "publish 2"],
        *["buffer {'pushed': 1} {}", "episodes {'slots': [1, 2]}"],
    ]

    evaluated = made(eval_only=True)
    await saving.load(evaluated.parts, "latest")
    assert evaluated.parts.progress == run.parts.progress
    assert evaluated.parts.history.evaluations == []
    assert evaluated.take() == ["world model {'model': 1}", "llm {'weights': 1}", "publish 2"]


async def test_an_evaluation_that_was_saved_is_not_played_again(made):
    run = made(iterations=2)
    run.parts.settings.eval.modes = ["world_model_llm"]
    await train(run.parts, GO)
    again = made(iterations=3)
    await saving.load(again.parts, "latest")
    again.take()
    await train(again.parts, GO)
    assert again.take()[0] == "collect from 10"
    assert [e["iteration"] for e in again.parts.history.evaluations] == [0, 2, 3]


async def test_a_checkpoint_of_an_earlier_version_resumes_without_buffer(made, told):
    run = made()
    old = {"policy": {"model": 1}, "progress": {"iteration": 3}, "history": {}}
    run.parts.checkpoints.save(3, old, None, {"game": "made-up"})
    await saving.load(run.parts, "latest")
    assert run.take() == ["world model {'model': 1}"] and run.parts.progress.iteration == 3
    assert "at iteration 3, 0 environment steps; the replay buffer starts empty" in told.text


@pytest.fixture
def full_disk(monkeypatch):
    """From `full_disk()` to the end of the test, or `full_disk(False)`, torch cannot write."""
    import torch

    real, full = torch.save, [False]

    def write(state, path):
        if full[0]:
            path.write_bytes(b"half a ")
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", write)
    return lambda now=True: full.__setitem__(0, now)


async def test_a_full_disk_costs_a_checkpoint_and_not_the_run(made, tmp_path, told, full_disk):
    run = made(iterations=3, eval_freq=0, save_freq=1)
    collect = run.parts.collector.collect

    async def filling(*arguments):
        full_disk(run.parts.progress.iteration == 1)
        return await collect(*arguments)

    run.parts.collector.collect = filling
    await train(run.parts, GO)
    saving.require_saved(run.parts)

    assert run.parts.progress.iteration == 3 and run.parts.progress.save_failures == 1
    errors = [r.getMessage() for r in told.records if r.levelname == "ERROR"]
    assert len(errors) == 1 and "iteration 2 could not be written" in errors[0]
    assert "No space left on device" in errors[0] and f"Free space in {tmp_path}" in errors[0]
    names = {p: (tmp_path / "ckpt" / p).read_text() for p in ("latest", "previous")}
    assert names == {"latest": "iter_00000003", "previous": "iter_00000001"}
    rows = [json.loads(line) for line in _lines(run, tmp_path)]
    assert [r["save_failures"] for r in rows if r["namespace"] == "perf"] == [0.0, 0.0, 1.0]


async def test_a_last_save_that_fails_is_an_error(made, tmp_path, full_disk):
    run = made(iterations=2, eval_freq=0, save_freq=1)
    collect = run.parts.collector.collect

    async def filling(*arguments):
        full_disk(run.parts.progress.iteration == 1)
        return await collect(*arguments)

    run.parts.collector.collect = filling
    await train(run.parts, GO)
    with pytest.raises(PriorZeroError, match="wrote is of iteration 1. Free space in"):
        saving.require_saved(run.parts)
    assert (tmp_path / "ckpt" / "latest").read_text() == "iter_00000001"
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["iter_00000001", "latest"]


async def test_a_best_checkpoint_that_was_not_written_is_not_the_best(made, full_disk):
    run = made(iterations=2, eval_freq=1, save_freq=0)
    run.returns = [0.0, 5.0, 4.0]
    full_disk()
    await train(run.parts, GO)
    assert run.parts.progress.best_return == -math.inf


def _lines(run, folder):
    run.parts.metrics.flush()
    return (folder / "log" / "metrics.jsonl").read_text().splitlines()


async def test_summary_and_settings_are_written(made, tmp_path):
    run = made(iterations=2)
    reporting.write_config(run.parts)
    await train(run.parts, GO)
    summary = reporting.write_summary(run.parts)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"iterations": 2, "llm_warning": ""}
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["iterations"], summary["env_steps"], summary["game"]) == (2, 10, "made-up")
    assert summary["first_losses"]["wm_loss"] == 1.5 and summary["last_losses"]["wm_loss"] == 3.5
    assert [e["iteration"] for e in summary["evaluations"]] == [0, 2]
