"""Ray's processes beside a run's own; skipped where Ray is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from priorzero.orz import orz_status
from priorzero.ray_link import ray_missing
from tests.test_entry import Job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ray_missing()), reason=ray_missing()),
    pytest.mark.timeout(300),
]
ROOT = Path(__file__).resolve().parents[1]

# A run: a signal asks it to stop, and it asks a worker for something on its way out.
RUN = """
import signal, threading
from priorzero.ray_link import connect, disconnect, keep_signals, worker_logs

asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())
connect("", cpus=1, gpus=0)
keep_signals()
import ray

print(worker_logs(), flush=True)
assert asked.wait(120)
answer = ray.remote(lambda: "saved").remote()
print(ray.get(answer, timeout=60), flush=True)
disconnect()
"""


def test_two_runs_have_a_cluster_each_which_outlives_a_signal_to_its_group():
    """As timeout(1) sends it; and each cluster ends with its own run."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        sessions = [run.stdout.readline().partition("/")[0] for run in started]
        assert all(processes_of(session) for session in sessions)
        assert sessions[0] != sessions[1]

        for run, session in zip(started, sessions, strict=True):
            os.killpg(run.pid, signal.SIGTERM)
            assert run.communicate(timeout=120)[0].strip() == "saved"
            assert run.returncode == 0
            assert not processes_of(session)
    finally:
        for run in started:
            run.kill()
            run.communicate()


@pytest.mark.skipif(not orz_status()[0], reason=f"Open-Reasoner-Zero: {orz_status()[1]}")
def test_a_run_with_orz_saves_when_its_group_is_asked_to_stop(tmp_path, tiny_llm):
    """The optimiser's moments too, which are with Ray's workers; and nothing is left behind."""
    with Job(
        tmp_path,
        "--env-id=tw-simple",
        "--exp-name=run",
        "--use-orz-trainer",
        f"--llm={tiny_llm}",
        "--engine=transformers",
        "--iterations=1000",
        "--llm-train-freq=1",
        "--eval-freq=0",
        "--set=llm.rft.samples=4",
        tiny=False,
    ) as job:
        job.wait_for("llm_rft_policy_loss")
        os.killpg(job.process.pid, signal.SIGTERM)
        ended = job.finish(silent_stdout=False)  # DeepSpeed writes there
    assert ended.status == 0 and "SIGTERM received" not in ended.output
    assert "continue with --resume" in ended.output
    (saved,) = (tmp_path / "data_priorzero" / "run" / "ckpt").glob("iter_*/llm.pt")
    assert torch.load(saved, weights_only=True)["optimizer"]["state"]


def processes_of(session: str) -> list[str]:
    """Command lines that name a cluster's session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        found += [line] if session in line else []
    return found
