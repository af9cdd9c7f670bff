"""Fine-tune an LLM to the walkthroughs of games it will not be judged on.

    ./run_priorzero_orz.sh warmup --games FOLDER --exclude zork1.z5 detective.z5 --out FOLDER
    ./run_priorzero_orz.sh warmup --textworld 24 --llm embedded --out data_priorzero/warm

Writes a Hugging Face folder that `--llm` takes. Its `priorzero.json` says which games it saw; a run
on one of them, or on a relative, tells so.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from priorzero.run.cli import calm_openmp
from priorzero.run.logs import setup_logging
from priorzero.run.output import require_free
from priorzero.settings.record import merge, overlay, parse_assignment
from priorzero.settings.warmup import GENERATORS, PROMPTS, WarmupSettings
from priorzero.types import PriorZeroError

logger = logging.getLogger("priorzero.warmup")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; what an option's default is stands in `priorzero/settings/warmup.py`."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.warmup", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new, or empty")
    parser.add_argument("--llm", help="what to begin with: auto, embedded, a hub name or a folder")

    # What it is trained on.
    parser.add_argument("--games", nargs="+", help="folders with story files, or games' names")
    parser.add_argument(
        "--exclude", nargs="*", help="games it will be judged on; relatives go with them"
    )
    parser.add_argument("--textworld", type=int, help="games to generate; 0: none")
    parser.add_argument("--textworld-kinds", nargs="+", choices=GENERATORS)
    parser.add_argument("--steps", type=int, help="walkthrough commands per game; 0: all")
    parser.add_argument("--decisions", type=int, help="to train on at most; 0: all")
    parser.add_argument(
        "--prompts",
        nargs="+",
        choices=PROMPTS,
        help="bare is what debug runs ask, history+list what full runs ask",
    )

    # How.
    parser.add_argument("--reduction", choices=["sum", "mean"])
    parser.add_argument("--weights", choices=["auto", "all", "adapters"])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--epochs", type=int, help="passes at most")
    parser.add_argument("--minutes", type=float, help="of training; 0: no limit")
    parser.add_argument("--jobs", type=int, help="games walked at a time; 0: one per core")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        dest="assignments",
        help="any other setting of priorzero/settings/warmup.py, e.g. train.batch_size=16",
    )

    parser.add_argument(
        "--adapter", action="store_true", help="write the adapters apart, in PEFT's format"
    )
    parser.add_argument(
        "--plan", action="store_true", help="tell which games are used and left out, and stop"
    )
    parser.add_argument(
        "--collect", action="store_true", help="collect the decisions into the cache, and stop"
    )
    parser.add_argument("--commit", help="commit of this copy where it is no git checkout")
    return parser.parse_args(arguments)


def settings_from(args: argparse.Namespace) -> WarmupSettings:
    """What a command line asks for.

    Raises:
        PriorZeroError: an unknown or impossible setting.
    """
    names = {field.name for field in dataclasses.fields(WarmupSettings)}
    # Options that have the name of a setting; None: not given.
    given = {name: value for name, value in vars(args).items() if name in names}
    layers = [parse_assignment(text) for text in args.assignments]
    layers.append({name: value for name, value in given.items() if value is not None})
    settings = overlay(WarmupSettings(), merge(*layers))
    settings.validate()
    return settings


def warm_up(
    settings: WarmupSettings, out: Path, adapter: bool, source: dict[str, Any]
) -> dict[str, Any]:
    """Collect, train, write.

    Args:
        out: new, or an empty folder.
        adapter: write the adapters apart.
        source: command and commit, for the record.

    Returns:
        the record.

    Raises:
        PriorZeroError: a fault the user can mend; nothing was written.
    """
    # These load torch, which should not delay --help or a wrong option.
    import numpy as np
    import torch

    from priorzero.compute import resolve_device
    from priorzero.export import write_llm
    from priorzero.llm.model import load_llm, resolve_llm
    from priorzero.llm.scoring.requests import Tokeniser, model_max_tokens
    from priorzero.llm.seen import read_seen
    from priorzero.llm.update.trainers import builtin
    from priorzero.llm.weights.identity import ModelIdentity
    from priorzero.settings.llm import LLMSettings
    from priorzero.warmup.collect import collect
    from priorzero.warmup.examples import drawn, hold_out, make_examples
    from priorzero.warmup.games import choose_games
    from priorzero.warmup.record import record
    from priorzero.warmup.tune import Tuning, train_settings

    # Cheapest checks first.
    require_free(out)
    device = resolve_device(settings.device, "--device")
    all_weights = settings.weights == "all" or (settings.weights == "auto" and device == "cuda")
    if adapter and all_weights:
        raise PriorZeroError("all weights train, so there are no adapters: leave out --adapter")
    resolved = resolve_llm(settings.llm)
    base_seen = read_seen(resolved.path)

    # The decisions.
    choice = choose_games(settings)
    tell_choice(choice)
    walks, without = collect(choice.games, settings)
    rng = np.random.default_rng(settings.seed)
    train_walks, held_walks = hold_out(walks, settings.held_out, rng)

    # The LLM.
    model, tokenizer = load_llm(resolved, device)
    identity = ModelIdentity.of(model)
    tokeniser = Tokeniser(tokenizer, model_max_tokens(model.config))
    examples = partial(
        make_examples, settings=settings, tokeniser=tokeniser, join_heads=device == "cuda"
    )
    train = drawn(examples(train_walks), settings.decisions, rng)
    held_out = drawn(examples(held_walks), settings.held_out_decisions, rng)
    logger.info(
        "%d decisions of %d games to train on, %d of %d games held out; %s train",
        len(train),
        len(train_walks),
        len(held_out),
        len(held_walks),
        "all weights" if all_weights else "adapters",
    )
    llm_settings = LLMSettings(train=train_settings(settings, len(train), all_weights))
    if not all_weights:
        llm_settings.lora = settings.lora
    trainer = builtin.make(model, tokenizer, llm_settings, settings.reduction)

    tuned = Tuning(trainer, tokeniser, settings, train, held_out).run()
    facts = record(
        tuned,
        settings,
        train_walks,
        held_walks,
        choice.left_out | without,
        {
            "base": identity.as_dict() | {"name": resolved.name},
            "form": "all weights" if all_weights else "adapter" if adapter else "merged",
            **source,
        },
        base_seen,
    )
    dtype = getattr(torch, settings.adapter_dtype)
    write_llm(trainer.weights(), tokenizer, facts, out, adapter, dtype)
    return facts


def tell_choice(choice) -> None:
    """Log which games are used and which are not."""
    logger.info("%d games: %s", len(choice.games), ", ".join(game.env_id for game in choice.games))
    for name, why in choice.left_out.items():
        logger.info("Left out: %s (%s)", name, why)


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        the exit status: 0, or 2 for a fault the user can mend.
    """
    calm_openmp()
    setup_logging(None)
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    try:
        settings = settings_from(args)
        if args.plan or args.collect:
            from priorzero.warmup.collect import collect
            from priorzero.warmup.games import choose_games

            choice = choose_games(settings)
            tell_choice(choice)
            if args.collect:
                collect(choice.games, settings)
            return 0

        from priorzero.run.provenance import find_commit, machine_facts

        source = {
            "command": "python -m priorzero.warmup " + shlex.join(arguments),
            "commit": find_commit(args.commit),
            "machine": machine_facts(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        facts = warm_up(settings, args.out, args.adapter, source)
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2

    figures, name = facts["figures"], settings.reduction
    logger.info(
        "✓ Wrote %s: on games held out MRR %.3f → %.3f, log loss %.3f → %.3f; plain English "
        "%.2f → %.2f nats per token.%s",
        args.out,
        figures["before"][name]["mrr"],
        figures["after"][name]["mrr"],
        figures["before"][name]["log_loss"],
        figures["after"][name]["log_loss"],
        figures["before"]["text_loss"],
        figures["after"]["text_loss"],
        "" if args.adapter else f" Take it with --llm {args.out}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
