"""Runs against runs: a table over groups of seeds, at equal environment steps and at equal time.

    python -m priorzero.compare data_priorzero/RUN... --out FOLDER

Reads what runs leave in their folders (config.json, summary.json, log/metrics.jsonl). Runs that
differ only in the seed are one group, and games are told apart. The page goes to stdout; with
--out it, compare.json, runs.csv and a picture go into a folder.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

from priorzero.comparison.figures import compare
from priorzero.comparison.page import page, write_files
from priorzero.comparison.runs import group_runs, read_runs
from priorzero.run.logs import setup_logging
from priorzero.say import say
from priorzero.settings.record import require
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of an experiment")
    parser.add_argument(
        "--metric",
        help="namespace/name as in docs/METRICS.md, such as eval/world_model_llm/return_mean; "
        "default: the mean return of the mode that judges a run's checkpoints",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="environment steps to compare at; default: those that every run of a game reached",
    )
    parser.add_argument("--minutes", type=float, help="time to compare at; default: as --steps")
    parser.add_argument(
        "--out", type=Path, help="folder for the page, compare.json, runs.csv, picture"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0, or 2 for a fault the user can mend.
    """
    setup_logging(None)
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)

    try:
        require(
            {
                f"--{name}": (value, value is None or value >= 0, "it must not be negative")
                for name, value in (("steps", args.steps), ("minutes", args.minutes))
            }
        )
        games = group_runs(read_runs(args.runs, args.metric))
        report = compare(games, args.steps, args.minutes)
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2

    report = {"command": "python -m priorzero.compare " + shlex.join(arguments)} | report
    if args.out is not None:
        write_files(args.out, report, games)
    say(page(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
