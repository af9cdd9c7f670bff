"""Many runs of the main job from one small file: games x seeds x variants, compared at the end.

    python -m priorzero.sweep sweep.toml --out FOLDER --jobs 2

Runs are processes, several at a time. Started again, the command goes on: a run that is done is not
run again, an interrupted one continues from its checkpoint, a failed one is tried again. Of every
run, settings, summary, metrics and run.json (command, commit, seconds, state) are kept in
FOLDER/runs; FOLDER/compare holds tables and plots at equal steps and equal time. SIGINT or SIGTERM
lets the running ones save, and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from priorzero.run.cli import calm_openmp
from priorzero.run.logs import setup_logging
from priorzero.run.provenance import find_commit, machine_facts
from priorzero.say import say
from priorzero.settings.record import overlay
from priorzero.settings.sweep import SweepSettings
from priorzero.sweeping.plan import check_commands, planned_runs, read_sweep
from priorzero.sweeping.record import FINAL
from priorzero.sweeping.scheduler import Sweep
from priorzero.types import PriorZeroError

logger = logging.getLogger("priorzero.sweep")  # also where this module is started as __main__


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="the sweep, in TOML or JSON")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default: data_priorzero/sweeps/FILE'S NAME"
    )
    parser.add_argument(
        "--work", type=Path, help="folder of the runs and their checkpoints; default: OUT/work"
    )
    parser.add_argument("--plan", action="store_true", help="show the runs, and start none")

    # These stand before what the file says.
    parser.add_argument("--jobs", type=int, help="runs at a time; 0: as many as there are cores")
    parser.add_argument("--threads", type=int, help="threads of a run")
    parser.add_argument("--memory-gb", type=float, help="GiB that a run comes to hold")
    parser.add_argument("--minutes", type=float, help="of one run; then it saves and is done")
    parser.add_argument("--total-minutes", type=float, help="of the sweep; then runs save")
    parser.add_argument("--commit", help="commit of this copy where it is no git checkout")
    return parser.parse_args(arguments)


def settings_from(args: argparse.Namespace) -> SweepSettings:
    """The file, with the command line laid over it.

    Raises:
        PriorZeroError: an unknown or impossible value.
    """
    given = {
        "resources": {n: getattr(args, n) for n in ("jobs", "threads", "memory_gb")},
        "limits": {n: getattr(args, n) for n in ("minutes", "total_minutes")},
    }
    layer = {
        group: {name: value for name, value in values.items() if value is not None}
        for group, values in given.items()
    }
    settings = overlay(read_sweep(args.file), layer)
    settings.validate()
    return settings


async def sweep(settings: SweepSettings, out: Path, work: Path, command: str, commit: str) -> Sweep:
    """Run a sweep as far as it gets, and write `out`/sweep.json about it.

    Args:
        settings: of the sweep.
        out, work: folders of the results and of the runs.
        command: as it was given, for sweep.json.
        commit: of this copy.

    Raises:
        PriorZeroError: the main job refuses a run, or the folder is another sweep's.
    """
    runs = planned_runs(settings)
    check_commands(runs)

    started, under_way = time.time(), Sweep(settings, runs, out, work, commit)
    await under_way.run()

    states = {run.name: under_way.state(run) for run in runs}
    facts: dict[str, Any] = {
        "command": command,
        "commit": commit,
        "machine": machine_facts(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "minutes": round((time.time() - started) / 60, 1),
        "runs": states,
        "settings": settings.as_dict(),
    }
    (out / "sweep.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    told = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
    logger.info("Runs: %s", told)
    return under_way


def write_comparison(out: Path) -> None:
    """Tables and plots of the runs that are kept in `out`, at equal steps and at equal time."""
    from priorzero.comparison.figures import compare
    from priorzero.comparison.page import write_files
    from priorzero.comparison.runs import group_runs, read_runs

    kept = [path.parent for path in sorted((out / "runs").glob("*/config.json"))]
    # As the reader would name them; no path of this machine where the results go elsewhere.
    folders = [Path(os.path.relpath(folder)) for folder in kept]
    try:
        games = group_runs(read_runs(folders))
        report = compare(games)
    except PriorZeroError as error:
        logger.warning("there is nothing to compare: %s", error)
        return
    command = f"python -m priorzero.compare {Path(os.path.relpath(out)) / 'runs'}/*"
    write_files(out / "compare", {"command": command} | report, games)
    logger.info("The comparison is %s", out / "compare" / "README.md")


async def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        the exit status: 0 where every run is done, 1 where one is not, 2 for a fault the user can
        mend.
    """
    calm_openmp()
    setup_logging(None)
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)

    try:
        settings = settings_from(args)
        if args.plan:
            return _show_plan(settings)
        out = args.out or Path("data_priorzero", "sweeps", args.file.stem)
        done = await sweep(
            settings,
            out,
            args.work or out / "work",
            "python -m priorzero.sweep " + shlex.join(arguments),
            find_commit(args.commit),
        )
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2

    write_comparison(out)
    return 0 if all(done.state(run) in FINAL for run in done.runs) else 1


def _show_plan(settings: SweepSettings) -> int:
    runs = planned_runs(settings)
    check_commands(runs)
    for run in runs:
        say(f"{run.name}: {shlex.join(['python', *run.command(run.name)])}\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
