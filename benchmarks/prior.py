"""States scored per second by each way of asking an LLM for the log-probability of every valid
action.

    python -m benchmarks.prior              # embedded model, CPU or GPU as found
    python -m benchmarks.prior --model random:qwen2.5-3b --prompt-tokens 4000 --actions 30 \\
        --states 16 --device cuda
    python -m benchmarks.prior --sweep --out results/prior

Ways (`--methods`):

* per_action: one full forward of prompt and action per action in transformers, logits for the
  action's tokens only;
* vllm_per_action: one vLLM request per action with `prompt_logprobs` (vLLM skips its prefix cache
  for these);
* trie: this project's vLLM engine, one request per inner node of the actions' token trie;
  `trie_again` is the same states a second time, with their prompts in the prefix cache;
* shared: this project's transformers engine, each prompt computed once for all its actions: layers
  in `--dtype`, norms and residual stream in float32, as a run computes on a CPU; `shared_pure` is
  the same with everything in `--dtype`, as a run computes on CUDA (`llm.residual_dtype`);
  `shared_packed`, `shared_padded` and `shared_two_pass` force one way of computing a batch;
* cached: the score cache around it, states seen before.

Prompts are built as in a run, from random play of a real game, then filled up to the length asked
for with text of the game that differs from state to state, so that no engine profits from prompts
that resemble each other by more than their fixed head. The slow ways time as many of the states as
fit into `--seconds`, at least one. `difference` is the largest difference in an action's summed
log-probability from a float32 forward per action, over `--reference-states`.

`--model random:NAME` makes random weights of that shape (nothing is downloaded); speed depends on
the shape alone.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gc
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import finish, quiet_logging, say
from benchmarks.prior_methods import METHODS, USUAL, Measurement, measure
from priorzero.run.provenance import machine_facts

logger = logging.getLogger("priorzero.benchmarks.prior")
SWEEP = {
    "actions": (2, 4, 8, 16, 32),
    "prompt_tokens": (300, 600, 1200, 2400),
    "states": (1, 2, 4, 8, 16),
}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.prior", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="embedded", help="auto, embedded, a folder, a hub name, or random:SHAPE"
    )
    parser.add_argument(
        "--methods", default=",".join(USUAL), help=f"of {', '.join(METHODS)}; comma-separated"
    )
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--actions", type=int, default=12)
    parser.add_argument("--states", type=int, default=8)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--env-id", default="tw-simple", help="game the prompts come from")
    parser.add_argument(
        "--play-steps", type=int, default=60, help="steps of random play the states are taken from"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="a slow way starts no further state after this"
    )
    parser.add_argument(
        "--reference-states", type=int, default=1, help="states compared with float32; 0: none"
    )
    parser.add_argument(
        "--max-batch-tokens", type=int, default=8192, help="of the transformers engine"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=0.4, help="share of the GPU vLLM may take"
    )
    parser.add_argument(
        "--enforce-eager", action="store_true", help="vLLM without CUDA graphs: starts sooner"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sweep", action="store_true", help="also vary each of actions, prompt tokens, states"
    )
    for name, values in SWEEP.items():
        parser.add_argument(f"--sweep-{name.replace('_', '-')}", default=",".join(map(str, values)))
    parser.add_argument("--out", type=Path, help="folder for the sweep's table and plot")

    args = parser.parse_args(arguments)
    args.methods = [m for m in args.methods.split(",") if m]
    unknown = set(args.methods) - set(METHODS)
    if unknown:
        parser.error(
            f"--methods {', '.join(sorted(unknown))} unknown; there are {', '.join(METHODS)}"
        )
    if args.sweep and args.out is None:
        parser.error("--sweep needs --out, the folder for its table and plot")
    return args


def sweep_points(args: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """(what varies, prompt tokens, actions, states): the base point first, then one axis at a time
    around it.
    """
    base = {"prompt_tokens": args.prompt_tokens, "actions": args.actions, "states": args.states}
    points = [("base", *base.values())]
    if args.sweep:
        for axis in SWEEP:
            for value in (int(v) for v in getattr(args, f"sweep_{axis}").split(",")):
                points.append((axis, *(base | {axis: value}).values()))
    return points


def summarise(results: dict[str, Measurement]) -> dict[str, Any]:
    """Speeds, differences, and how many times faster than the baseline that ran."""
    summary: dict[str, Any] = {
        "states_per_second": {n: m.states_per_second for n, m in results.items()},
        "difference": {n: m.difference for n, m in results.items() if m.difference is not None},
        "timed_states": {n: m.states for n, m in results.items()},
    }
    if "per_action" in results:
        base = results["per_action"].states_per_second
        summary["speedup_over_per_action"] = {
            n: m.states_per_second / base for n, m in results.items() if n != "per_action"
        }
    if "vllm_per_action" in results:
        base = results["vllm_per_action"].states_per_second
        summary["speedup_over_vllm_per_action"] = {
            n: m.states_per_second / base for n, m in results.items() if n != "vllm_per_action"
        }
    if summary["difference"]:
        summary["largest_difference"] = max(summary["difference"].values())
    return summary


def write_sweep(folder: Path, rows: list[dict[str, Any]], title: str) -> None:
    """`prior_sweep.csv` and `prior_sweep.png` (milliseconds per state against each axis, one line
    per way).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "prior_sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SWEEP), figsize=(5 * len(SWEEP), 4), sharey=True)
    for axis, name in zip(axes, SWEEP, strict=True):
        chosen = [r for r in rows if r["varies"] == name]
        for method in dict.fromkeys(r["method"] for r in chosen):
            line = sorted(
                (r[name], 1000 / r["states_per_second"]) for r in chosen if r["method"] == method
            )
            axis.plot(*zip(*line, strict=True), marker="o", label=method)
        axis.set(xlabel=name.replace("_", " "), xscale="log", yscale="log")
        values = sorted({r[name] for r in chosen})
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    axes[0].set_ylabel("milliseconds per state")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(folder / "prior_sweep.png", dpi=120)
    pyplot.close(figure)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.prior_states import load_benchmark_model, make_requests, random_states
    from priorzero.lightzero import resolve_device
    from priorzero.llm.module import pick_dtype

    device = resolve_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    with tempfile.TemporaryDirectory(prefix="priorzero-prior-") as work:
        bench = load_benchmark_model(
            args.model, device, dtype, Path(work), args, need_files=_needs_vllm(args.methods)
        )
        played = random_states(args)
        points = sweep_points(args)
        # Other texts at every point: what a cache still holds of an earlier one must not help.
        inputs = {
            p: make_requests(bench.tokeniser, played, *p[1:], seed=args.seed + 1000 * i)
            for i, p in enumerate(points)
        }
        say(
            f"{bench.resolved.name}, {dtype} on {device}; prompts of {inputs[points[0]].describe()}"
        )
        results, failed = await measure(args, bench, inputs, say)
    rows = [
        {
            "varies": p[0],
            "prompt_tokens": p[1],
            "actions": p[2],
            "states": p[3],
            "method": name,
            "states_per_second": m.states_per_second,
            "timed_states": m.states,
        }
        for p in points
        for name, m in results[p].items()
    ]
    if args.sweep:
        write_sweep(
            args.out,
            rows,
            f"{bench.resolved.name}, {str(dtype).removeprefix('torch.')} on {device}",
        )
    gc.collect()
    return {
        "benchmark": "prior",
        "model": bench.resolved.name,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_tokens": args.prompt_tokens,
        "actions": args.actions,
        "states": args.states,
        **summarise(results[points[0]]),
        "failed": failed,
    }


def _needs_vllm(methods: list[str]) -> bool:
    return bool({"trie", "vllm_per_action"} & set(methods))


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    quiet_logging()
    result = asyncio.run(run(args))
    finish(result | {"machine": machine_facts()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
