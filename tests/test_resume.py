"""A run that was stopped and went on is the run that was not stopped, number for number."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from priorzero.comparison.runs import read_runs
from priorzero.settings.env import plain_name
from tests.test_entry import (
    ROOT,
    SETTINGS,
    Finished,
    assert_one_error,
    environment,
    experiment,
    metrics,
    read_json,
    run,
)

# What time it took differs from run to run; what was computed does not.
TIMES = ("train_time", "seconds")
EVAL = ["--eval-freq=2", "--save-freq=1"]


def computed(cwd: Path, *namespaces: str) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMES)}
        for row in metrics(experiment(cwd))
        if row["namespace"] in namespaces
    ]


def both(tmp_path: Path, *arguments: str, tiny: bool = True) -> tuple[Path, Path, Finished]:
    """Four iterations at once, and two and two; with the second part's output."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for cwd, more in (
        (whole, ["--iterations=4"]),
        (parts, ["--iterations=2"]),
        (parts, ["--iterations=4", "--resume"]),
    ):
        cwd.mkdir(exist_ok=True)
        result = run(cwd, *arguments, *more, tiny=tiny)
        assert result.status == 0, result.output
    return whole, parts, result


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path, Finished]:
    """`both` of a run without an LLM; tests read it, or work on a copy."""
    return both(tmp_path_factory.mktemp("plain"), *EVAL)


def test_a_resumed_run_is_the_uninterrupted_one(plain):
    whole, parts, result = plain
    names = ("collect", "prior", "wm", "eval")
    rows = computed(whole, *names)
    assert computed(parts, *names) == rows
    assert sum(row["namespace"] == "wm" for row in rows) == 4
    assert "transitions, 2 of 2 episodes go on" in result.output

    told = [read_json(experiment(cwd) / "summary.json") for cwd in (whole, parts)]
    for name in ("env_steps", "first_losses", "last_losses", "evaluations"):
        assert told[0][name] == told[1][name], name


@pytest.mark.slow
def test_with_schedules_and_restarts(tmp_path):
    """The memory of visited states, its draws and episodes that began at one go on too."""
    whole, parts, _ = both(
        tmp_path,
        *EVAL,
        "--set=policy.restarts.share=0.8",
        "--set=policy.root_policy=puct",
        "--set=policy.annealing.duration=30",
        "--set=policy.num_segments=6",
    )
    rows = computed(whole, "collect", "prior", "wm", "eval")
    assert computed(parts, "collect", "prior", "wm", "eval") == rows
    collected = [row for row in rows if row["namespace"] == "collect"]
    assert sum(row["restarts"] for row in collected) >= 3
    assert len({row["temperature"] for row in collected}) >= 2


def test_with_an_llm_too(tiny_llm, tmp_path):
    whole, parts, _ = both(
        tmp_path,
        "--env-id=tw-simple",
        "--exp-name=tiny",
        f"--llm={tiny_llm}",
        "--engine=transformers",
        "--llm-train-freq=1",
        "--rft",
        *SETTINGS,
        "--set=llm.sft.samples=4",
        "--set=llm.rft.samples=4",
        "--set=llm.lora.last_layers=1",
        "--set=policy.root_prior.temperature=auto",
        "--set=policy.root_prior.calibration.least=12",
        '--set=eval.modes=["world_model_llm"]',
        *EVAL,
        tiny=False,
    )
    names = ("collect", "prior", "wm", "llm", "eval")
    rows = computed(whole, *names)
    assert computed(parts, *names) == rows
    assert sum(row["namespace"] == "llm" for row in rows) == 4
    assert any(row.get("kl_from_wm", 0) > 0 for row in rows)

    # The LLM's temperature moves on from where it was, and enters what is computed next.
    told = [row for row in rows if row["namespace"] == "prior"]
    assert told[0]["temperature"] == 8.0 and len({row["temperature"] for row in told}) >= 3
    for row, after in zip(told[-3:-1], told[-2:], strict=True):
        before, best = row["temperature"], row["calibration_best"]
        assert after["temperature"] == pytest.approx(before * (best / before) ** 0.3)


@pytest.mark.slow
def test_with_several_games_too(tmp_path):
    """Weights draw an episode's game; the resumed run draws the same."""
    coin = "tw-coin:level=3,seed=2"
    whole, parts, result = both(
        tmp_path,
        *("--env-id", "tw-simple", coin, "--eval-env-id", "tw-simple", coin, "tw-coin"),
        "--set=env.game_weights=[1, 2]",
        *EVAL,
    )
    names = ("collect", "prior", "wm", "eval")
    rows = computed(whole, *names)
    assert computed(parts, *names) == rows
    assert "2 of 2 episodes go on" in result.output
    assert (experiment(parts) / "ckpt" / "best").is_file()

    written = {f"{row['namespace']}/{name}" for row in rows for name in row}
    games = [game for game in ("tw-simple", plain_name(coin)) if f"collect/{game}/steps" in written]
    assert len(games) == 2
    for mode in ("tw-simple/world_model", "tw-coin/world_model", "unseen/world_model"):
        assert f"eval/{mode}/return_mean" in written

    # Each has a row in the manual.
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    for name in written:
        for game in games:
            if name.startswith(f"collect/{game}/"):
                assert f"`{name.replace(game, 'GAME')}`" in page, name

    # And compare tells them by game.
    told = {run.game: run for run in read_runs([experiment(whole)])}
    together = f"tw-simple + {coin}"
    assert set(told) == {together, "tw-simple", coin, "tw-coin"}
    values = [told[game].points[-1].value for game in (together, "tw-simple", coin)]
    assert values[0] == pytest.approx(sum(values[1:]) / 2)


def test_a_full_disk_at_the_last_save_is_one_error_and_the_checkpoint_before_goes_on(
    plain, tmp_path
):
    """A real file system error: no file may grow beyond what a checkpoint needs."""
    shutil.copytree(experiment(plain[0]), experiment(tmp_path))
    store = experiment(tmp_path) / "ckpt"
    assert (store / "latest").read_text() == "iter_00000004"
    size = (store / "iter_00000004" / "state.pt").stat().st_size

    # The command line, in a process that may not write more than half a checkpoint into a file.
    code = (
        "import asyncio, resource, sys\n"
        "from priorzero_orz_entry import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
        "sys.exit(asyncio.run(main(sys.argv[1:])))\n"
    )
    arguments = ["--env-id=tw-simple", "--exp-name=tiny", "--no-llm", *SETTINGS]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments]
        + ["--iterations=6", "--eval-freq=0", "--save-freq=1", "--resume"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    failed = Finished(done.returncode, done.stderr)
    assert_one_error(failed, "the run's last checkpoint could not be written", "--resume")
    for iteration in (5, 6):
        assert f"the checkpoint of iteration {iteration} could not be written" in failed.output
    assert (store / "latest").read_text() == "iter_00000004"
    rows = [r for r in metrics(experiment(tmp_path)) if r["namespace"] == "perf"]
    assert [r["save_failures"] for r in rows[-2:]] == [0.0, 1.0]
    assert read_json(experiment(tmp_path) / "summary.json")["iterations"] == 6

    result = run(tmp_path, "--iterations=5", "--eval-freq=0", "--resume")
    assert result.status == 0 and "Resumed tw-simple at iteration 4" in result.output
