"""What a warm-up brings on games it has not seen: the prior report before and after, with the whole
family of the game that is judged left out of the training.

    python -m benchmarks.warm_prior --stories FOLDER --judge zork1.z5 detective.z5 --out results/X
    python -m benchmarks.warm_prior --judge tw-cooking:seed=4 --also tw-simple --out results/X

One warm-up per family of the judged games (`priorzero/games/families.py`): a story's relatives, or
all games of a generator. With `--together N` one per N families, all of which are left out of it:
as strict, with less to train on and less to do. `--also` names generated games that are judged by
the first of these LLMs: it has seen others of their generator. What is done is kept in OUT and not
done again, so that the command can be given in parts, with `--minutes` for each training and
`--total-minutes` for the whole. Decisions can be collected beforehand, where there is no GPU:
`python -m priorzero.warmup --collect` with the same games and settings. Nothing is judged on the
games for judging only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import quiet_logging, say
from priorzero.run.provenance import find_commit, machine_facts
from priorzero.types import PriorZeroError

Row = dict[str, Any]


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.warm_prior", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--llm", default="embedded", help="what to begin with")
    parser.add_argument("--stories", type=Path, nargs="*", default=[], help="folders with stories")
    parser.add_argument("--judge", nargs="+", required=True, help="games to judge on")
    parser.add_argument("--also", nargs="*", default=[], help="generated games to judge on as well")
    parser.add_argument("--textworld", type=int, default=24, help="generated games to train on")
    parser.add_argument("--steps", type=int, default=100, help="walkthrough commands judged a game")
    parser.add_argument("--together", type=int, default=1, help="families left out of a warm-up")
    parser.add_argument("--prompt", default="bare", help="prompt variant, in training and report")
    parser.add_argument("--episodes", type=int, default=0, help="of the LLM alone, per player")
    parser.add_argument("--minutes", type=float, default=0.0, help="of one training; 0: no limit")
    parser.add_argument("--total-minutes", type=float, default=0.0, help="no family begins later")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--commit")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The benchmark; 0, or 2 for a fault the user can mend."""
    quiet_logging()
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    source = {
        "command": "python -m benchmarks.warm_prior " + shlex.join(arguments),
        "commit": find_commit(args.commit),
        "machine": machine_facts(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    try:
        left = run(args, source)
    except PriorZeroError as error:
        say(f"Error: {error}")
        return 2
    write_table(args.out, source)
    if left:
        say(f"The time was up before {', '.join(left)}; the same command goes on")
    return 0


def run(args: argparse.Namespace, source: Row) -> list[str]:
    """Every group of families that is not done yet; returns those for which there was no time."""
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    also, left = list(args.also), []
    for family, games in groups(families(args.judge), args.together).items():
        place = args.out / f"{_file_name(family)}.json"
        if place.is_file():
            also = []  # judged with the first group
            continue
        if args.total_minutes and time.monotonic() - started > 60 * args.total_minutes:
            left.append(family)
            continue
        say(f"{family}: {', '.join(games)} left out of the training")
        row = one_group(args, family, games, also, source)
        place.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        also = []
    return left


def families(games: Sequence[str]) -> dict[str, list[str]]:
    """Family -> its judged games.

    Raises:
        PriorZeroError: a game is for judging only.
    """
    from priorzero.games.catalogue import resolve_game
    from priorzero.games.families import kinship
    from priorzero.games.judging import judging_only

    found: dict[str, list[str]] = {}
    for name in games:
        game = resolve_game(name)
        if judging_only(game):
            raise PriorZeroError(f"{name} is for judging only; leave it out of --judge")
        found.setdefault(kinship(game).family, []).append(name)
    return found


def groups(found: dict[str, list[str]], together: int) -> dict[str, list[str]]:
    """Names of so many families, in their order, -> the judged games of all of them."""
    names = list(found)
    parts = [names[i : i + together] for i in range(0, len(names), together)]
    return {", ".join(part): [game for name in part for game in found[name]] for part in parts}


def one_group(
    args: argparse.Namespace, family: str, games: list[str], also: list[str], source: Row
) -> Row:
    """Warm an LLM up without these games' families, and judge it before and after.

    Raises:
        PriorZeroError: nothing to train on, or something cannot be had.
    """
    from priorzero.evidence.measure import Plan, measure
    from priorzero.settings.llm import PromptSettings
    from priorzero.settings.record import merge, overlay, parse_assignment
    from priorzero.settings.warmup import WarmupSettings
    from priorzero.warmup.__main__ import warm_up

    own = dict(
        llm=args.llm,
        games=[str(folder) for folder in args.stories],
        exclude=games,
        textworld=args.textworld,
        prompts=[args.prompt],
        minutes=args.minutes,
        device=args.device,
    )
    settings = overlay(WarmupSettings(), merge(own, *map(parse_assignment, args.assignments)))
    settings.validate()

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "warm"
        facts = warm_up(settings, folder, False, source)
        plan = Plan(
            llms=(args.llm, str(folder)),
            games=tuple(games + also),
            steps=args.steps,
            variants=(args.prompt,),
            temperatures=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
            prompt=PromptSettings(
                history_length=settings.history_length,
                max_prompt_tokens=settings.max_prompt_tokens,
            ),
            episodes=args.episodes,
            play_steps=50,
            play_reductions=(settings.reduction,),
            engine="transformers",
            device=args.device,
            seed=0,
        )
        report = asyncio.run(measure(plan))

    told = [row for row in report["seen"] if row["game"] in games]
    assert not told, f"an LLM is judged on a game it saw: {told}"
    return source | {
        "family": family,
        "training": {k: facts[k] for k in ("families", "held_out", "left_out", "figures")},
        "uniform": report["uniform"],
        "prior": report["prior"],
        "play": report["play"],
    }


def write_table(out: Path, source: Row) -> None:
    """table.md from every family that is done."""
    lines = [
        "| game | reduction | uniform | before | after | log loss, best T, before | after |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    changes: dict[str, list[float]] = {}
    for path in sorted(out.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        for uniform in row["uniform"]:
            for reduction in ("sum", "mean"):
                before, after = _two(row["prior"], uniform["game"], reduction)
                lines.append(
                    f"| {uniform['game']} | {reduction} | {uniform['mrr']:.3f} | "
                    f"{_mrr(before)} | {_mrr(after)} | {_loss(before):.2f} | {_loss(after):.2f} |"
                )
                change = after[0]["mrr"] - before[0]["mrr"]
                changes.setdefault(reduction, []).append(change)
    told = "; ".join(
        f"{name}: MRR {mean(values):+.3f} in the mean, better on {sum(v > 0 for v in values)} of "
        f"{len(values)} games"
        for name, values in changes.items()
    )
    text = f"```\n{source['command']}\n```\n\nCommit {source['commit']}. {told}.\n\n"
    text += "MRR before and after, ± its standard error over decisions.\n\n"
    (out / "table.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    say(text + "\n".join(lines))


def _two(rows: Sequence[Row], game: str, reduction: str) -> tuple[list[Row], list[Row]]:
    """The rows of the LLM before and after, which was measured second."""
    own = [r for r in rows if r["game"] == game and r["reduction"] == reduction]
    first, second = dict.fromkeys(r["llm"] for r in own)
    return [r for r in own if r["llm"] == first], [r for r in own if r["llm"] == second]


def _mrr(rows: Sequence[Row]) -> str:
    return f"{rows[0]['mrr']:.3f} ± {rows[0]['mrr_error']:.3f}"


def _loss(rows: Sequence[Row]) -> float:
    return min(row["log_loss"] for row in rows)


def _file_name(family: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in family).lower()


if __name__ == "__main__":
    sys.exit(main())
