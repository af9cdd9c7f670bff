"""What recording decisions costs: CPU seconds, so that other work on the machine counts for little.

    python -m benchmarks.decisions --no-llm
    python -m benchmarks.decisions --env-id tw-simple --rounds 6
    python -m benchmarks.decisions --no-llm --whole-run 20 --rounds 3

Two evaluators play the same episodes in turns with one untrained network: one records nothing, the
other every decision with its tree and prompt. After the first round every text, valid action and
score is known, so that nothing but the search is left beside the recording, and nothing trains: the
share of a run's time is smaller. `alone`: the decisions are recorded again with nothing beside
it. All CPU seconds are this process's, the recorder's thread
included; interpreters are processes of their own and not counted.

`--whole-run N`: whole runs of N iterations instead, in turns and each with the same seed, that
differ only in what they record: nothing; evaluations; and besides 2 % (as by default), 10 % or all
of the training episodes. What is played and learnt is equal, bit for bit. `thread`: CPU seconds of
the recorder's own thread, which do not scatter as differences of whole runs do.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import finish, quiet_logging, say
from priorzero.run.provenance import machine_facts


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.decisions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--env-id", default="tw-simple")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=8, help="played side by side, each round")
    parser.add_argument("--simulations", type=int, default=16)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument(
        "--whole-run", type=int, default=0, metavar="N", help="iterations of runs that train"
    )
    parser.add_argument("--no-llm", action="store_true")
    parser.add_argument("--llm", default="embedded", help="as --llm of the entry")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_config(args: argparse.Namespace, folder: Path, **decisions: Any):
    """The debug settings with the sizes asked for.

    Args:
        decisions: settings of the recording.
    """
    from priorzero_config import HybridTrainingConfig

    sizes = dict(embed_dim=args.embed_dim, num_simulations=args.simulations)
    return HybridTrainingConfig(
        env_id=args.env_id,
        seed=args.seed,
        exp_name=str(folder),
        enable_llm=not args.no_llm,
        debug_mode=True,
        overrides=dict(
            policy=sizes, llm=dict(model=args.llm), env=dict(max_steps=25), decisions=decisions
        ),
    )


def make_evaluator(args: argparse.Namespace, parts, recorder):
    """An evaluator of the run's parts, and environments of its own."""
    from priorzero.games.env import TextGameEnv
    from priorzero.games.group import GameEnvGroup
    from priorzero_evaluator import PriorZeroEvaluator

    settings = parts.settings
    common = settings.env.as_dict() | {"split": "eval"}
    envs = GameEnvGroup([partial(TextGameEnv, common) for _ in range(args.episodes)])
    return envs, PriorZeroEvaluator(
        settings.policy,
        parts.policy,
        envs,
        parts.encoder,
        parts.llm.prior if parts.llm is not None else None,
        history_length=settings.llm.prompt.history_length,
        seed=settings.seed,
        temperature=1.0,
        transcripts=None,
        recorder=recorder,
    )


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, in one run's folder."""
    from priorzero.decisions.recorder import Recorder
    from priorzero_orz_entry import build

    class Keeping(Recorder):
        """Remembers what it was given."""

        def __init__(self, *arguments, **named) -> None:
            super().__init__(*arguments, **named)
            self.given: list[tuple] = []

        def put(self, *item) -> None:
            self.given.append(item)
            super().put(*item)

    folder = Path(tempfile.mkdtemp(prefix="priorzero-benchmark-"))
    try:
        async with await build(make_config(args, folder)) as parts:
            decode = parts.llm.engine.tokeniser.decode if parts.llm is not None else None
            make = dict(
                settings=parts.settings.decisions,
                reduction=parts.settings.policy.root_prior.reduction,
                decode=decode,
            )
            recorder = Keeping(folder / "kept", **make)
            players = {
                "plain": make_evaluator(args, parts, None),
                "recorded": make_evaluator(args, parts, recorder),
            }
            rounds = await _rounds(args, players, recorder)
            for envs, _ in players.values():
                envs.close()

            again = Recorder(folder / "alone", **make)
            started = time.process_time()
            for item in recorder.given:
                again.put(*item)
            again.close()
            alone = 1000 * (time.process_time() - started) / len(recorder.given)

            size = sum(p.stat().st_size for p in (folder / "alone").iterdir())
            plain = median(rounds["plain"])
            return {
                "benchmark": "decisions",
                "cpu_ms_per_decision": rounds,
                "cpu_ms_per_decision_median": {k: median(v) for k, v in rounds.items()},
                "alone_cpu_ms_per_decision": alone,
                "share_where_every_decision_is_recorded": alone / plain,
                "decisions": len(recorder.given),
                "bytes_per_decision": size / len(recorder.given),
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _rounds(args: argparse.Namespace, players, recorder) -> dict[str, list[float]]:
    """CPU milliseconds per decision of each round, by player; the first round is not counted."""
    mode = "world_model" if args.no_llm else "world_model_llm"
    told: dict[str, list[float]] = {name: [] for name in players}
    for number in range(args.rounds + 1):
        for name, (_, evaluator) in players.items():
            started = time.process_time()
            result = await evaluator.evaluate(mode, args.episodes, 0, f"round{number}")
            while recorder.stats()["decisions_written"] < len(recorder.given):
                await asyncio.sleep(0.005)
            spent = 1000 * (time.process_time() - started) / sum(result.lengths)
            if number:
                told[name].append(spent)
                say(f"round {number}, {name}: {spent:.2f} ms per decision")
    return told


# ---- whole runs ----------------------------------------------------------------------------------

RECORDED = {
    "nothing": dict(evaluation=False, collect_share=0.0),
    "evaluations": dict(evaluation=True, collect_share=0.0),
    "evaluations and 2 %": dict(evaluation=True, collect_share=0.02),
    "evaluations and 10 %": dict(evaluation=True, collect_share=0.1),
    "evaluations and 100 %": dict(evaluation=True, collect_share=1.0),
}


async def measure_whole_runs(args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of runs that differ in what they record; the first run is not counted."""
    say("a run that is not counted")
    await _whole_run(args, RECORDED["nothing"])

    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in RECORDED}
    for number in range(args.rounds):
        # Each in another place of the round: the machine's other work comes and goes.
        names = list(RECORDED)[number % len(RECORDED) :] + list(RECORDED)[: number % len(RECORDED)]
        for name in names:
            told = await _whole_run(args, RECORDED[name])
            rounds[name].append(told)
            say(f"round {number + 1}, {name}: {told}")

    plain = median(told["cpu_s"] for told in rounds["nothing"])
    cost = {
        name: {
            "cpu_s_median": (cpu := median(one["cpu_s"] for one in told)),
            "share": cpu / plain - 1,
            "thread_share": median(one["thread_cpu_s"] for one in told) / plain,
            "decisions": told[0]["decisions"],
        }
        for name, told in rounds.items()
    }
    return {"benchmark": "decisions, whole runs", "cost": cost, "rounds": rounds}


async def _whole_run(args: argparse.Namespace, decisions: dict[str, Any]) -> dict[str, Any]:
    from priorzero.loop.train import train
    from priorzero.run.signals import StopRequest
    from priorzero_orz_entry import build

    folder = Path(tempfile.mkdtemp(prefix="priorzero-benchmark-"))
    config = make_config(args, folder, **decisions)
    config.iterations = args.whole_run
    config.eval_freq = max(1, args.whole_run // 2)
    try:
        with StopRequest() as stop:
            async with await build(config) as parts:
                thread = next(t for t in threading.enumerate() if t.name == "decisions")
                started = time.process_time()
                await train(parts, stop)
                clock = time.pthread_getcpuclockid(thread.ident)
                on_thread = time.clock_gettime(clock)
                steps = parts.progress.env_steps
                written = parts.recorder.stats()["decisions_written"]
        # What is left to be written is written when the parts are closed.
        spent = time.process_time() - started
        return {
            "cpu_s": spent,
            "thread_cpu_s": on_thread,
            "decisions": int(written),
            "env_steps": steps,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    quiet_logging()
    measuring = measure_whole_runs if args.whole_run else measure
    finish(asyncio.run(measuring(args)) | {"settings": vars(args), "machine": machine_facts()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
