"""Environment steps per second of collection, by the number of collector workers.

    python -m benchmarks.collect_workers --env-id detective.z5 --no-llm --workers 0 1 2 4
    python -m benchmarks.collect_workers --env-id detective.z5 --workers 0 1 2 4 --repeats 3

0 is the collector in the run's own process. All play the same number of segments in the same number
of environments, with an untrained network, from caches that begin empty. The first round starts
interpreters and fills caches; it is not timed, and neither is the start of the workers.
Measurements alternate in order from repeat to repeat; the median counts.

Each worker has one CPU of Ray's and one thread of torch's, as `collectors.worker_cpus` says, and so
has the run's own process here: what is compared is one thread against several. Needs Ray
(requirements/ray.lock) for anything but 0.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import finish, quiet_logging, say
from priorzero.run.provenance import machine_facts

STAGES = ("env", "encode", "llm_prior", "search")  # the collector's stopwatch


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.collect_workers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--env-id", default="tw-simple")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each measurement")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each number")
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--segments", type=int, default=8, help="segments of a round")
    parser.add_argument("--segment-length", type=int, default=20)
    parser.add_argument("--max-steps", type=int, default=50, help="steps of an episode")
    parser.add_argument("--simulations", type=int, default=16)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--no-llm", action="store_true")
    parser.add_argument("--llm", default="embedded", help="as --llm of the entry")
    parser.add_argument("--worker-cpus", type=float, default=1.0, help="as collectors.worker_cpus")
    parser.add_argument("--ray-address", default="", help="as --ray-address of the entry")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_config(args: argparse.Namespace, folder: Path, workers: int):
    """The debug settings with the sizes asked for."""
    from priorzero_config import HybridTrainingConfig

    return HybridTrainingConfig(
        env_id=args.env_id,
        seed=args.seed,
        exp_name=str(folder / "run"),
        enable_llm=not args.no_llm,
        debug_mode=True,
        collector_workers=workers,
        ray_address=args.ray_address if workers else "",
        overrides=dict(
            env=dict(
                collector_env_num=args.envs,
                evaluator_env_num=1,
                max_steps=args.max_steps,
                listing_workers=0,
                action_cache=str(folder / "states.sqlite"),
            ),
            policy=dict(
                embed_dim=args.embed_dim,
                num_simulations=args.simulations,
                num_segments=args.segments,
                game_segment_length=args.segment_length,
                device="cpu",
            ),
            llm=dict(model=args.llm, engine="transformers"),
            collectors=dict(worker_cpus=args.worker_cpus),
            decisions=dict(collect_share=0.0),
        ),
    )


async def measure(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Speed of some rounds, and where the time went: means over the workers."""
    from priorzero_orz_entry import build

    folder = Path(tempfile.mkdtemp(prefix="priorzero-benchmark-"))
    try:
        started = time.perf_counter()
        async with await build(make_config(args, folder, workers)) as parts:
            start_s = time.perf_counter() - started
            temperature = parts.settings.policy.fixed_temperature_value
            played = (await parts.collector.collect(args.segments, 0, temperature)).steps
            parts.watch.lap()

            steps, seconds = 0, 0.0
            for _ in range(args.rounds):
                started = time.perf_counter()
                result = await parts.collector.collect(args.segments, played, temperature)
                seconds += time.perf_counter() - started
                steps, played = steps + result.steps, played + result.steps

            lap = parts.watch.lap()
            deaths = parts.collector.totals().workers.get("worker_deaths", 0.0)
            return {
                "steps_per_second": steps / seconds,
                "steps": steps,
                "seconds": seconds,
                "start_seconds": start_s,
                "seconds_per_stage": {stage: lap.get(stage, 0.0) for stage in STAGES},
                "worker_deaths": deaths,
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def run_all(args: argparse.Namespace) -> dict[str, Any]:
    # What a process pays once (imports, first forward) belongs to no number of workers.
    first = argparse.Namespace(**vars(args) | {"rounds": 1, "segments": args.envs})
    await measure(first, 0)

    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in args.workers}
    for repeat in range(args.repeats):
        for number in args.workers if repeat % 2 == 0 else args.workers[::-1]:
            gc.collect()
            runs[number].append(await measure(args, number))
            say(describe(number, runs[number][-1]))

    speeds = {n: median(run["steps_per_second"] for run in own) for n, own in runs.items()}
    base = speeds[args.workers[0]]
    return {
        "benchmark": "collect_workers",
        "results": {
            number: {
                "steps_per_second": speeds[number],
                "speedup": speeds[number] / base,
                "runs": own,
            }
            for number, own in runs.items()
        },
    }


def describe(workers: int, result: dict[str, Any]) -> str:
    stages = ", ".join(f"{n} {s:.1f}" for n, s in result["seconds_per_stage"].items())
    start = result["start_seconds"]
    return (
        f"{workers} workers {result['steps_per_second']:7.2f} env steps/s over {result['steps']} "
        f"steps ({result['seconds']:.1f} s; stages in s: {stages}; start {start:.0f} s)"
    )


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    # Before torch is loaded: each worker has so many threads too.
    os.environ["OMP_NUM_THREADS"] = str(max(1, math.floor(args.worker_cpus)))
    quiet_logging()
    logging.getLogger("priorzero").setLevel(logging.WARNING)
    result = asyncio.run(run_all(args))
    finish(result | {"settings": vars(args), "machine": machine_facts()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
