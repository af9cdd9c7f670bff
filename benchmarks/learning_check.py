"""Learning check: PriorZero, pure UniZero, the LLM alone and random play over the same environment
steps.

    python -m benchmarks.learning_check --out results/learning_check --games tw-simple detective.z5
    --seeds 0 1 2 \\
        --iterations 100 --eval-freq 25 --debug --jobs 2 --threads 1

Two runs of the main job per game and seed: with the LLM, and without it (`--no-llm`, everything
else equal). What is compared is read from their evaluations:

* PriorZero: search with the LLM's prior; PriorZero, search without prior: the same network, its own
  policy at the root;
* UniZero: the run without an LLM;
* LLM alone: its favourite action, no search. At zero steps it is the LLM as published, later as
  trained by the run;
* random: uniformly drawn valid actions.

Runs are processes, `--jobs` at a time. `--minutes` bounds a run and `--total-minutes` everything:
SIGTERM lets a run finish its step, save and write its summary (it is not evaluated once more);
after `--grace` seconds it is killed, and its evaluations are read from its metrics file.
`--plot-only` makes tables and plot anew from what lies in `--out`.

Written to `--out`: runs.csv, summary.md, learning_curves.png, README.md (command, commit, machine),
command.json, and under runs/ settings and summary of each run (its checkpoints stay in `--work`, a
temporary folder by default).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, finish, say
from benchmarks.learning_report import collect_rows, write_report
from priorzero.run.provenance import find_commit, machine_facts

logger = logging.getLogger("priorzero.benchmarks.learning")

METHODS = ("priorzero", "unizero")
MODES = {"priorzero": ["world_model_llm", "world_model", "llm"], "unizero": ["world_model"]}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.learning_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for tables, plot and summaries"
    )
    parser.add_argument(
        "--work", type=Path, help="folder the runs write to; default: a temporary one"
    )
    parser.add_argument("--games", nargs="+", default=["tw-simple", "detective.z5"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--eval-freq", type=int, default=25)
    parser.add_argument("--episodes", type=int, default=5, help="evaluation episodes per mode")
    parser.add_argument("--debug", action="store_true", help="the debug overlay: small sizes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="GROUP.SETTING=VALUE",
        dest="assignments",
        help="for all runs alike; llm.* and the root prior reach only the runs with an LLM",
    )

    parser.add_argument("--llm", default="embedded")
    parser.add_argument(
        "--engine", choices=["auto", "vllm", "transformers"], default="transformers"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="cpu", help="of the world model"
    )
    parser.add_argument("--device-llm", choices=["auto", "cpu", "cuda"], default="auto")

    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of a run")
    parser.add_argument("--minutes", type=float, help="time of one run")
    parser.add_argument("--total-minutes", type=float, help="time of all runs, without the grace")
    parser.add_argument(
        "--grace", type=float, default=90.0, help="seconds between SIGTERM and SIGKILL"
    )
    parser.add_argument("--commit", help="commit of this copy where it is no git checkout")
    parser.add_argument("--plot-only", action="store_true")
    return parser.parse_args(arguments)


@dataclass
class Job:
    """One run: its command and, once started, its process."""

    game: str
    method: str
    seed: int
    folder: Path
    command: list[str]
    process: subprocess.Popen | None = None
    started: float = 0.0
    asked_to_stop: float | None = None

    @property
    def name(self) -> str:
        return self.folder.name


def plan(args: argparse.Namespace, work: Path) -> list[Job]:
    """Runs with an LLM first: they take longest."""
    jobs = []
    for method in args.methods:
        for seed in args.seeds:
            for game in args.games:
                folder = work / f"{_file_name(game)}_{method}_seed{seed}"
                command = entry_command(args, game, method, seed, folder)
                jobs.append(Job(game, method, seed, folder, command))
    return jobs


def _file_name(game: str) -> str:
    stem = Path(game).name.rsplit(".z", 1)[0]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem)


def entry_command(
    args: argparse.Namespace, game: str, method: str, seed: int, folder: Path
) -> list[str]:
    """The main job's command line for one run."""
    modes = list(MODES[method])
    if method == args.methods[-1]:  # random play is the same in either run
        modes.append("random")
    settings = [f"eval.modes={json.dumps(modes)}", f"env.n_evaluator_episode={args.episodes}"]
    command = [
        sys.executable,
        "-m",
        "priorzero_orz_entry",
        "--env-id",
        game,
        "--seed",
        str(seed),
        "--iterations",
        str(args.iterations),
        "--eval-freq",
        str(args.eval_freq),
        "--exp-name",
        str(folder.resolve()),
        "--device",
        args.device,
    ]
    if method == "unizero":
        command.append("--no-llm")
        # An overlay on the prior's mixture would contradict "no LLM"; the rest of the settings is
        # the same.
        settings += [
            a for a in args.assignments if not a.startswith(("llm.", "policy.root_prior."))
        ]
    else:
        command += ["--llm", args.llm, "--engine", args.engine]
        settings += [f"llm.device={args.device_llm}", *args.assignments]
    return command + [part for setting in settings for part in ("--set", setting)]


def start(job: Job, args: argparse.Namespace) -> None:
    """Start the run's process; its output goes to `output.txt` in its folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "DEBUG_MODE": str(args.debug)}
    with (job.folder / "output.txt").open("w", encoding="utf-8") as output:
        # A session of its own: a signal from the terminal reaches this process alone, which then
        # ends its runs itself.
        job.process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    job.started = time.monotonic()
    say(f"started  {job.name}")


def watch(job: Job, args: argparse.Namespace, deadline: float | None) -> bool:
    """Whether the run has ended; asks it to stop when its time is up, and kills it when it does
    not.
    """
    now = time.monotonic()
    status = job.process.poll()
    if status is not None:
        say(
            f"ended    {job.name} with status {status} after {(now - job.started) / 60:.1f} minutes"
        )
        return True

    limits = [job.started + 60 * args.minutes] if args.minutes else []
    limits += [deadline] if deadline else []
    if job.asked_to_stop is None and limits and now > min(limits):
        job.process.terminate()
        job.asked_to_stop = now
        say(f"stopping {job.name}: its time is up")
    elif job.asked_to_stop is not None and now > job.asked_to_stop + args.grace:
        logger.warning(
            "%s did not end within %.0f s of SIGTERM and is killed", job.name, args.grace
        )
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()
    return False


def run_all(jobs: list[Job], args: argparse.Namespace) -> list[str]:
    """Run the jobs, `--jobs` at a time. Returns the names of those that were never started or ended
    in error.
    """
    deadline = time.monotonic() + 60 * args.total_minutes if args.total_minutes else None
    waiting, running, ended = list(jobs), [], []
    try:
        while waiting or running:
            while (
                waiting
                and len(running) < args.jobs
                and (deadline is None or time.monotonic() < deadline)
            ):
                start(waiting[0], args)
                running.append(waiting.pop(0))
            for job in [j for j in running if watch(j, args, deadline)]:
                running.remove(job)
                ended.append(job)
                keep_results(job, args.out)
            if not running and deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.5)
    finally:
        for job in running:  # this process is being stopped: no run may outlive it
            logger.warning("%s is killed, because the check itself ends", job.name)
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
            keep_results(job, args.out)
    return [j.name for j in waiting] + [j.name for j in ended if j.process.returncode != 0]


def keep_results(job: Job, out: Path) -> None:
    """Copy what tables and plots are made from; checkpoints and TensorBoard files stay behind."""
    target = out / "runs" / job.name
    target.mkdir(parents=True, exist_ok=True)
    facts = {
        "game": job.game,
        "method": job.method,
        "seed": job.seed,
        "status": job.process.returncode,
        "minutes": round((time.monotonic() - job.started) / 60, 2),
    }
    (target / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    summary = (job.folder / "summary.json").is_file()
    for source in ("config.json", "summary.json" if summary else "log/metrics.jsonl"):
        if (job.folder / source).is_file():
            text = (job.folder / source).read_text(encoding="utf-8")
            # Results are kept in the repository: the temporary folder's path tells nobody anything.
            (target / Path(source).name).write_text(
                text.replace(str(job.folder.resolve()), job.name), encoding="utf-8"
            )
    if job.process.returncode != 0 and (job.folder / "output.txt").is_file():
        tail = (job.folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-4000:]
        (target / "output_end.txt").write_text(tail, encoding="utf-8")
        logger.error(
            "%s ended with status %s; its last lines:\n%s",
            job.name,
            job.process.returncode,
            tail[-800:],
        )


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    started, failed = time.time(), []
    if not args.plot_only:
        args.out.mkdir(parents=True, exist_ok=True)
        work = args.work or Path(tempfile.mkdtemp(prefix="priorzero-learning-"))
        # SIGTERM (a time limit outside) must pass through `finally`, or the runs would go on
        # without us.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            failed = run_all(plan(args, work), args)
        finally:
            facts: dict[str, Any] = {
                "command": "python -m benchmarks.learning_check " + shlex.join(arguments),
                "commit": find_commit(args.commit),
                "machine": machine_facts(),
                "minutes": round((time.time() - started) / 60, 1),
                "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
                "not_completed": failed,
            }
            (args.out / "command.json").write_text(
                json.dumps(facts, indent=1) + "\n", encoding="utf-8"
            )
            if args.work is None:
                shutil.rmtree(work, ignore_errors=True)
    rows = collect_rows(args.out)
    result = write_report(args.out, rows)
    finish(
        {
            "benchmark": "learning_check",
            "out": str(args.out),
            "not_completed": failed,
            "final": result,
        }
    )
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
