"""The main command's process and options; what these mean for the settings is told in
`priorzero_orz_entry.config_from`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from priorzero import plugins


def option_parser(description: str, presets: Sequence[str]) -> argparse.ArgumentParser:
    """Options for what people change often; the rest with --set."""
    parser = argparse.ArgumentParser(prog="priorzero_orz_entry", description=description)

    # The run: game, seed, length, name.
    parser.add_argument(
        "--env-id",
        nargs="+",
        default=["auto"],
        metavar="GAME",
        help="zork1.z5, detective.z5, tw-simple, tw-cooking, tw-coin, a path, auto; one agent for "
        "several, or for jericho-suite: all story files found",
    )
    parser.add_argument(
        "--eval-env-id",
        nargs="+",
        metavar="GAME",
        help="games that are evaluated instead of those trained on",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, help="iterations of collect and train")
    parser.add_argument("--exp-name", help="folder under data_priorzero/")

    # Models, and where they run.
    parser.add_argument("--llm", help="auto, embedded, embedded-warm, a hub name or a folder")
    parser.add_argument(
        "--llm-from", metavar="RUN", help="the LLM that another experiment trained, by its folder"
    )
    parser.add_argument("--engine", choices=["auto", "vllm", "transformers"])
    parser.add_argument(
        "--llm-required", action="store_true", help="stop where the LLM engine would be replaced"
    )
    parser.add_argument("--no-llm", action="store_true", help="pure UniZero")
    parser.add_argument(
        "--rft", action="store_true", help="also train the LLM with advantages of the world model"
    )
    parser.add_argument("--encoder", help="sentence encoder: auto, a hub name or a folder")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])

    # Where the numbers are shown.
    parser.add_argument(
        "--wandb",
        nargs="?",
        const="auto",
        choices=["auto", "offline", "online"],
        help="also to Weights & Biases; auto: online where the user is logged in",
    )

    # Settings and schedule.
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        choices=sorted(presets),
        help="may be given several times; what each sets stands in priorzero/settings/presets.py",
    )
    parser.add_argument("--eval-freq", type=int, help="iterations between evaluations; 0: none")
    parser.add_argument(
        "--save-freq", type=int, help="iterations between checkpoints; 0: at the end only"
    )
    parser.add_argument(
        "--wm-train-freq", type=int, help="iterations between training phases of the world model"
    )
    parser.add_argument(
        "--llm-train-freq", type=int, help="iterations between training phases of the LLM"
    )
    parser.add_argument(
        "--use-orz-trainer",
        action=argparse.BooleanOptionalAction,
        help="let Open-Reasoner-Zero's trainer do the reinforcement step, with the preset orz",
    )
    _add_schedules(parser)
    parser.add_argument(
        "--off-policy-degree",
        type=int,
        help="parallel: training phases that collection may be ahead; 0: in turn, -1: by itself",
    )
    parser.add_argument(
        "--async-eval",
        action="store_true",
        default=None,
        help="evaluate a snapshot beside what follows",
    )
    parser.add_argument(
        "--collector-workers",
        type=int,
        help="collect in so many processes, which may be on other machines; 0: in this one",
    )
    parser.add_argument(
        "--ray-address", help="Ray cluster of these: host:port of its head, or auto; else its own"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="GROUP.SETTING=VALUE",
        dest="assignments",
        help="any setting of priorzero/settings, e.g. policy.num_simulations=30",
    )

    # Going on from a checkpoint.
    parser.add_argument(
        "--resume", action="store_true", help="continue the experiment's latest checkpoint"
    )
    parser.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint folder's name"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate a checkpoint and stop")
    return parser


def _add_schedules(parser: argparse.ArgumentParser) -> None:
    """Which schedule, and the numbers of those that have turns."""
    parser.add_argument(
        "--wm-training-mode",
        choices=plugins.names("priorzero.loop.schedules"),
        help="whose training follows whose: a file of priorzero/loop/schedules",
    )

    parser.add_argument(
        "--sequential-wm-updates", type=int, help="sequential: updates of the world model, first"
    )
    parser.add_argument(
        "--sequential-llm-phases", type=int, help="sequential: training phases of the LLM, then"
    )
    parser.add_argument(
        "--sequential-repeat",
        action="store_true",
        default=None,
        help="sequential: again and again until --iterations, instead of once",
    )

    parser.add_argument(
        "--alternating-wm-updates", type=int, help="alternating: updates of a world model's turn"
    )
    parser.add_argument(
        "--alternating-llm-phases", type=int, help="alternating: training phases of an LLM's turn"
    )
    parser.add_argument(
        "--alternating-first", choices=["world_model", "llm"], help="alternating: who begins"
    )
    parser.add_argument(
        "--alternating-llm-collect",
        choices=["everything", "world_model", "nothing"],
        help="alternating: what is played in the LLM's turn; world_model searches without the LLM",
    )

    parser.add_argument(
        "--llm-only-episodes", type=int, help="llm_only: episodes between the LLM's phases"
    )


def calm_openmp() -> None:
    """Let OpenMP threads spin for a moment only before they sleep; to be called before torch loads.

    Threads that wait by spinning starve each other where cores are shared: on two busy cores a
    world-model update took 56 ms with sleeping threads and 900 ms with spinning ones. On two quiet
    cores sleeping at once costs an LLM forward a third of its speed. A short spin is close to the
    better of both. OMP_WAIT_POLICY or GOMP_SPINCOUNT of the user stand.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
