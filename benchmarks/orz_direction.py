"""Does Open-Reasoner-Zero's trainer teach the LLM what the built-in trainer teaches it? On
decisions that a run has played, from the weights of its checkpoint.

    python -m benchmarks.orz_direction RUN --checkpoint iter_00000006

Each trainer works in a process of its own, on the same decisions in the same order, all of them in
one optimiser step, without KL and without the weight for the search's draw, so that advantages
alone decide. Of all decisions that the LLM could have learnt from, those are taken that turned out
best and worst; one that was taken several times counts once, with its mean. Reported are:

* gradient_cosine: between the two gradients of the first step (Adam's first moment holds it), and
  the weights whose gradients differ most;
* of each trainer the change, from before the first update to after each, of what the engine gives
  to the action played, mean over the decisions with a positive and with a negative advantage:
  `tokens` of the summed log-probability of its tokens, which all rise together where answers in
  general become likelier; `policy` of its log-probability among the valid actions, which is what a
  search is told;
* engine_differs: of the engine's answers from the trainer's own forward after the last update,
  largest of any action of all states; canary is the same as a run checks it, on one state;
* seconds of an update, tokens computed in it, and the memory of the process with all its children,
  in GiB: in all, and what the trainer took beyond what stood before it was made;
* with `--device cuda` the most that tensors took of the GPU (torch's allocator), in this process,
  where model and transformers' engine are, and in ORZ's worker; a vLLM engine is in neither.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import ROOT, finish, quiet_logging, say
from priorzero.run.provenance import machine_facts
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    import torch

    from priorzero.llm.update.samples import LLMSample
    from priorzero.settings.experiment import ExperimentSettings
    from priorzero.types import ActionScores

TRAINERS = ("builtin", "orz")
WORST = 12  # weights whose gradients differ most, reported one by one


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.orz_direction", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="folder of a run whose LLM all weights train")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a folder's name")
    parser.add_argument("--count", type=int, default=8, help="decisions, half of each sign")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "auto"], default="float32", help="of the forward"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--learning-rate", type=float, help="default: the run's")
    parser.add_argument("--trainer", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.count < 2 or args.updates < 1:
        parser.error("it takes two decisions and an update")
    return args


# ---- one trainer ---------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, trainer: str) -> ExperimentSettings:
    """The run's, with what makes the two trainers comparable."""
    from priorzero.export import read_settings
    from priorzero.settings.experiment import ExperimentSettings
    from priorzero.settings.record import overlay
    from priorzero_config import PRESETS

    settings = overlay(ExperimentSettings(), read_settings(args.run))
    settings = overlay(
        settings, PRESETS["orz"].settings
    )  # objective and estimator, as ORZ has them
    rate = args.learning_rate or settings.llm.train.learning_rate
    settings = overlay(
        settings,
        {
            "llm": {
                "trainer": trainer,
                "engine": args.engine,
                "required": True,
                "dtype": args.dtype,
                "share_weights": False,
                "score_cache_size": 0,
                "train": {"batch_size": 0, "kl_coef": 0.0, "learning_rate": rate},
                "rft": {"epochs": 1, "samples": args.count, "max_importance": 0.0},
                "orz": {"dtype": args.dtype, "on_failure": "error"},
            }
        },
    )
    settings.llm.validate("llm.")
    return settings


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What one trainer did, and the gradient of its first step."""
    import torch

    from priorzero.export_samples import read_samples
    from priorzero.llm.build import build_llm
    from priorzero.run.checkpoint import CheckpointStore
    from priorzero_prompts import ACTION_MARKER, prompt_builder

    settings = settings_of(args, args.trainer)
    samples, meta = read_samples(args.run, settings, args.checkpoint, None)
    samples = clearest(samples, args.count)
    state = CheckpointStore(args.run / "ckpt").load(meta["checkpoint"])[1]
    # The checkpoint's weights; the optimiser begins anew, so that it shows the first gradient.
    state["optimizer"]["state"], state["steps"] = {}, 0

    with peak_memory() as memory:
        base = memory.update()
        started = time.perf_counter()
        llm = await build_llm(
            settings.llm,
            device=args.device,
            reduction=settings.policy.root_prior.reduction,
            seed=settings.seed,
            marker=ACTION_MARKER,
            make_prompt=partial(prompt_builder, settings.llm.prompt),
        )
        try:
            await asyncio.to_thread(llm.trainer.load_state_dict, state)
            await llm.phase.publish()
            started = time.perf_counter() - started
            requests = [sample.request for sample in samples]
            before = await llm.engine.score(requests)

            seconds, phases, told, gradient = [], [], {}, None
            for _ in range(args.updates):
                began = time.perf_counter()
                phases.append(await llm.phase.run(lambda count, recent: samples))
                seconds.append(time.perf_counter() - began)
                if gradient is None:
                    gradient = first_gradient(llm.trainer)
                after = await llm.engine.score(requests)
                told = moves(samples, before, after, settings, told)
            own = await asyncio.to_thread(llm.trainer.score, requests)
        finally:
            await llm.engine.close()
            await asyncio.to_thread(llm.trainer.close)
        peak = memory.update()

    pairs = zip(after, own, strict=True)
    differing = [np.abs(np.subtract(a.totals(), b.totals())).max() for a, b in pairs]
    return {
        "checkpoint": meta["checkpoint"],
        "game": meta["game"],
        **told,
        "engine_differs": float(max(differing)),
        "canary": max(phase["push_canary_diff"] for phase in phases),
        "grad_norm": [phase["rft_grad_norm"] for phase in phases],
        "policy_loss": [phase["rft_policy_loss"] for phase in phases],
        "computed_tokens": phases[0]["rft_tokens"],
        "gpu_gb": {
            "process": torch.cuda.max_memory_reserved() / 2**30,
            "worker": max(phase.get("rft_orz_gpu_gb", 0.0) for phase in phases),
        },
        "seconds_start": started,
        "seconds_update": seconds,
        "memory_gb": peak,
        "memory_beyond_gb": peak - base,
    }, gradient


def clearest(samples: Sequence[LLMSample], count: int) -> list[LLMSample]:
    """So many decisions, half with the largest and half with the smallest advantage; equal prompts
    with equal actions are one, with the mean advantage.

    Raises:
        PriorZeroError: there are not so many.
    """
    same: dict[Any, list[LLMSample]] = {}
    for sample in samples:
        action = sample.request.action_ids[sample.action_index]
        same.setdefault((sample.request.prompt_ids, action), []).append(sample)
    distinct = []
    for alike in same.values():
        mean = sum(sample.advantage for sample in alike) / len(alike)
        distinct.append(replace(alike[0], value_target=alike[0].predicted_value + mean))
    if len(distinct) < count:
        raise PriorZeroError(f"the checkpoint holds {len(distinct)} decisions, not {count}")
    distinct.sort(key=lambda sample: -sample.advantage)
    return distinct[: count // 2] + distinct[len(distinct) - (count - count // 2) :]


def first_gradient(trainer) -> dict[str, torch.Tensor]:
    """Name of a weight -> up to one factor for all: Adam's first moment after one step."""
    state = trainer.state_dict()
    kept = state["optimizer"]["state"]
    moments = (kept[i]["exp_avg"].flatten().cpu().double() for i in sorted(kept))
    return dict(zip(state["model"], moments, strict=True))


def compare_gradients(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Cosine of all, and of the weights that make most of the difference between the two, scaled to
    the same length.
    """
    import torch

    def whole(gradient: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradient[name] for name in ours])

    length, other = whole(ours).norm(), whole(theirs).norm()
    apart = {name: (ours[name] / length - theirs[name] / other).square().sum() for name in ours}
    total = sum(apart.values())
    worst = sorted(apart, key=lambda name: -apart[name])[:WORST]
    return {
        "gradient_cosine": float(whole(ours) @ whole(theirs) / (length * other)),
        "gradient_differs": [
            {
                "weight": name,
                "cosine": float(torch.cosine_similarity(ours[name], theirs[name], dim=0)),
                "share_of_difference": float(apart[name] / total),
            }
            for name in worst
        ],
    }


def moves(
    samples: Sequence[LLMSample],
    before: Sequence[ActionScores],
    after: Sequence[ActionScores],
    settings: ExperimentSettings,
    earlier: dict[str, Any],
) -> dict[str, Any]:
    """How what was played became likelier, by the sign of its advantage.

    Args:
        samples: the decisions of every update.
        before, after: the engine's answers to them.
        settings: of the run: how advantages are normalised, and token log-probabilities reduced.
        earlier: what this gave after the updates before, to which the means are added.
    """
    from priorzero.llm.update.advantages import Advantages

    raw = np.asarray([sample.advantage for sample in samples])
    advantages = np.asarray(Advantages(settings.llm.rft.advantage)(raw))
    up, down = advantages > 0, advantages < 0
    assert up.any() and down.any(), "all decisions turned out better, or all worse, than expected"

    def played(answers: Sequence[ActionScores]) -> dict[str, np.ndarray]:
        """`[N]` of the actions played, per measure."""
        kept: dict[str, list[float]] = {"tokens": [], "policy": []}
        for sample, answer in zip(samples, answers, strict=True):
            action = sample.action_index
            among = np.asarray(answer.totals(settings.policy.root_prior.reduction))
            kept["tokens"].append(answer.totals()[action])
            kept["policy"].append(among[action] - np.logaddexp.reduce(among))
        return {measure: np.asarray(values) for measure, values in kept.items()}

    first, now = played(before), played(after)
    told: dict[str, Any] = {"positive": int(up.sum()), "negative": int(down.sum())}
    for measure in first:
        changes = now[measure] - first[measure]
        so_far = earlier.get(measure, {"positive": [], "negative": []})
        told[measure] = {
            "positive": [*so_far["positive"], float(changes[up].mean())],
            "negative": [*so_far["negative"], float(changes[down].mean())],
            "positive_rising": float((changes[up] > 0).mean()),
            "negative_falling": float((changes[down] < 0).mean()),
            "changes": changes.tolist(),
        }
    return told | {"advantages": advantages.tolist()}


@contextmanager
def peak_memory() -> Iterator[Any]:
    """Looks several times a second, since children are seen only when somebody looks."""
    from priorzero.run.metrics import PeakMemory

    peak, done = PeakMemory(), threading.Event()

    def look() -> None:
        while not done.wait(0.3):
            peak.update()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


# ---- both ----------------------------------------------------------------------------------------


def compare(arguments: list[str]) -> dict[str, Any]:
    """Let each trainer do its part, and hold them against each other."""
    import torch

    found, gradients = {}, []
    with tempfile.TemporaryDirectory(prefix="priorzero-direction-") as work:
        for name in TRAINERS:
            out = Path(work) / name
            command = [sys.executable, "-m", "benchmarks.orz_direction", *arguments]
            subprocess.run([*command, "--trainer", name, "--out", str(out)], check=True, cwd=ROOT)
            kept = torch.load(out)
            found[name] = json.loads(kept["found"])
            gradients.append(kept["gradient"])
            say(f"{name}: {told(found[name])}")
    compared = compare_gradients(*gradients)
    say(f"cosine of the first step's gradients: {compared['gradient_cosine']:.6f}")
    return compared | {"trainers": found}


def told(found: dict[str, Any]) -> str:
    """A trainer's result in a line."""
    policy, tokens = (
        " and ".join(f"{found[measure][sign][-1]:+.4f}" for sign in ("positive", "negative"))
        for measure in ("policy", "tokens")
    )
    return (
        f"of decisions with a positive and with a negative advantage {policy} nats among the valid "
        f"actions, {tokens} of the tokens; engine differs by {found['engine_differs']:.2g}; "
        f"{found['seconds_update'][-1]:.1f} s an update, {found['memory_gb']:.1f} GiB, of the GPU "
        f"{found['gpu_gb']['process']:.1f} and in a worker {found['gpu_gb']['worker']:.1f}"
    )


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(given)
    quiet_logging()
    if args.trainer is not None:
        import torch

        found, gradient = asyncio.run(measure(args))
        torch.save({"found": json.dumps(found), "gradient": gradient}, args.out)
        return 0

    result = compare(given)
    asking = ("count", "updates", "dtype", "engine", "device")
    asked = {name: getattr(args, name) for name in asking}
    finish({"benchmark": "orz_direction"} | asked | result | {"machine": machine_facts()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
