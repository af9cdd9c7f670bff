"""Runs side by side: limits, failures, interruptions. The processes are real; what they do is a
script that behaves as a test says, since the main job takes a while to start.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest

from priorzero.sweeping import plan, record
from priorzero.sweeping.plan import planned_runs, sweep_from
from priorzero.sweeping.scheduler import Sweep
from priorzero.types import PriorZeroError

# `--do`: end, fail, fail_once (until a file is there), be slow (SIGTERM saves), wait (slow at
# first, quick when resumed), be deaf to SIGTERM.
SCRIPT = """
import argparse, json, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("env-id", "seed", "exp-name", "do"):
    parser.add_argument("--" + name)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
folder = pathlib.Path(args.exp_name)

def save(*_):
    (folder / "ckpt").mkdir(exist_ok=True)
    (folder / "ckpt" / "latest").write_text("iter")
    sys.exit(0)

signal.signal(signal.SIGTERM, signal.SIG_IGN if args.do == "deaf" else save)
(folder / "log").mkdir(exist_ok=True)
(folder / "config.json").write_text(json.dumps({"at": args.exp_name}))
with (folder / "log" / "metrics.jsonl").open("a") as lines:
    for row in ({"namespace": "eval", "step": 4, "x/return_mean": 1.0},
                {"namespace": "perf", "step": 4, "seconds_iteration": 2, "y": 3}):
        lines.write(json.dumps(row) + "\\n")
    lines.write('{"namespace": "ev')
print("resumes" if args.resume else "begins", time.monotonic(), flush=True)
if args.do == "fail" or args.do == "fail_once" and not (folder.parent / "mended").exists():
    sys.exit("the last line")
if args.do in ("slow", "deaf") or args.do == "wait" and not args.resume:
    (folder / "ready").touch()
    time.sleep(60)
time.sleep(0.2)
print("ends", time.monotonic())
"""


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "stand_in.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(plan, "MAIN", "stand_in")


def make(tmp_path: Path, variants: dict[str, str], seeds=(0,), **values) -> Sweep:
    """A sweep of variants that do so."""
    lines = {name: f"--do {what}" for name, what in variants.items()}
    settings = sweep_from(
        {"games": ["g"], "seeds": list(seeds), "variants": lines} | values, "file"
    )
    return Sweep(settings, planned_runs(settings), tmp_path / "out", tmp_path / "work", "abc")


def states(sweep: Sweep) -> dict[str, str]:
    return {run.variant: sweep.state(run) for run in sweep.runs}


def known(tmp_path: Path, variant: str) -> dict:
    return json.loads((tmp_path / f"out/runs/g_{variant}_seed0/run.json").read_text())


def said(tmp_path: Path, variant: str, seed: int = 0) -> str:
    return (tmp_path / f"work/g_{variant}_seed{seed}/output.txt").read_text()


async def test_a_failed_run_stops_no_other_and_is_tried_again(tmp_path):
    sweep = make(tmp_path, {"bad": "fail_once", "good": "end"}, resources={"jobs": 1})
    await sweep.run()
    assert states(sweep) == {"bad": record.FAILED, "good": record.DONE}
    kept = tmp_path / "out/runs"
    assert "the last line" in (kept / "g_bad_seed0/output_end.txt").read_text()
    assert not (kept / "g_good_seed0/output_end.txt").exists()
    good = known(tmp_path, "good")
    assert (good["status"], good["commit"], len(good["sessions"])) == (0, "abc", 1)
    assert 0.2 < good["seconds"] < 30 and good["command"].startswith("python -m stand_in --env-id")

    # Once more: the good one is not run again, the bad one is, from the beginning.
    (tmp_path / "work/mended").touch()
    sweep = make(tmp_path, {"bad": "fail_once", "good": "end"})
    await sweep.run()
    assert states(sweep) == {"bad": record.DONE, "good": record.DONE}
    assert known(tmp_path, "good") == good and not (kept / "g_bad_seed0/output_end.txt").exists()
    assert (
        said(tmp_path, "bad").count("begins") == 1 and len(known(tmp_path, "bad")["sessions"]) == 1
    )


async def test_what_is_kept_is_what_was_asked_for_without_paths(tmp_path):
    await make(tmp_path, {"a": "end"}).run()
    kept = tmp_path / "out/runs/g_a_seed0"
    assert json.loads((kept / "config.json").read_text()) == {"at": "g_a_seed0"}
    lines = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"namespace": "eval", "step": 4, "x/return_mean": 1.0},
        {"namespace": "perf", "step": 4, "seconds_iteration": 2},
    ]
    assert str(tmp_path) not in "".join(path.read_text() for path in kept.iterdir())


async def test_time_limits(tmp_path):
    """One that saves in time is done; a deaf one is killed, and is not started again either."""
    variants = {"polite": "wait", "deaf": "deaf"}
    limits = {"minutes": 0.03, "grace_seconds": 0.5}
    sweep = make(tmp_path, variants, limits=limits, resources={"jobs": 2})
    started = time.monotonic()
    await sweep.run()
    assert time.monotonic() - started < 30
    assert states(sweep) == {"polite": record.TIME_LIMIT, "deaf": record.KILLED}
    assert known(tmp_path, "polite")["status"] == 0 and known(tmp_path, "deaf")["status"] == -9
    assert known(tmp_path, "polite")["seconds"] >= 1.8

    again = make(tmp_path, variants, limits=limits)
    await again.run()
    assert states(again) == states(sweep)
    assert said(tmp_path, "polite").count("begins") == 1


async def test_runs_that_the_end_of_the_sweep_interrupts_go_on_later(tmp_path):
    limits = {"total_minutes": 0.03, "grace_seconds": 5}
    variants = {"a": "wait", "b": "wait"}
    first = make(tmp_path, variants, limits=limits, resources={"jobs": 1})
    await first.run()
    assert states(first) == {"a": record.INTERRUPTED, "b": "waiting"}

    second = make(tmp_path, {"a": "wait", "b": "wait"}, limits={"minutes": 0.1})
    await second.run()
    assert states(second) == {"a": record.DONE, "b": record.TIME_LIMIT}
    assert "resumes" in said(tmp_path, "a")  # and what it said before is still there
    one, two = known(tmp_path, "a")["sessions"]
    assert two["command"] == one["command"] + " --resume"
    assert known(tmp_path, "a")["seconds"] == pytest.approx(one["seconds"] + two["seconds"])


async def test_earlier_parts_of_a_run_count_to_its_time(tmp_path):
    await make(tmp_path, {"a": "slow"}, limits={"total_minutes": 0.03}).run()
    path = tmp_path / "out/runs/g_a_seed0/run.json"
    values = json.loads(path.read_text())
    values["sessions"][0]["seconds"] = 3600.0
    path.write_text(json.dumps(values))

    sweep = make(tmp_path, {"a": "slow"}, limits={"minutes": 60.02})
    await sweep.run()
    assert sweep.state(sweep.runs[0]) == record.TIME_LIMIT
    assert 3601.2 < known(tmp_path, "a")["seconds"] < 3630


async def test_a_signal_lets_runs_save_and_ends(tmp_path):
    sweep = make(tmp_path, {"a": "wait", "b": "wait"}, resources={"jobs": 2})
    task = asyncio.create_task(sweep.run())
    folders = [tmp_path / f"work/g_{name}_seed0" for name in "ab"]
    async with asyncio.timeout(30):
        while not all((folder / "ready").exists() for folder in folders):
            await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        await task
    assert set(states(sweep).values()) == {record.INTERRUPTED}
    assert all((folder / "ckpt/latest").exists() for folder in folders)


async def test_no_more_at_a_time_than_jobs_and_in_order(tmp_path):
    sweep = make(tmp_path, {"a": "end", "b": "end"}, seeds=(0, 1), resources={"jobs": 2})
    await sweep.run()
    times = []
    for run in sweep.runs:
        lines = (tmp_path / "work" / run.name / "output.txt").read_text().split()
        times.append((float(lines[1]), float(lines[3])))
    at_once = [sum(begin <= t < end for begin, end in times) for t, _ in times]
    assert max(at_once) <= 2
    # The second seed's runs begin after one of the first seed's has ended.
    assert min(begin for begin, _ in times[2:]) > min(end for _, end in times[:2])


async def test_checkpoints_of_done_runs_can_be_removed(tmp_path):
    sweep = make(tmp_path, {"a": "end", "bad": "fail"}, checkpoints=False)
    await sweep.run()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["g_bad_seed0"]


async def test_other_options_and_a_second_sweep_are_refused(tmp_path):
    await make(tmp_path, {"a": "end"}).run()
    with pytest.raises(PriorZeroError, match="begun with other options: then .*--do end, now"):
        await make(tmp_path, {"a": "fail"}).run()

    waits = make(tmp_path, {"b": "wait"}, limits={"total_minutes": 0.05})
    task = asyncio.create_task(waits.run())
    await asyncio.sleep(0.5)
    with pytest.raises(PriorZeroError, match="is in use"):
        await make(tmp_path, {"c": "end"}).run()
    await task
