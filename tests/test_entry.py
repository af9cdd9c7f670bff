"""The main job from the command line, with real parts in tiny sizes: what it writes, how it ends,
what it leaves behind.

Runs are processes in a session of their own, so that everything they start can be found and must be
gone afterwards.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    env=dict(max_steps=8, collector_env_num=2, evaluator_env_num=1, n_evaluator_episode=1),
    policy=dict(
        device="cpu",
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        group_size=8,
        support_scale=10,
        num_simulations=2,
        game_segment_length=5,
        num_segments=2,
        batch_size=4,
        replay_ratio=0.2,
    ),
)
SETTINGS = [
    f"--set={group}.{name}={json.dumps(value)}"
    for group, values in TINY.items()
    for name, value in values.items()
]
EXPERIMENT = "tiny"
BASE = ["--env-id=tw-simple", f"--exp-name={EXPERIMENT}", "--no-llm", *SETTINGS]


def environment() -> dict[str, str]:
    """Of a command."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DEBUG_MODE": "True"}
    return {**os.environ, **ours}


@dataclass
class Finished:
    status: int
    output: str  # standard error: all a run says

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


class Job:
    """A running command; `with` ends it whatever happens."""

    def __init__(self, cwd: Path, *arguments: str, tiny: bool = True) -> None:
        self.cwd = cwd
        self._log = cwd / f"stderr-{time.monotonic_ns()}"
        base = BASE if tiny else []
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "priorzero_orz_entry", *base, *arguments],
                cwd=cwd,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        for process in self.session():
            process.kill()
        self.process.wait()
        self.process.stdout.close()

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def session(self) -> list[psutil.Process]:
        """Every living process that the command started, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    os.getsid(process.pid) == self.process.pid
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):  # ended while we looked
                continue
        return found

    def wait_for(self, text: str, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.output()}"
            assert time.monotonic() < deadline, (
                f"no {text!r} within {seconds:g} s:\n{self.output()}"
            )
            time.sleep(0.02)

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def finish(self, seconds: float = 240.0, silent_stdout: bool = True) -> Finished:
        """Wait for the end; nothing the run started may outlive it (an orphan notices within two
        seconds).
        """
        status = self.process.wait(timeout=seconds)
        deadline = time.monotonic() + 10
        while (left := self.session()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"left behind: {[p.cmdline() for p in left]}"
        written = self.process.stdout.read()
        assert not (silent_stdout and written), written
        return Finished(status, self.output())


def run(cwd: Path, *arguments: str, tiny: bool = True) -> Finished:
    with Job(cwd, *arguments, tiny=tiny) as job:
        return job.finish()


def experiment(cwd: Path) -> Path:
    return cwd / "data_priorzero" / EXPERIMENT


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Finished]:
    """A run of two iterations; tests read it, or work on a copy."""
    cwd = tmp_path_factory.mktemp("finished")
    result = run(cwd, "--iterations=2", "--eval-freq=1", "--save-freq=1")
    assert result.status == 0, result.output
    return cwd, result


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(experiment(finished[0]), experiment(tmp_path))
    return tmp_path


def test_log_can_be_followed(finished):
    lines = finished[1].lines
    text = finished[1].output
    assert "Debug mode:      True" in lines and "LLM:             none (pure UniZero)" in lines
    for one in (
        "[Iter 0] Collecting data...",
        "[Iter 1] Collecting data...",
        "[Eval 0] world_model",
        "[Eval 2] world_model",
    ):
        assert text.count(one) == 1, text
    assert [
        line for line in lines if line.startswith("✓ Collected 2 segments (total: 4 segments, ")
    ]
    assert text.count("✓ WM training done - wm_loss: ") == 2
    assert not [
        line for line in lines if "Warning" in line or "Traceback" in line or "Gym has been" in line
    ], text


def test_run_writes_its_files(finished):
    folder = experiment(finished[0])
    summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
    assert summary["iterations"] == 2 and summary["game"] == "tw-simple" and summary["seed"] == 0
    assert [e["iteration"] for e in summary["evaluations"]] == [0, 1, 2]
    assert (
        config["settings"]["policy"]["num_simulations"] == 2
        and config["schedule"]["iterations"] == 2
    )
    # The run's own count of environment steps is what its collect metrics add up to, unfinished
    # segments aside.
    played = sum(r["transitions"] for r in metrics(folder) if r["namespace"] == "collect")
    assert played <= summary["env_steps"] < played + 2 * 5
    transcripts = list((folder / "transcripts").glob("iter000000_world_model_0_return*.txt"))
    assert len(transcripts) == 1
    text = transcripts[0].read_text(encoding="utf-8")
    assert (
        text.startswith("[tw-simple, episode seed ")
        and text.count("\n> ") <= 8
        and "[truncated, score" in text
    )


def test_a_run_leaves_a_page(finished):
    """Of its last evaluation too, so it is made of closed files."""
    page = experiment(finished[0]) / "decisions.html"
    assert f"✓ Wrote {page.relative_to(finished[0])}" in finished[1].output
    summary = re.search(r'id="data-summary">([^<]*)<', page.read_text(encoding="utf-8"))[1]
    [shown] = json.loads(zlib.decompress(base64.b64decode(summary)))["runs"]
    assert [e["name"] for e in shown["episodes"] if e["mode"] != "collect"] == [
        f"iter00000{n}/world_model/0" for n in range(3)
    ]
    assert shown["curves"]["wm/wm_loss"] and shown["llm"] == "none (pure UniZero)"


def test_checkpoint_holds_the_run(finished):
    import torch

    folder = experiment(finished[0]) / "ckpt"
    pointers = ("latest", "previous", "best")
    names = {p: (folder / p).read_text(encoding="utf-8") for p in pointers}
    assert names["latest"] == "iter_00000002" and names["previous"] == "iter_00000001"
    assert {p.name for p in folder.iterdir()} == {*pointers, *names.values()}
    state = torch.load(folder / names["latest"] / "state.pt", weights_only=True)
    summary = read_json(experiment(finished[0]) / "summary.json")
    progress = state["progress"]
    assert progress["iteration"] == 2 and progress["env_steps"] == summary["env_steps"]
    # Counted by the learner's optimiser too, which knows nothing of the progress record.
    updates = sum(r["updates"] for r in metrics(experiment(finished[0])) if r["namespace"] == "wm")
    assert progress["updates"] == updates > 0
    assert {"model", "target_model", "optimizer_world_model", "vocabulary"} <= set(state["policy"])


def test_tensorboard_has_what_the_metrics_file_has(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = experiment(finished[0])
    events = EventAccumulator(str(folder / "log"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    written = {
        f"{r['namespace']}/{name}"
        for r in metrics(folder)
        for name in r
        if name not in ("namespace", "step")
    }
    assert set(events.Tags()["scalars"]) == written
    assert {
        "collect/segments",
        "wm/wm_loss",
        "eval/world_model/return_mean",
        "prior/entropy",
        "perf/env_steps_per_second",
    } <= written
    assert any("config" in tag for tag in events.Tags()["tensors"])
    losses = [(r["step"], r["wm_loss"]) for r in metrics(folder) if r["namespace"] == "wm"]
    assert [
        (e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars("wm/wm_loss")
    ] == losses


def test_sigterm_saves_and_resume_goes_on(tmp_path):
    with Job(tmp_path, "--iterations=1000", "--eval-freq=0") as job:
        job.wait_for("[Iter 1] Collecting data...")
        assert len(job.session()) > 1, (
            "no interpreter process: the check for leftovers would prove nothing"
        )
        job.signal()
        stopped = job.finish()
    assert stopped.status == 0, stopped.output
    assert "SIGTERM: finishing the present step, then saving and closing" in stopped.lines
    summary = read_json(experiment(tmp_path) / "summary.json")
    done, steps = summary["iterations"], summary["env_steps"]
    assert (
        f"Stopped by a signal after iteration {done}; continue with --resume" in stopped.lines
        and 2 <= done < 1000
    )
    assert (experiment(tmp_path) / "ckpt" / "latest").read_text(
        encoding="utf-8"
    ) == f"iter_{done:08d}"

    held = sum(r["transitions"] for r in metrics(experiment(tmp_path)) if "transitions" in r)
    resumed = run(tmp_path, f"--iterations={done + 1}", "--eval-freq=0", "--resume")
    assert resumed.status == 0, resumed.output
    assert (
        f"[Iter {done}] Collecting data..." in resumed.lines
        and f"[Iter {done - 1}]" not in resumed.output
    )
    assert (
        f"Resumed tw-simple at iteration {done}, {steps} environment steps; the replay buffer "
        f"holds {held:.0f} transitions, 2 of 2 episodes go on" in resumed.lines
    )
    after = read_json(experiment(tmp_path) / "summary.json")
    assert after["iterations"] == done + 1 and after["env_steps"] > steps
    assert after["first_losses"] == summary["first_losses"]
    collected = [r["step"] for r in metrics(experiment(tmp_path)) if r["namespace"] == "collect"]
    assert (
        len(collected) == done + 1
        and collected == sorted(collected)
        and collected[-1] == after["env_steps"]
    )


def test_second_sigterm_ends_at_once_and_leaves_nothing_running(tmp_path):
    with Job(
        tmp_path,
        "--iterations=1000",
        "--eval-freq=0",
        "--set=env.max_steps=400",
        "--set=policy.game_segment_length=400",
    ) as job:  # one iteration takes far longer than the wait below
        job.wait_for("[Iter 0] Collecting data...")
        job.signal()
        job.signal()  # a supervisor's echo of the first request, not a second one
        job.wait_for("SIGTERM: finishing")
        time.sleep(1.2)
        assert job.process.poll() is None
        job.signal()
        ended = job.finish(seconds=10)
    assert ended.status == -signal.SIGTERM
    assert "second SIGTERM: stopping at once; the last checkpoint stands" in ended.lines
    assert (
        not (experiment(tmp_path) / "ckpt").exists()
        and not (experiment(tmp_path) / "summary.json").exists()
    )


def test_eval_only_plays_and_changes_nothing_of_the_training_run(copied):
    before = files(experiment(copied))
    result = run(
        copied,
        "--eval-only",
        "--set=env.n_evaluator_episode=2",
        '--set=eval.modes=["world_model","random"]',
    )
    assert result.status == 0, result.output
    assert "[Eval 2] world_model" in result.output and "[Eval 2] random" in result.output
    assert "Collecting data" not in result.output
    evaluation = read_json(experiment(copied) / "evaluation.json")["evaluations"]
    assert len(evaluation) == 1 and len(evaluation[0]["random"]["returns"]) == 2
    after = files(experiment(copied))
    kept = [
        name
        for name in before
        if name in ("config.json", "summary.json") or name.startswith("ckpt")
    ]
    assert len(kept) >= 6 and {n: after[n] for n in kept} == {n: before[n] for n in kept}
    assert {n for n in after if n.startswith("ckpt")} == {n for n in before if n.startswith("ckpt")}


def test_damaged_checkpoints_are_passed_over_or_named_and_left_alone(copied):
    store = experiment(copied) / "ckpt"
    damaged = {
        pointer: store / (store / pointer).read_text(encoding="utf-8") / "state.pt"
        for pointer in ("latest", "previous")
    }
    kept = damaged["previous"].read_bytes()
    for path in damaged.values():
        path.write_bytes(path.read_bytes()[:1000])
    before = files(store)
    result = run(copied, "--iterations=3", "--resume")
    assert_one_error(
        result,
        "is damaged",
        str(damaged["latest"].parent.relative_to(copied)),
        str(damaged["previous"].parent.relative_to(copied)),
        "--checkpoint",
        "without --resume",
    )
    assert files(store) == before

    damaged["previous"].write_bytes(kept)
    result = run(copied, "--iterations=2", "--resume", "--eval-freq=0")
    assert result.status == 0, result.output
    assert "iter_00000002 is damaged" in result.output
    assert "the one before takes its place: iter_00000001" in result.output
    assert "Resumed tw-simple at iteration 1, " in result.output
    assert (store / "previous").read_text() == "iter_00000001"
    assert (store / "latest").read_text() == "iter_00000002_2"


@pytest.fixture
def refused(monkeypatch, caplog):
    """`await refused(cwd, *arguments)`: the same command in this process, without the seconds that
    a new one takes to import everything; for commands that are refused.
    """
    import priorzero_orz_entry

    async def command(cwd: Path, *arguments: str, tiny: bool = True) -> Finished:
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("DEBUG_MODE", "True")
        monkeypatch.setattr(priorzero_orz_entry, "setup_logging", lambda *_: None)
        with caplog.at_level(logging.INFO):
            status = await priorzero_orz_entry.main([*(BASE if tiny else []), *arguments])
        return Finished(status, "\n".join(caplog.messages))

    return command


async def test_checkpoint_of_another_network_is_refused_and_its_settings_stay(copied, refused):
    before = files(experiment(copied) / "ckpt"), (experiment(copied) / "config.json").read_bytes()
    result = await refused(copied, "--iterations=3", "--resume", "--set=policy.embed_dim=64")
    assert_one_error(
        result, "does not fit these settings (for example: size mismatch", "config.json"
    )
    assert (
        files(experiment(copied) / "ckpt"),
        (experiment(copied) / "config.json").read_bytes(),
    ) == before


def test_a_used_name_sets_the_earlier_run_aside(tmp_path, caplog):
    from priorzero.run.experiment import set_aside

    folder = tmp_path / "game_seed0"
    assert set_aside(folder) is None
    for number in (1, 2):
        (folder / "ckpt").mkdir(parents=True)
        (folder / "ckpt" / "latest").write_text(f"iter_{number}")
        aside = set_aside(folder)
        assert aside == tmp_path / f"game_seed0.old-{number}" and not folder.exists()
        assert (aside / "ckpt" / "latest").read_text() == f"iter_{number}"
    (folder / "log").mkdir(parents=True)  # a run that never saved has nothing to lose
    assert set_aside(folder) is None and folder.exists()


def assert_one_error(result: Finished, *parts: str) -> None:
    """Exit 2, one message at the end of standard error that says `parts`, no traceback."""
    assert result.status == 2, result.output
    assert "Traceback" not in result.output
    errors = [i for i, line in enumerate(result.lines) if line.startswith("Error: ")]
    assert len(errors) == 1, result.output
    message = "\n".join(result.lines[errors[0] :])
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--env-id=nosuch"], ["'nosuch' is unknown", "tw-simple", "PRIORZERO_GAMES"]),
        (["--env-id=missing.z5"], ["'missing.z5' is unknown", "no such story file", "To get more"]),
        (["--env-id=tw-coin:level=0"], ["level=0 is not allowed", "1 to 300"]),
        (
            ["--set=policy.num_simulations=0", "--set=policy.discount_factor=2"],
            ["num_simulations is 0", "discount_factor is 2", "(0, 1]"],
        ),
        (["--set=policy.num_simulations=null"], ["'policy.num_simulations' is None", "like 50"]),
        (
            ["--set=policy.simulations=5"],
            ["'policy.simulations' does not exist", "did you mean num_simulations"],
        ),
        (["--set=eval.modes=[[1]]"], ["'eval.modes' is [[1]]", "world_model_llm"]),
        (["--set=env.games_dir=3"], ["'env.games_dir' is 3", "str or None"]),
        (["--set=nothing"], ["'nothing' is not of the form group.setting=value"]),
        (["--llm-train-freq=0"], ["llm_train_freq is 0", ">= 1"]),
    ],
    ids=lambda value: value[0].split("=", 1)[-1] if value[0].startswith("--") else "",
)
async def test_what_the_user_can_mend_is_one_error(tmp_path, arguments, parts, refused):
    (tmp_path / "data_priorzero").mkdir()
    kept = tmp_path / "data_priorzero" / "kept.txt"
    kept.write_text("here before")
    assert_one_error(await refused(tmp_path, *arguments, tiny=False), *parts)
    assert kept.read_text() == "here before"


def test_unknown_choice_is_refused_with_the_choices(tmp_path):
    result = run(tmp_path, "--device=tpu", tiny=False)
    assert result.status == 2 and "Traceback" not in result.output
    assert "argument --device: invalid choice: 'tpu' (choose from" in result.lines[-1]
    assert not (tmp_path / "data_priorzero").exists()


async def test_subclass_in_process(tmp_path, monkeypatch):
    """The documented way to change a schedule: subclass, overwrite attributes, pass it to the
    entry.
    """
    from priorzero_config import HybridTrainingConfig
    from priorzero_orz_entry import train_priorzero_orz

    class Mine(HybridTrainingConfig):
        wm_train_freq = 2
        iterations = 2
        eval_freq = 0

    monkeypatch.chdir(tmp_path)
    children = set(psutil.Process().children(recursive=True))
    config = Mine(
        env_id="tw-simple", exp_name=EXPERIMENT, enable_llm=False, debug_mode=True, overrides=TINY
    )
    config.priorzero_cfg.policy.num_segments = 1
    summary = await train_priorzero_orz(config)
    assert summary["iterations"] == 2 and summary["evaluations"] == []
    rows = metrics(experiment(tmp_path))
    assert sum(r["namespace"] == "wm" for r in rows) == 1
    assert [r["segments"] for r in rows if r["namespace"] == "collect"][0] in (
        1.0,
        2.0,
    )  # both may fill in one step
    # The process that forks interpreters stays for the next run in this process; the interpreters
    # are gone.
    left = set(psutil.Process().children(recursive=True)) - children
    assert len(left) <= 1 and not [p for p in left if p.children()]


def tiny_config(**settings):
    from priorzero_config import HybridTrainingConfig

    return HybridTrainingConfig(
        env_id="tw-simple",
        exp_name=EXPERIMENT,
        enable_llm=False,
        debug_mode=True,
        overrides=TINY,
        **settings,
    )


async def test_more_records_than_the_page_may_have_leave_none(tmp_path, monkeypatch, caplog):
    from priorzero_orz_entry import train_priorzero_orz

    monkeypatch.chdir(tmp_path)
    config = tiny_config(iterations=1, eval_freq=1)
    config.priorzero_cfg.decisions.page_mib = 0
    with caplog.at_level("INFO", "priorzero_orz_entry"):
        await train_priorzero_orz(config)
    folder = experiment(tmp_path)
    assert any((folder / "decisions").iterdir()) and not (folder / "decisions.html").exists()
    assert f"python -m priorzero.view {folder.relative_to(tmp_path)} makes it" in caplog.text


async def test_one_part_that_does_not_close_keeps_no_other_open(tmp_path, monkeypatch, caplog):
    from priorzero_orz_entry import build

    monkeypatch.chdir(tmp_path)
    children = set(psutil.Process().children(recursive=True))
    parts = await build(tiny_config())
    await parts.collector.collect(1, 0, 1.0)
    closed = []
    for name in ("metrics", "collect_envs"):
        part = getattr(parts, name)
        real = part.close
        monkeypatch.setattr(part, "close", lambda n=name, r=real: closed.append(n) or r())

    def jammed():
        raise OSError("jammed")

    # Of the evaluator's environments, which are the newest: the first to be closed.
    monkeypatch.setattr("priorzero.games.group.GameEnvGroup.close", lambda self: jammed())
    await parts.close()
    assert closed == ["collect_envs", "metrics"]  # newest first
    assert "closing GameEnvGroup failed; the rest is closed all the same" in caplog.text
    left = set(psutil.Process().children(recursive=True)) - children
    assert not [p for p in left if p.children()]


async def test_a_build_that_fails_closes_what_it_opened(tmp_path, monkeypatch):
    import priorzero_evaluator
    from priorzero_orz_entry import build

    closed = []
    for path in ("priorzero.run.metrics.MetricsWriter", "priorzero.games.group.GameEnvGroup"):
        name = path.rpartition(".")[2]
        monkeypatch.setattr(f"{path}.close", lambda self, n=name: closed.append(n))

    def broken(*_, **__):
        raise RuntimeError("no evaluator today")

    monkeypatch.setattr(priorzero_evaluator, "PriorZeroEvaluator", broken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="no evaluator today"):
        await build(tiny_config())
    assert closed == ["GameEnvGroup", "GameEnvGroup", "MetricsWriter"]


def test_the_entry_is_light_to_import():
    """Processes that vLLM starts import the main module again: none of them may load torch for
    that.
    """
    code = "import sys, priorzero_orz_entry; print('torch' in sys.modules, 'ding' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_real_llm_enters_the_search_and_learns_from_it(tmp_path):
    result = run(
        tmp_path,
        "--env-id=tw-simple",
        f"--exp-name={EXPERIMENT}",
        "--llm=embedded",
        "--engine=transformers",
        "--iterations=1",
        "--eval-freq=1",
        "--llm-train-freq=1",
        *SETTINGS,
        "--set=llm.sft.samples=2",
        "--set=llm.lora.enable=false",
        '--set=eval.modes=["llm"]',
        "--set=env.max_steps=3",
        tiny=False,
    )
    assert result.status == 0, result.output
    assert "LLM:             SmolLM2-135M-Instruct on transformers" in result.lines
    folder = experiment(tmp_path)
    rows = {
        name: [r for r in metrics(folder) if r["namespace"] == name]
        for name in ("prior", "llm", "eval")
    }
    assert rows["prior"][0]["kl_from_wm"] > 0 and rows["prior"][0]["weight"] == 0.5
    assert rows["llm"][0]["sft_loss"] > 0 and rows["llm"][0]["push_canary_diff"] < 0.8
    assert len(rows["eval"]) == 2
    assert (folder / "ckpt" / "iter_00000001" / "llm.pt").stat().st_size > 135e6 * 4
