"""Schedules with turns in real runs of tiny sizes, from the command line to metrics and summary."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_entry import SETTINGS, Finished, experiment, metrics, read_json, run

pytestmark = pytest.mark.slow

# Each iteration of the world model's turn brings at least two updates.
UPDATES = ["--set=policy.replay_ratio=1.0"]


def train(cwd: Path, llm: str, *arguments: str) -> Finished:
    result = run(
        cwd,
        "--env-id=tw-simple",
        "--exp-name=tiny",
        f"--llm={llm}",
        "--engine=transformers",
        "--set=llm.lora.last_layers=1",
        "--set=llm.sft.samples=2",
        '--set=eval.modes=["world_model"]',
        *SETTINGS,
        *UPDATES,
        *arguments,
        tiny=False,
    )
    assert result.status == 0, result.output
    return result


def iterations(folder: Path) -> list[tuple[str, ...]]:
    """What each iteration did: the namespaces it wrote, and `asked` where the LLM's prior had a
    weight.
    """
    found, now = [], set()
    for row in metrics(folder):
        now.add(row["namespace"])
        if row["namespace"] == "prior" and row["weight"] > 0:
            now.add("asked")
        if row["namespace"] == "perf":
            found.append(tuple(sorted(now & {"collect", "asked", "wm", "llm"})))
            now = set()
    return found


WM, LLM = ("asked", "collect", "wm"), ("asked", "collect", "llm")


def test_sequential_ends_after_both_and_goes_on_where_it_was(tmp_path, tiny_llm):
    mode = ["--wm-training-mode=sequential", "--sequential-wm-updates=2", "--eval-freq=0"]
    mode += ["--sequential-llm-phases=2"]
    stopped = train(tmp_path, tiny_llm, *mode, "--iterations=2")
    told = "Training mode:   sequential: world model 2 updates, then LLM 2 phases, once"
    assert told in stopped.lines

    resumed = train(tmp_path, tiny_llm, *mode, "--iterations=9", "--resume")
    assert iterations(experiment(tmp_path)) == [WM, LLM, LLM]
    assert "sequential is finished after 3 iterations" in resumed.lines
    assert read_json(experiment(tmp_path) / "summary.json")["iterations"] == 3
    schedule = read_json(experiment(tmp_path) / "config.json")["schedule"]
    assert (schedule["wm_training_mode"], schedule["sequential_llm_phases"]) == ("sequential", 2)


@pytest.mark.parametrize(
    ("collect", "llms_turn"), [("world_model", ("collect", "llm")), ("nothing", ("llm",))]
)
def test_alternating_takes_turns(tmp_path, tiny_llm, collect, llms_turn):
    train(
        tmp_path,
        tiny_llm,
        "--wm-training-mode=alternating",
        "--alternating-wm-updates=2",
        "--alternating-llm-phases=2",
        f"--alternating-llm-collect={collect}",
        "--iterations=5",
        "--eval-freq=2",
        "--save-freq=3",
    )
    folder = experiment(tmp_path)
    assert iterations(folder) == [WM, llms_turn, llms_turn, WM, llms_turn]
    summary = read_json(folder / "summary.json")
    assert [e["iteration"] for e in summary["evaluations"]] == [0, 2, 4, 5]
    assert (folder / "ckpt" / "latest").read_text() == "iter_00000005"

    perf = [row for row in metrics(folder) if row["namespace"] == "perf"]
    assert [row["turn"] for row in perf] == [0, 1, 1, 2, 3]
    assert [row["turn_llm"] for row in perf] == [0, 1, 1, 0, 1]
    assert [row["turn_updates"] for row in perf] == [2, 1, 2, 2, 1]
    steps = [row["step"] for row in perf]
    played = [after > before for before, after in zip(steps, steps[1:], strict=False)]
    assert played == [c == "collect" for c in (llms_turn[0], llms_turn[0], "collect", llms_turn[0])]
