"""Record what mctx's Gumbel MuZero does on made-up games; `test_gumbel.py` holds ours against it.

    pip install mctx "jax[cpu]" && python tests/search/record_gumbel_cases.py

in an environment of its own (recorded with mctx 0.0.71, jax 0.10.2). Writes gumbel_cases.json
beside this file. A game is tables over `S` states: taking action a in state s earns rewards[s][a]
and leads to (s * K + a + 1) mod S; the network says values[s] and logits[s] of a state.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import mctx
import numpy as np

STATES, ACTIONS, BATCH, DISCOUNT = 31, 6, 3, 0.9


def record(seed: int, simulations: int, considered: int, noise: float, masked: bool) -> dict:
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(STATES, ACTIONS)).round(3)
    values = rng.normal(size=STATES).round(3)
    logits = rng.normal(scale=2.0, size=(STATES, ACTIONS)).round(3)
    roots = rng.integers(STATES, size=BATCH)
    invalid = np.zeros((BATCH, ACTIONS), dtype=int)
    if masked:
        # More valid actions than simulations: each row keeps an untried one, whose completed Q is
        # also that of mctx's invalid actions.
        invalid[:, -1] = 1

    tables = [jnp.asarray(x, dtype=jnp.float32) for x in (rewards, values, logits)]

    def step(params, key, action, state):
        r, v, p = tables
        following = (state * ACTIONS + action + 1) % STATES
        output = mctx.RecurrentFnOutput(
            reward=r[state, action],
            discount=jnp.full(action.shape, DISCOUNT),
            prior_logits=p[following],
            value=v[following],
        )
        return output, following

    at = jnp.asarray(roots)
    root = mctx.RootFnOutput(prior_logits=tables[2][at], value=tables[1][at], embedding=at)
    out = mctx.gumbel_muzero_policy(
        (),
        jax.random.PRNGKey(seed),
        root,
        step,
        num_simulations=simulations,
        invalid_actions=jnp.asarray(invalid),
        max_num_considered_actions=considered,
        gumbel_scale=noise,
    )
    tree = out.search_tree
    return {
        "simulations": simulations,
        "considered": considered,
        "rewards": rewards.tolist(),
        "values": values.tolist(),
        "logits": logits.tolist(),
        "roots": roots.tolist(),
        "invalid": invalid.tolist(),
        "gumbel": np.asarray(tree.extra_data.root_gumbel, dtype=float).round(6).tolist(),
        "visits": np.asarray(tree.children_visits[:, 0]).tolist(),
        "improved": np.asarray(out.action_weights, dtype=float).round(6).tolist(),
        "action": np.asarray(out.action).tolist(),
        "root_value": np.asarray(tree.node_values[:, 0], dtype=float).round(6).tolist(),
    }


def main() -> None:
    grid = [(n, m, g) for n in (4, 16, 50) for m in (2, 4, 16) for g in (0.0, 1.0)]
    cases = [record(i, n, m, g, masked=n == 4) for i, (n, m, g) in enumerate(grid)]
    document = {"actions": ACTIONS, "states": STATES, "discount": DISCOUNT, "cases": cases}
    path = Path(__file__).with_name("gumbel_cases.json")
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
