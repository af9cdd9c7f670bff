"""Milliseconds per simulation of the search: fused, plain, LightZero's C++ tree and mctx, in turns
in one process.

    python -m benchmarks.search --roots 8 --widths 128
    python -m benchmarks.search --device cuda --roots 8,32,64 --widths 128,512,768 --simulations 50

A plan is all of `Planner.plan`: the network on the roots' contexts, the mixture, n simulations and
the targets. Reported per simulation of all roots together:

* `ms`: a plan's median wall time, divided by n. `best_ms`: of the fastest plan.
* `further_ms`: what one more simulation costs, from plans with n and n / 2 simulations.
* `cpu_ms`: the process's CPU time in place of wall time, which other work on the machine disturbs
  less.

Methods: `fused` and `plain` are `policy.search_backend`; `lightzero` is the root policy of that
name, LightZero's C++ tree, with the network as in `plain`. `mctx` (only where jax and mctx are
installed) is mctx's jitted search with the same products per simulation (tokens, layers, heads),
but without attention: its embeddings have no place for keys and values of a path. It does not read
the roots' contexts either, and its jax uses all cores; both favour it. Weights, roots and their
valid actions are drawn at random.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.common import finish, quiet_logging, say, synchronize
from priorzero.run.provenance import machine_facts

METHODS = ("fused", "plain", "lightzero", "mctx")
TEXT_DIM, CONTEXT, SUPPORT = 384, 4, 50


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.search", description=__doc__.splitlines()[0])
    parser.add_argument("--roots", default="8", help="numbers of roots, with commas")
    parser.add_argument("--widths", default="128", help="of the network, with commas")
    parser.add_argument("--actions", type=int, default=256, help="K, ids nodes branch over")
    parser.add_argument("--valid", type=int, default=12, help="valid actions of a root")
    parser.add_argument("--simulations", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--root-policy", choices=["puct", "gumbel"], default="puct")
    parser.add_argument("--precision", choices=["float32", "tf32"], default="float32")
    parser.add_argument("--methods", default="fused,plain,lightzero", help=", ".join(METHODS))
    parser.add_argument("--plans", type=int, default=10, help="timed plans of each method")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the network")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)

    args = parser.parse_args(arguments)
    args.methods = args.methods.split(",")
    unknown = [m for m in args.methods if m not in METHODS]
    if unknown:
        parser.error(f"--methods {', '.join(unknown)} is unknown; there are {', '.join(METHODS)}")
    if "mctx" in args.methods and importlib.util.find_spec("mctx") is None:
        parser.error("--methods mctx: install mctx and jax first, in an environment of your own")
    args.roots, args.widths = ([int(x) for x in v.split(",")] for v in (args.roots, args.widths))
    if args.simulations < 2 or args.valid > args.actions:
        parser.error("--simulations must be at least 2, --valid at most --actions")
    return args


@dataclass(frozen=True)
class Case:
    """One size of network and batch."""

    width: int
    roots: int


def build_policy(args: argparse.Namespace, width: int, folder: str):
    """A policy of this width with drawn weights: the heads' last layers start at zero, where all
    actions are alike.
    """
    import torch

    from priorzero.lightzero import compile_priorzero
    from priorzero_config import get_priorzero_config
    from priorzero_policy import PriorZeroPolicy

    settings = dict(
        device=args.device,
        embed_dim=width,
        num_layers=args.layers,
        num_heads=4 if width < 256 else 8,
        num_simulations=args.simulations,
        support_scale=SUPPORT,
        context_steps=CONTEXT,
        search_threads=args.threads,
        root_policy=args.root_policy,
        search_precision=args.precision,
        action_vocabulary=dict(kind="positional", capacity=args.actions + 1, overflow=1),
    )
    cfg, create = get_priorzero_config(
        env_id="tw-simple",
        seed=args.seed,
        exp_name=folder,
        enable_llm=False,
        overrides=dict(policy=settings),
    )
    torch.manual_seed(args.seed)
    policy = PriorZeroPolicy(compile_priorzero(cfg, create, TEXT_DIM).policy)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
    return policy


def random_roots(args: argparse.Namespace, count: int) -> list:
    from priorzero.search.roots import Root

    rng = np.random.default_rng(args.seed)
    return [
        Root(
            rng.normal(size=(CONTEXT, TEXT_DIM), scale=TEXT_DIM**-0.5).astype(np.float32),
            rng.integers(args.actions, size=CONTEXT - 1),
            np.sort(rng.choice(args.actions, size=args.valid, replace=False)),
        )
        for _ in range(count)
    ]


def planner_of(args: argparse.Namespace, policy, method: str, simulations: int):
    """A planner of the policy's network, in this method."""
    from priorzero.lightzero import resolve_device
    from priorzero.search.planner import Planner
    from priorzero.world_model.categorical import Support

    changes: dict[str, Any] = dict(num_simulations=simulations)
    if method == "lightzero":
        changes |= dict(root_policy="lightzero", search_backend="plain")
    else:
        changes |= dict(search_backend=method)
    device = resolve_device(args.device)
    scalar_of = Support(SUPPORT, device).scalars
    return Planner(policy.network, replace(policy.settings, **changes), scalar_of, device)


def plan_of(args: argparse.Namespace, policy, method: str, case: Case, simulations: int):
    """A call that plans once."""
    if method == "mctx":
        return mctx_plan(args, case, simulations)
    roots = random_roots(args, case.roots)
    planner = planner_of(args, policy, method, simulations)
    prior = policy.settings.root_prior
    noise = np.random.default_rng(args.seed)
    return lambda: planner.plan(roots, args.actions, prior, 0, noise)


def mctx_plan(args: argparse.Namespace, case: Case, simulations: int) -> Callable[[], Any]:
    """mctx's search over a network of the same products; see the module."""
    import jax
    import jax.numpy as jnp
    import mctx

    width, keys = case.width, iter(jax.random.split(jax.random.PRNGKey(args.seed), 256))

    def matrix(rows: int, columns: int):
        return jax.random.normal(next(keys), (rows, columns)) * (0.5 / rows**0.5)

    def token():
        sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
        return [[matrix(*size) for size in sizes] for _ in range(args.layers)]

    support = 2 * SUPPORT + 1
    weights = dict(
        actions=matrix(args.actions, width),
        tokens=[token(), token()],
        firsts=[matrix(width, 2 * width), matrix(width, 2 * width)],
        lasts=[matrix(width, n) for n in (support, width, support, args.actions)],
    )

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def run(x, layers):
        for qkv, proj, up, down in layers:
            h = norm(x) @ qkv
            x = x + (h[:, :width] + h[:, width : 2 * width] + h[:, 2 * width :]) @ proj
            x = x + jax.nn.gelu(norm(x) @ up) @ down
        return norm(x)

    def scalar(logits):
        return jax.nn.softmax(logits) @ jnp.arange(-SUPPORT, SUPPORT + 1.0)

    def step(w, key, action, latent):
        reward, following, value, policy = w["lasts"]
        h = jax.nn.gelu(run(latent + w["actions"][action], w["tokens"][0]) @ w["firsts"][0])
        latent = jax.nn.softmax((h[:, width:] @ following).reshape(-1, width // 8, 8))
        latent = latent.reshape(-1, width)
        g = jax.nn.gelu(run(latent, w["tokens"][1]) @ w["firsts"][1])
        output = mctx.RecurrentFnOutput(
            reward=scalar(h[:, :width] @ reward),
            discount=jnp.full(action.shape, 0.99),
            prior_logits=g[:, width:] @ policy,
            value=scalar(g[:, :width] @ value),
        )
        return output, latent

    invalid = np.ones((case.roots, args.actions), dtype=bool)
    for row, root in enumerate(random_roots(args, case.roots)):
        invalid[row, root.valid_ids] = False
    search = mctx.muzero_policy if args.root_policy == "puct" else mctx.gumbel_muzero_policy
    latents = jax.random.normal(next(keys), (case.roots, width))

    @jax.jit
    def plan(w, latents):
        root = mctx.RootFnOutput(
            prior_logits=latents @ w["lasts"][3],
            value=scalar(latents @ w["lasts"][2]),
            embedding=latents,
        )
        key = jax.random.PRNGKey(args.seed)
        return search(w, key, root, step, simulations, invalid_actions=jnp.asarray(invalid))

    return lambda: jax.block_until_ready(plan(weights, latents).action)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall and of CPU time."""
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(args: argparse.Namespace, policy, case: Case) -> list[dict[str, Any]]:
    """One row per method; their plans are timed in turns."""
    half = args.simulations // 2
    works = {
        (method, n): plan_of(args, policy, method, case, n)
        for method in args.methods
        for n in (args.simulations, half)
    }
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in works}
    for _ in range(2):  # compiled, captured, allocated
        for work in works.values():
            timed(work)
    for _ in range(args.plans):
        for key, work in works.items():
            seconds[key].append(timed(work))

    rows = []
    for method in args.methods:
        wall, cpu = zip(*seconds[method, args.simulations], strict=True)
        shorter, _ = zip(*seconds[method, half], strict=True)
        middle = statistics.median
        row = dict(
            method=method,
            width=case.width,
            roots=case.roots,
            ms=1e3 * middle(wall) / args.simulations,
            best_ms=1e3 * min(wall) / args.simulations,
            further_ms=1e3 * (min(wall) - min(shorter)) / (args.simulations - half),
            cpu_ms=1e3 * middle(cpu) / args.simulations,
        )
        rows.append(row)
        say(
            "{method:10s} width {width:4d}, {roots:3d} roots: {ms:8.3f} ms a simulation "
            "(best {best_ms:.3f}, one more {further_ms:.3f}, CPU {cpu_ms:.3f})".format(**row)
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    quiet_logging()
    from priorzero.lightzero import resolve_device

    rows = []
    for width in args.widths:
        with tempfile.TemporaryDirectory(prefix="priorzero-benchmark-") as work:
            policy = build_policy(args, width, work)
        for roots in args.roots:
            rows += measure(args, policy, Case(width, roots))

    keys = "actions valid simulations layers root_policy precision plans threads seed".split()
    finish(
        {
            "benchmark": "search",
            "results": rows,
            "settings": {key: getattr(args, key) for key in keys},
            "device": resolve_device(args.device),
            "machine": machine_facts(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
