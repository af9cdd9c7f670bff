"""Environment steps per second of whole runs: in turn, and with training or evaluation beside them.

    python -m benchmarks.background --env-id detective.z5 --iterations 40
    python -m benchmarks.background --env-id tw-simple --llm none --variants 0 1 1e

A variant is an off_policy_degree (0: in turn; -1: chooses itself), with an `e` behind it where
evaluations play a snapshot beside (`async_eval`). Every variant is a real run of the debug sizes
from the same seed, with evaluations and without checkpoints of its own; what is timed is the
training loop, evaluations included, parts already built. Each begins with no known state of the
game and an empty cache of texts. The order is turned round in every repeat, so that a machine that
gets slower or faster favours none.

Beside training the data are older, so equal steps are not equal learning; the curves of such runs
are for `python -m priorzero.compare`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

from benchmarks.collect import own_state_cache
from benchmarks.common import finish, quiet_logging, say
from priorzero.run.provenance import machine_facts

VARIANTS = ("0", "1", "2", "-1", "0e", "1e")
NO_LLM = "none"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.background", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--env-id", default="tw-simple")
    # As one word per variant, since -1 looks like an option.
    parser.add_argument("--variants", default=" ".join(VARIANTS), help="words like 0, 2, -1, 1e")
    parser.add_argument(
        "--llm",
        nargs="+",
        default=[NO_LLM, "embedded"],
        help="as --llm of the entry; none: without",
    )
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--eval-freq", type=int, default=10)
    parser.add_argument("--llm-train-freq", type=int, default=5)
    parser.add_argument(
        "--engine", choices=["auto", "vllm", "transformers"], default="transformers"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    args = parser.parse_args(arguments)
    args.variants = args.variants.split()
    for variant in args.variants:
        if not re.fullmatch(r"(-1|\d+)e?", variant):
            parser.error(f"variant {variant!r} is not like 0, 2, -1 or 1e")
    return args


def make_config(args: argparse.Namespace, folder: Path, llm: str, variant: str):
    """The debug settings as a run of this variant."""
    from priorzero.settings.record import merge, parse_assignment
    from priorzero_config import HybridTrainingConfig

    overrides: dict[str, Any] = {"policy": dict(device=args.device)}
    if llm != NO_LLM:
        overrides["llm"] = dict(model=llm, engine=args.engine)
    return HybridTrainingConfig(
        env_id=args.env_id,
        seed=args.seed,
        exp_name=str(folder),
        enable_llm=llm != NO_LLM,
        debug_mode=True,
        overrides=merge(overrides, *(parse_assignment(a) for a in args.assignments)),
        iterations=args.iterations,
        eval_freq=args.eval_freq,
        save_freq=0,
        llm_train_freq=args.llm_train_freq,
        off_policy_degree=int(variant.rstrip("e")),
        async_eval=variant.endswith("e"),
    )


async def measure(args: argparse.Namespace, llm: str, variant: str) -> dict[str, Any]:
    """One run."""
    from priorzero.loop.train import train
    from priorzero_orz_entry import build

    folder = Path(tempfile.mkdtemp(prefix="priorzero-benchmark-"))
    try:
        async with await build(make_config(args, folder, llm, variant)) as parts:
            # Starts the interpreters, which is not what is measured.
            own_state_cache(parts.collect_envs, None)
            await asyncio.to_thread(parts.collect_envs.reset)
            own_state_cache(parts.collect_envs, folder / "states.sqlite")

            started = time.perf_counter()
            await train(parts, SimpleNamespace(requested=False))
            seconds = time.perf_counter() - started

            parts.metrics.flush()
            lines = (folder / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            perf = [row for row in map(json.loads, lines) if row["namespace"] == "perf"]
            return summary(perf, parts.progress, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary(perf: Sequence[dict[str, float]], progress: Any, seconds: float) -> dict[str, Any]:
    """What is told of a run, from its perf rows."""

    def total(name: str) -> float:
        return sum(row.get(name, 0.0) for row in perf)

    def mean(name: str) -> float:
        return fmean(row.get(name, 0.0) for row in perf)

    return {
        "env_steps_per_second": progress.env_steps / seconds,
        "env_steps": progress.env_steps,
        "updates": progress.updates,
        "llm_phases": progress.llm_version,
        "seconds": seconds,
        "seconds_collect": total("seconds_collect"),
        "seconds_train_wm": total("seconds_train_wm"),
        "seconds_train_llm": total("seconds_train_llm"),
        "seconds_evaluate": total("seconds_evaluate"),
        "seconds_waited": total("background_seconds_waited"),
        "seconds_overlap": total("background_seconds_overlap"),
        "degree": mean("background_degree"),
        "wm_behind": mean("background_wm_behind"),
        "llm_behind": mean("background_llm_behind"),
        "acting_age": mean("background_acting_age"),
    }


async def run_all(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    for llm in args.llm:
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in args.variants}
        # A short one first: what a process pays once belongs to no variant.
        first = argparse.Namespace(**vars(args) | {"iterations": 1, "eval_freq": 0})
        await measure(first, llm, args.variants[0])

        for repeat in range(args.repeats):
            for variant in args.variants if repeat % 2 == 0 else args.variants[::-1]:
                gc.collect()
                runs[variant].append(await measure(args, llm, variant))
                say(describe(llm, variant, runs[variant][-1]))
        results[llm] = compared(runs)
    return {"benchmark": "background", "results": results}


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Per variant its runs, the median speed, and that over the first variant's."""
    speeds = {v: median(r["env_steps_per_second"] for r in own) for v, own in runs.items()}
    first = next(iter(speeds.values()))
    return {
        variant: {
            "env_steps_per_second": speeds[variant],
            "speedup": speeds[variant] / first,
            "runs": own,
        }
        for variant, own in runs.items()
    }


def describe(llm: str, variant: str, result: dict[str, Any]) -> str:
    return (
        f"LLM {llm}, variant {variant:3} {result['env_steps_per_second']:7.2f} env steps/s "
        f"({result['env_steps']} steps, {result['updates']} updates, {result['seconds']:.1f} s; "
        f"waited {result['seconds_waited']:.1f} s, overlap {result['seconds_overlap']:.1f} s, "
        f"acting weights {result['acting_age']:.1f} updates old)"
    )


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    quiet_logging()
    result = asyncio.run(run_all(args))
    finish(result | {"settings": vars(args), "machine": machine_facts()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
