"""`python -m priorzero.sweep` with real runs in tiny sizes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from priorzero.sweep import main

ROOT = Path(__file__).resolve().parents[2]
TINY = """--preset debug --no-llm --device cpu
 --set env.max_steps=8 --set env.collector_env_num=2 --set env.evaluator_env_num=1
 --set env.n_evaluator_episode=1 --set policy.embed_dim=32 --set policy.num_layers=1
 --set policy.num_heads=2 --set policy.group_size=8 --set policy.support_scale=10
 --set policy.num_simulations=2 --set policy.game_segment_length=5 --set policy.num_segments=2
 --set policy.batch_size=4 --set policy.replay_ratio=0.2"""


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """The command replaces the root logger's handlers."""
    monkeypatch.setattr("priorzero.sweep.setup_logging", lambda folder: None)


def write_file(tmp_path: Path, **values) -> Path:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"seeds": [0], "games": ["tw-simple"]} | values))
    return path


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
async def test_a_sweep_is_compared_and_a_game_that_is_not_there_stops_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = write_file(
        tmp_path,
        games=["no-such-game", "tw-simple"],
        arguments=f"{TINY} --iterations 1 --eval-freq 1",
        variants={"sure": "--set policy.root_noise_weight=0", "noisy": ""},
    )
    arguments = [str(path), "--out", "results", "--jobs", "2", "--commit", "abc"]
    assert await main(arguments) == 1
    runs = read(tmp_path / "results/sweep.json")["runs"]
    assert runs == {
        "no-such-game_sure_seed0": "failed",
        "no-such-game_noisy_seed0": "failed",
        "tw-simple_sure_seed0": "done",
        "tw-simple_noisy_seed0": "done",
    }
    lines = tmp_path / "results/runs/no-such-game_sure_seed0/output_end.txt"
    assert "game 'no-such-game' is unknown" in lines.read_text()

    (game,) = read(tmp_path / "results/compare/compare.json")["games"]
    assert [group["name"] for group in game["groups"]] == ["noisy", "sure"]
    for group in game["groups"]:
        assert group["steps"]["runs"] == group["minutes"]["runs"] == 1
    assert (tmp_path / "results/compare/curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_sweep_that_is_ended_by_sigterm_goes_on(tmp_path):
    """Its run saves, nothing is left behind, and the next start finishes the run."""
    total = 20
    path = write_file(tmp_path, arguments=f"{TINY} --iterations {total} --eval-freq 0")
    command = [sys.executable, "-m", "priorzero.sweep", str(path), "--out=out", "--commit=abc"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = tmp_path.joinpath("out", "work", "tw-simple_default_seed0", "log", "metrics.jsonl")
    kept = tmp_path / "out/runs/tw-simple_default_seed0"

    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as sweep:
        deadline = time.monotonic() + 240
        while not (lines.is_file() and "seconds_iteration" in lines.read_text()):
            assert sweep.poll() is None and time.monotonic() < deadline, sweep.stderr.read()
            time.sleep(0.05)
        below = psutil.Process(sweep.pid).children(recursive=True)
        assert below
        sweep.send_signal(signal.SIGTERM)
        told = sweep.communicate(timeout=120)[1]
    assert sweep.returncode == 1 and "1 interrupted" in told, told
    # Interpreters notice within two seconds that they are alone.
    assert psutil.wait_procs(below, timeout=10)[1] == []
    first = read(kept / "summary.json")["iterations"]
    assert read(kept / "run.json")["state"] == "interrupted" and 0 < first < total

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert read(kept / "run.json")["state"] == "done" and "resumed" in done.stderr
    assert read(kept / "summary.json")["iterations"] == total
    rows = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "seconds_iteration" in row]) == total


async def test_the_plan_is_shown_and_nothing_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_file(tmp_path, seeds=[4, 2], variants={"only": "--no-llm"})
    assert await main([str(path), "--plan"]) == 0
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["tw-simple_only_seed4", "tw-simple_only_seed2"]
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]


async def test_the_command_line_stands_before_the_file(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    path = write_file(tmp_path, resources={"memory_gb": 1e6}, variants={"only": "--no-llm"})
    assert await main([str(path)]) == 2
    assert "no run would ever start" in caplog.text
    caplog.clear()
    assert await main([str(path), "--threads", "0"]) == 2
    assert "resources.threads is 0" in caplog.text
