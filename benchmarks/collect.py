"""Environment steps per second of the collector, by stage: with this project's caches and without
any.

    python -m benchmarks.collect --env-id detective.z5 --segments 4
    python -m benchmarks.collect --env-id tw-simple --no-llm --envs 64 --segments 64 --only known

Measurements of the same settings in one process. `cold`: all caches on and empty. `warm`: the same
collector goes on, as in a run that has seen part of the game. `known`: what `cold` played once
more, with the valid actions and embeddings that it found (LLM scores are computed anew).
`no_caches`: the same again, and every state's valid actions, every text's embedding and every
state's LLM scores are computed when they are needed (the head of the prompt is still shared: that
is part of the engine, not a cache of answers). The network is untrained and nothing trains.

Stages, in milliseconds of wall time per environment step: env (interpreters, without what follows),
valid_actions, encode, llm_prior, search, other (roots, records, the loop). Environments are stepped
in parallel; the wall time of that stage is divided between env and valid_actions in proportion to
the seconds the interpreters spent on each. TextWorld lists its valid actions with each step, so it
has no such stage.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import finish, quiet_logging, say
from priorzero.run.provenance import machine_facts

if TYPE_CHECKING:
    from priorzero.games.group import GameEnvGroup
    from priorzero.loop.parts import Parts

WATCHED = ("env", "encode", "llm_prior", "search")  # the collector's stopwatch
BLOCKS = ("cold", "warm", "known", "no_caches")
STAGES = ("env", "valid_actions", "encode", "llm_prior", "search", "other")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.collect", description=__doc__.splitlines()[0])
    parser.add_argument("--env-id", default="tw-simple")
    parser.add_argument("--segments", type=int, default=4, help="segments per measurement")
    parser.add_argument("--segment-length", type=int, default=20)
    parser.add_argument("--max-steps", type=int, default=50, help="steps of an episode")
    parser.add_argument("--envs", type=int, default=2)
    parser.add_argument("--simulations", type=int, default=16)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--no-llm", action="store_true")
    parser.add_argument("--llm", default="embedded", help="as --llm of the entry")
    parser.add_argument(
        "--engine", choices=["auto", "vllm", "transformers"], default="transformers"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--listing-workers", type=int, help="as env.listing_workers")
    parser.add_argument(
        "--only", nargs="+", choices=BLOCKS, default=BLOCKS, help="measurements; cold is always one"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_config(args: argparse.Namespace, folder: Path, caches: bool):
    """The debug settings with the sizes asked for; without caches, their sizes are zero."""
    from priorzero_config import HybridTrainingConfig

    overrides: dict[str, Any] = {
        "env": dict(
            collector_env_num=args.envs,
            evaluator_env_num=1,
            max_steps=args.max_steps,
            listing_workers=args.listing_workers if caches else 0,
        ),
        "policy": dict(
            embed_dim=args.embed_dim,
            num_simulations=args.simulations,
            num_segments=args.segments,
            game_segment_length=args.segment_length,
            device=args.device,
        ),
        "llm": dict(model=args.llm, engine=args.engine),
    }
    if not caches:
        overrides["text"] = dict(cache_mib=0)
        overrides["llm"]["score_cache_size"] = 0
    return HybridTrainingConfig(
        env_id=args.env_id,
        seed=args.seed,
        exp_name=str(folder),
        enable_llm=not args.no_llm,
        debug_mode=True,
        overrides=overrides,
    )


def own_state_cache(envs: GameEnvGroup, path: Path | None) -> None:
    """Give the environments a fresh cache of valid actions.

    Args:
        path: of the cache's file; None: one that remembers nothing.
    """
    from priorzero.games.valid_actions import ValidActionCache

    cache = ValidActionCache(path) if path else ValidActionCache(None, memory_entries=0)
    for env in envs.envs:
        env.use_state_cache(cache)


async def block(parts: Parts, segments: int) -> dict[str, Any]:
    """Collect `segments` segments and say where the time went."""
    parts.watch.lap()
    env_before = parts.collect_envs.stats()
    played = parts.progress.env_steps

    started = time.perf_counter()
    result = await parts.collector.collect(
        segments, played, parts.settings.policy.fixed_temperature_value
    )
    wall = time.perf_counter() - started
    parts.progress.env_steps += result.steps

    lap = parts.watch.lap()
    spent = {stage: lap.get(stage, 0.0) for stage in WATCHED}
    env = {k: v - env_before[k] for k, v in parts.collect_envs.stats().items()}

    # reset_s holds the listing of each first state too, so the rest is an upper bound of the
    # interpreter's own time.
    listing = env["describe_s"] + env["wait_s"]
    busy = env["step_s"] + env["reset_s"] + listing
    describing = spent["env"] * listing / busy if busy else 0.0
    spent |= {"env": spent["env"] - describing, "valid_actions": describing}
    spent["other"] = wall - sum(spent.values())

    lookups = env["state_hits"] + env["state_misses"]
    return {
        "steps_per_second": result.steps / wall,
        "steps": result.steps,
        "seconds": wall,
        "ms_per_step": {stage: 1000 * spent[stage] / result.steps for stage in STAGES},
        "valid_action_hit_rate": env["state_hits"] / lookups if lookups else None,
    }


def hit_rates(parts: Parts, result: dict[str, Any], before: dict[str, float]) -> dict[str, Any]:
    """Add the hit rates of encoder and LLM scores over this block to `result`.

    Args:
        before: counters at the end of the last block; updated for the next one.
    """
    encoder = parts.encoder.stats()
    llm = parts.llm.prior.stats() if parts.llm is not None else {}
    sources = (("encoder", "hits", "misses", encoder), ("llm", "cache_hits", "cache_misses", llm))
    for name, hits, misses, source in sources:
        new_hits = source.get(hits, 0.0) - before.get(f"{name}_hits", 0.0)
        new_misses = source.get(misses, 0.0) - before.get(f"{name}_misses", 0.0)
        before |= {f"{name}_hits": source.get(hits, 0.0), f"{name}_misses": source.get(misses, 0.0)}

        asked = new_hits + new_misses
        result[f"{name}_hit_rate"] = new_hits / asked if asked else None
    return result


@dataclass
class Found:
    """What one measurement leaves to the next: a file of known states, and known embeddings."""

    states: Path
    embeddings: dict[str, Any] | None = None


async def measure(
    args: argparse.Namespace, names: Sequence[str], found: Found | None
) -> dict[str, dict[str, Any]]:
    """The same start each time; every name is a block of `args.segments` segments from there on.

    Args:
        names: of the blocks, in order.
        found: caches to begin with, filled on the way; None: no caches.
    """
    from priorzero_orz_entry import build

    folder = Path(tempfile.mkdtemp(prefix="priorzero-benchmark-"))
    try:
        async with await build(make_config(args, folder, found is not None)) as parts:
            # Starts the interpreters, which is not what is measured.
            own_state_cache(parts.collect_envs, None)
            await asyncio.to_thread(parts.collect_envs.reset)
            parts.collect_envs.seed(args.seed)

            own_state_cache(parts.collect_envs, found and found.states)
            if found is not None and found.embeddings is not None:
                parts.encoder.load_state_dict(found.embeddings)

            results, counters = {}, {}
            for name in names:
                results[name] = hit_rates(parts, await block(parts, args.segments), counters)
                say(describe(name, results[name]))
            if found is not None:
                found.embeddings = parts.encoder.state_dict()
            return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def describe(name: str, result: dict[str, Any]) -> str:
    parts = ", ".join(f"{stage} {ms:.1f}" for stage, ms in result["ms_per_step"].items())
    return (
        f"{name:9} {result['steps_per_second']:7.2f} env steps/s over {result['steps']} steps; "
        f"ms per step: {parts}"
    )


async def run_all(args: argparse.Namespace) -> dict[str, Any]:
    # What a process pays once (first forward, allocations) falls on the caches' side of the
    # comparison.
    folder = Path(tempfile.mkdtemp(prefix="priorzero-benchmark-"))
    try:
        found = Found(folder / "states.sqlite")
        go_on = [name for name in ("warm",) if name in args.only]
        results = await measure(args, ["cold", *go_on], found)
        for name, caches in (("known", found), ("no_caches", None)):
            if name in args.only:
                gc.collect()
                results |= await measure(args, [name], caches)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    answer = {"benchmark": "collect", "results": results}
    if "no_caches" in results:
        slow = results["no_caches"]["steps_per_second"]
        for name in results.keys() - {"no_caches"}:
            answer[f"speedup_{name}"] = results[name]["steps_per_second"] / slow
    return answer


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    quiet_logging()
    result = asyncio.run(run_all(args))
    finish(result | {"settings": vars(args), "machine": machine_facts()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
