"""The loop and its stages on made-up parts: what happens when, what is counted, what is told."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

from priorzero.loop import reporting, saving, stages
from priorzero.loop.schedules import parallel
from priorzero.loop.train import train

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


async def test_progress_is_saved_once_and_comes_back_whole(made, tmp_path):
    run = made(save_freq=1)
    await train(run.parts, GO)

    again = made()
    await saving.load(again.parts, "latest")
    assert again.parts.progress == run.parts.progress
    assert again.parts.history.losses == run.parts.history.losses
    assert len(again.parts.history.evaluations) == 3
    # The version of the LLM's weights is the progress record's, and the engine is told.
    assert again.take() == ["world model {'model': 1}", "llm {'weights': 1}", "publish 2"]

    evaluated = made(eval_only=True)
    await saving.load(evaluated.parts, "latest")
    assert evaluated.parts.progress == run.parts.progress
    assert evaluated.parts.history.evaluations == []


async def test_summary_and_settings_are_written(made, tmp_path):
    run = made(iterations=2)
    reporting.write_config(run.parts)
    await train(run.parts, GO)
    summary = reporting.write_summary(run.parts)
    assert json.loads((tmp_path / "config.json").read_text()) == {"iterations": 2}
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["iterations"], summary["env_steps"], summary["game"]) == (2, 10, "made-up")
    assert summary["first_losses"]["wm_loss"] == 1.5 and summary["last_losses"]["wm_loss"] == 3.5
    assert [e["iteration"] for e in summary["evaluations"]] == [0, 2]
