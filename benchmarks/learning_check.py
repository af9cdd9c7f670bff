"""Learning check: PriorZero, pure UniZero, the LLM alone and random play over the same environment
steps.

    python -m benchmarks.learning_check --out results/learning_check --games tw-simple detective.z5
    --seeds 0 1 2 \\
        --iterations 100 --eval-freq 25 --debug --jobs 2 --threads 1

A sweep (`priorzero.sweep`) of two variants: with the LLM, and without it (`--no-llm`, everything
else equal). What is compared is read from their evaluations:

* PriorZero: search with the LLM's prior; PriorZero, search without prior: the same network, its own
  policy at the root;
* UniZero: the run without an LLM;
* LLM alone: its favourite action, no search. At zero steps it is the LLM as published, later as
  trained by the run;
* random: uniformly drawn valid actions.

Started again, the check goes on where it was ended. `--minutes` bounds a run and `--total-minutes`
everything: SIGTERM lets a run finish its step, save and write its summary (it is not evaluated once
more); after `--grace` seconds it is killed. `--plot-only` makes tables and plot anew from what lies
in `--out`.

Written to `--out`: runs.csv, summary.md, learning_curves.png, README.md (command, commit, machine),
sweep.json, compare/ (interquartile means at equal steps and equal time), and under runs/ settings,
summary and metrics of each run. Checkpoints of finished runs are not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shlex
import sys
from pathlib import Path

from benchmarks.common import finish, quiet_logging
from benchmarks.learning_report import collect_rows, write_report
from priorzero.run.provenance import find_commit
from priorzero.settings.sweep import SweepSettings
from priorzero.sweep import sweep, write_comparison
from priorzero.sweeping.plan import sweep_from
from priorzero.sweeping.record import FINAL
from priorzero.types import PriorZeroError

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
        "--work", type=Path, help="folder the runs write to; default: OUT/work, empty at the end"
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
    parser.add_argument("--minutes", type=float, default=0.0, help="time of one run")
    parser.add_argument(
        "--total-minutes", type=float, default=0.0, help="time of all runs, without the grace"
    )
    parser.add_argument(
        "--grace", type=float, default=90.0, help="seconds between SIGTERM and SIGKILL"
    )
    parser.add_argument("--commit", help="commit of this copy where it is no git checkout")
    parser.add_argument("--plot-only", action="store_true")
    return parser.parse_args(arguments)


def sweep_settings(args: argparse.Namespace) -> SweepSettings:
    """The sweep that a command line asks for.

    Raises:
        PriorZeroError: an impossible value.
    """
    common = ["--iterations", args.iterations, "--eval-freq", args.eval_freq]
    common += ["--device", args.device, *(["--preset", "debug"] if args.debug else [])]
    common += _sets([f"env.n_evaluator_episode={args.episodes}"])
    values = {
        "games": args.games,
        "seeds": args.seeds,
        "arguments": [str(word) for word in common],
        "variants": {method: _variant(args, method) for method in args.methods},
        "checkpoints": False,
        "limits": {
            "minutes": args.minutes,
            "total_minutes": args.total_minutes,
            "grace_seconds": args.grace,
        },
        "resources": {"jobs": args.jobs, "threads": args.threads},
    }
    return sweep_from(values, "this learning check")


def _variant(args: argparse.Namespace, method: str) -> list[str]:
    """Options of the main job for a method's runs."""
    modes = list(MODES[method])
    if method == args.methods[-1]:  # random play is the same in either run
        modes.append("random")
    settings = [f"eval.modes={json.dumps(modes)}"]

    if method == "unizero":
        # An overlay on the prior's mixture would contradict "no LLM"; the rest of the settings is
        # the same.
        settings += [
            a for a in args.assignments if not a.startswith(("llm.", "policy.root_prior."))
        ]
        return ["--no-llm", *_sets(settings)]

    settings += [f"llm.device={args.device_llm}", *args.assignments]
    return ["--llm", args.llm, "--engine", args.engine, *_sets(settings)]


def _sets(assignments: list[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


async def run_check(args: argparse.Namespace, command: str) -> list[str]:
    """Run what is not done yet, and compare.

    Args:
        args: the command line.
        command: the same, for the record.

    Returns:
        names of the runs that are not done.
    """
    work = args.work or args.out / "work"
    done = await sweep(sweep_settings(args), args.out, work, command, find_commit(args.commit))
    write_comparison(args.out)
    return [run.name for run in done.runs if done.state(run) not in FINAL]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    quiet_logging()
    logging.getLogger("priorzero").setLevel(logging.INFO)

    command, unfinished = "python -m benchmarks.learning_check " + shlex.join(arguments), []
    try:
        if not args.plot_only:
            unfinished = asyncio.run(run_check(args, command))
        rows = collect_rows(args.out)
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2

    result = write_report(args.out, rows)
    finish(
        {
            "benchmark": "learning_check",
            "out": str(args.out),
            "not_completed": unfinished,
            "final": result,
        }
    )
    return 1 if unfinished or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
