"""How good is an LLM's prior on text adventures, before anything is trained with it?

    python -m priorzero.prior_report --llm embedded --games tw-simple detective.z5 --out FOLDER

Walks each game's walkthrough and looks where the LLM ranks the right command among the valid ones,
under several prompts, reductions and temperatures; then lets the LLM play alone, against uniform
play. Writes report.json, table.md, README.md and pictures into the folder. Nothing is trained.

Best settings are never chosen on the games that results are judged on (`priorzero.games.judging`);
where these are among the games, the report marks them.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from priorzero.evidence.metrics import REDUCTIONS
from priorzero.evidence.variants import VARIANTS
from priorzero.run.cli import calm_openmp
from priorzero.run.logs import setup_logging
from priorzero.say import say
from priorzero.settings.llm import PromptSettings
from priorzero.settings.record import require
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.evidence.measure import Plan

logger = logging.getLogger(__name__)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    prompt = PromptSettings()
    quick = [name for name, changes in VARIANTS.items() if not changes["use_cot"]]

    parser = argparse.ArgumentParser(
        prog="python -m priorzero.prior_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--llm", nargs="+", default=["auto"], help="auto, embedded, hub names or folders"
    )
    parser.add_argument("--games", nargs="+", required=True, help="as --env-id of the main command")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument(
        "--steps", type=int, default=0, help="walkthrough commands per game; 0: all"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=quick, help="prompts to score"
    )
    parser.add_argument(
        "--temperatures",
        nargs="+",
        type=float,
        default=[0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0],
        help="of the softmax over a state's commands; 1 must be among them",
    )
    parser.add_argument(
        "--history-length",
        type=int,
        default=prompt.history_length,
        help="past steps in prompts with history",
    )
    parser.add_argument("--max-prompt-tokens", type=int, default=prompt.max_prompt_tokens)
    parser.add_argument(
        "--episodes", type=int, default=4, help="episodes per player; 0: nothing is played"
    )
    parser.add_argument("--play-steps", type=int, default=50, help="commands per episode")
    parser.add_argument(
        "--play-reductions",
        nargs="+",
        choices=REDUCTIONS,
        default=["sum", "mean"],
        help="of the LLM's players",
    )
    parser.add_argument(
        "--run", type=Path, help="an experiment: what its search makes of its prior, on its game"
    )
    parser.add_argument(
        "--checkpoint", default="latest", help="of --run: latest, best or a folder's name"
    )
    parser.add_argument("--engine", choices=["auto", "vllm", "transformers"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of episodes and draws")
    parser.add_argument("--commit", help="commit of this copy where it is no git checkout")
    return parser.parse_args(arguments)


def plan_from(args: argparse.Namespace) -> Plan:
    """What a command line asks for.

    Raises:
        PriorZeroError: an impossible value; names all of them.
    """
    from priorzero.evidence.measure import Plan

    require(
        {
            "--steps": (args.steps, args.steps >= 0, "it must not be negative"),
            "--episodes": (args.episodes, args.episodes >= 0, "it must not be negative"),
            "--play-steps": (args.play_steps, args.play_steps > 0, "it must be positive"),
            "--seed": (args.seed, args.seed >= 0, "it must not be negative"),
            "--history-length": (
                args.history_length,
                args.history_length > 0,
                "it must be positive; variants without history are measured too",
            ),
            "--temperatures": (
                args.temperatures,
                1.0 in args.temperatures and min(args.temperatures) > 0,
                "they must be positive, with 1 among them, where the page compares",
            ),
        }
    )
    prompt = PromptSettings(
        history_length=args.history_length, max_prompt_tokens=args.max_prompt_tokens
    )
    prompt.validate()
    return Plan(
        llms=_once(args.llm),
        games=_once(args.games),
        steps=args.steps,
        variants=_once(args.variants),
        temperatures=_once(args.temperatures),
        prompt=prompt,
        episodes=args.episodes,
        play_steps=args.play_steps,
        play_reductions=_once(args.play_reductions),
        engine=args.engine,
        device=args.device,
        seed=args.seed,
        run=args.run,
        checkpoint=args.checkpoint,
    )


def _once(values: list) -> tuple:
    """The values without repetitions, in their order."""
    return tuple(dict.fromkeys(values))


async def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        the exit status: 0, or 2 for a fault the user can mend.
    """
    calm_openmp()
    setup_logging(None)
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)

    # These load torch, which should not delay --help or a wrong option.
    from priorzero.evidence.measure import measure
    from priorzero.evidence.page import page, write_report
    from priorzero.run.provenance import find_commit, machine_facts

    started, commit = time.time(), find_commit(args.commit)  # of the code that is loaded now
    try:
        report = await measure(plan_from(args))
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2

    source = {
        "command": "python -m priorzero.prior_report " + shlex.join(arguments),
        "commit": commit,
        "machine": machine_facts(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "minutes": (time.time() - started) / 60,
    }
    write_report(args.out, source | report)
    say(page(source | report))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
