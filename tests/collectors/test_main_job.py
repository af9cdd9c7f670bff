"""The main job with workers, real games and a real (tiny) LLM, in a Ray of its own on this machine:
weights on both sides, a death in the middle, a resume, and what is left behind.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import signal
import time

import numpy as np
import psutil
import pytest

from tests.test_docs import documented_metrics
from tests.test_entry import SETTINGS, Job, experiment, metrics, read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.timeout(900),
]
WORKERS = ["--collector-workers=2", "--set=env.collector_env_num=3", "--set=policy.num_segments=3"]


def gone(processes: list[psutil.Process], seconds: float = 20.0) -> bool:
    """Whether none of these lives, or will soon."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            return True
        time.sleep(0.1)
    return False


def workers_of(job: Job) -> list[psutil.Process]:
    """Those that play at the start."""
    (told,) = re.findall(r"^2 collector workers play \((.*)\)$", job.output(), re.M)
    return [psutil.Process(int(one.split()[1])) for one in told.split(", ")]


def test_a_worker_killed_in_a_run_beside_training_and_a_resume(tmp_path):
    """Training runs beside collection; a worker is killed with -9, later the run is asked to stop,
    and goes on with another number of workers, then without.
    """
    with Job(
        tmp_path, *WORKERS, "--iterations=500", "--eval-freq=0", "--off-policy-degree=1"
    ) as job:
        job.wait_for("[Iter 3]")
        players = workers_of(job)
        interpreters = players[0].children(recursive=True)
        assert len(interpreters) >= 2
        os.kill(players[0].pid, signal.SIGKILL)
        job.wait_for("is given up: ActorDied")
        assert gone([players[0], *interpreters])

        # It goes on: three more iterations, from whichever was told last.
        last = max(int(n) for n in re.findall(r"\[Iter (\d+)\]", job.output()))
        job.wait_for(f"[Iter {last + 3}]")
        everything = psutil.Process(job.process.pid).children(recursive=True)
        job.signal()
        result = job.finish(silent_stdout=False)
    assert result.status == 0, result.output
    assert "Stopped by a signal after iteration" in result.output
    assert result.output.count("is given up") == 1 and "Traceback" not in result.output
    assert gone(everything)

    rows = metrics(experiment(tmp_path))
    perf = [row for row in rows if row["namespace"] == "perf"]
    assert perf[-1]["worker_deaths"] == 1 and perf[-1]["workers"] == 2
    collected = [row for row in rows if row["namespace"] == "collect"]
    assert all(row["segments"] >= 3 for row in collected)
    names = {f"{r['namespace']}/{n}" for r in rows for n in r if n not in ("namespace", "step")}
    assert {"perf/worker_seconds_max", "collect/staleness_mean"} <= names
    patterns = documented_metrics()
    assert [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in patterns)] == []

    done = read_json(experiment(tmp_path) / "summary.json")["iterations"]
    for more, workers, told in ((2, 3, "0 of 3 episodes go on"), (4, 0, "0 of 3 episodes go on")):
        with Job(
            tmp_path,
            *WORKERS,
            f"--collector-workers={workers}",
            f"--iterations={done + more}",
            "--eval-freq=0",
            "--resume",
        ) as job:
            result = job.finish(silent_stdout=False)
        assert result.status == 0, result.output
        assert told in result.output
    rows = [row for row in metrics(experiment(tmp_path)) if row["namespace"] == "perf"]
    assert rows[-1]["episodes_lost"] == 6 and "workers" not in rows[-1]


async def test_workers_answer_with_the_llm_that_was_trained(tiny_llm, tmp_path, monkeypatch):
    """Adapters and all weights: what workers' engines say is what the learner's says, before and
    after training phases.
    """
    from priorzero.loop import stages
    from priorzero_orz_entry import build, config_from, parse_arguments

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for lora in ("true", "false"):
        arguments = ["--env-id=tw-simple", "--exp-name=llm", f"--llm={tiny_llm}", *SETTINGS]
        arguments += [*WORKERS, f"--set=llm.lora.enable={lora}", "--set=llm.sft.samples=4"]
        arguments += ["--set=llm.train.learning_rate=0.01", "--set=llm.score_cache_size=0"]
        arguments += ["--set=llm.dtype=float32", "--set=llm.lora.last_layers=1"]
        async with await build(config_from(parse_arguments(arguments), True)) as parts:
            said, probe = {}, None
            for version in range(3):
                result = await stages.collect(parts)
                asked = [
                    s for one in result.segments for s in one.steps if len(s.valid_actions) > 1
                ]
                fresh = [s for s in asked if s.scores.weights_version == version]
                assert len(fresh) >= 3, "the round was played with these weights"
                answers = await parts.llm.engine.score([s.request for s in fresh])
                for step, answer in zip(fresh, answers, strict=True):
                    np.testing.assert_allclose(
                        step.scores.totals(), answer.totals(), atol=1e-3, err_msg=f"{version}"
                    )
                probe = probe or asked[0].request
                said[version] = (await parts.llm.engine.score([probe]))[0].totals()

                assert (await stages.train_llm(parts))["sft_samples"] == 4
                await stages.train_world_model(parts, 2)
            moved = np.abs(np.subtract(said[0], said[2])).max()
            assert moved > 0.05, "training changes what the LLM says, or nothing was tested"
            assert parts.collector.totals().llm["states"] > 20
