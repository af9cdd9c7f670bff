"""The main job on the real vLLM CPU engine: a killed engine comes back and the run completes; an
ended run leaves none.
"""

from __future__ import annotations

import importlib.util
import time

import psutil
import pytest

from tests.test_entry import EXPERIMENT, SETTINGS, Job, experiment, metrics, read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
ARGUMENTS = [
    "--env-id=tw-simple",
    f"--exp-name={EXPERIMENT}",
    "--llm=embedded",
    "--engine=vllm",
    "--eval-freq=0",
    "--llm-train-freq=2",
    *SETTINGS,
    "--set=llm.sft.samples=2",
    "--set=llm.vllm.kv_cache_gb=0.25",
    "--set=llm.vllm.max_model_len=1024",
]


def engines(job: Job) -> list[psutil.Process]:
    """The engine's processes: vLLM names them."""
    found = []
    for process in job.session():
        try:
            if process.name().startswith("VLLM") or "VLLM" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for_engine(job: Job, seconds: float = 240.0) -> list[psutil.Process]:
    job.wait_for("✓ Collected", seconds)
    running = engines(job)
    assert running, [p.cmdline() for p in job.session()]
    return running


def assert_ended(engines: list[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(p.is_running() for p in engines) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [p.pid for p in engines if p.is_running()]


def test_killed_engine_is_restarted_and_the_run_goes_on_until_it_is_stopped(tmp_path):
    """One run, because an engine's start takes most of a minute: its engine is killed, the next one
    is given the weights that were trained, and SIGTERM ends it with the run.
    """
    with Job(tmp_path, *ARGUMENTS, "--iterations=500", tiny=False) as job:
        for process in wait_for_engine(job):
            process.kill()
        job.wait_for("[Iter 4] Collecting data...", 400)
        running = engines(job)
        assert running
        job.signal()
        result = job.finish(240, silent_stdout=False)  # a killed vLLM tells its own story there
        assert_ended(running, 0)
    assert result.status == 0, result.output
    assert "restart 1 of 2" in result.output
    done = read_json(experiment(tmp_path) / "summary.json")["iterations"]
    assert f"Stopped by a signal after iteration {done}" in result.output and 4 <= done < 500

    rows = metrics(experiment(tmp_path))
    last = [r for r in rows if r["namespace"] == "perf"][-1]
    assert last["llm_engine_restarts"] == 1 and last["llm_engine_fallbacks"] == 0
    # The engine that came back was given the trained weights, and answers with them.
    trained = [r for r in rows if r["namespace"] == "llm"]
    assert len(trained) == done // 2 and trained[1]["push_version"] == 2
    assert all(row["push_canary_diff"] < 0.8 for row in trained)


def test_no_engine_outlives_a_killed_run(tmp_path):
    with Job(tmp_path, *ARGUMENTS, "--iterations=500", tiny=False) as job:
        running = wait_for_engine(job)
        job.process.kill()
        job.process.wait(30)
        assert_ended(running, 30)
