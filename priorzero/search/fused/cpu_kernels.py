"""Walking and backup compiled for the CPU, over the arrays of `priorzero/search/tree.py`.

Line by line what `Tree`, `puct` (`search/rules.py`) and `root_policies/gumbel.py` compute, for one
root after the other: the same order of operations in float64, without fused multiply-adds, so that
PUCT's numbers are equal to the last bit and the other rule's up to the order of sums. numba
compiles at the first call on a machine (seconds) and keeps the result beside this file.

Letters: `B` roots, `N` nodes, `K` action ids, `n` simulations.
"""

from __future__ import annotations

import math

import numba
import numpy as np

# As in root_policies/gumbel.py: log-probability of what the prior leaves no room for, and the
# smallest probability that weighs a tried action.
_NOTHING, _TINY = -1e9, float(np.finfo(np.float32).tiny)

_compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


@_compiled
def _best_by_puct(visits, returns, prior, value, low, high, exploration, smallest, allowed):
    """The action with the largest PUCT score, of `[K]` arrays; ties go to the lower id."""
    known = high >= low
    span = max(high - low, smallest)
    best, best_score = -1, -np.inf
    for a in range(len(visits)):
        if not allowed[a]:
            continue
        q = returns[a] / visits[a] if visits[a] > 0.0 else value
        score = (q - low) / span if known else 0.0
        score += exploration * prior[a] / (1.0 + visits[a])
        if best < 0 or score > best_score:
            best, best_score = a, score
    return best


@_compiled
def _completed(visits, returns, prior, total, value, allowed, smallest):
    """Of `[K]` arrays: the value of an action not tried, smallest completed Q and range of those
    allowed, and the largest visit count.
    """
    count, tried, mass, weighted, most = 0.0, 0.0, 0.0, 0.0, 0.0
    for a in range(len(visits)):
        if visits[a] > 0.0:
            q = returns[a] / visits[a]
            p = max(prior[a], _TINY)
            count += visits[a]
            tried += visits[a] * q
            mass += p
            weighted += p * q
            most = max(most, visits[a])

    # The node's value holds the network's own and every return below it.
    own = value * total - tried
    weighted /= mass if mass > 0.0 else 1.0
    mixed = (own + count * weighted) / (count + 1.0)

    low, high = np.inf, -np.inf
    for a in range(len(visits)):
        if allowed[a]:
            q = returns[a] / visits[a] if visits[a] > 0.0 else mixed
            low, high = min(low, q), max(high, q)
    return mixed, low, max(high - low, smallest), most


@_compiled
def _best_by_halving(
    visits, returns, prior, total, value, allowed, gumbel, wanted, constant, scale, smallest
):
    """The allowed action of `wanted` visits with the largest g + log p + sigma(q)."""
    mixed, low, span, most = _completed(visits, returns, prior, total, value, allowed, smallest)
    weight = (constant + most) * scale
    best, best_score = -1, -np.inf
    for a in range(len(visits)):
        if not allowed[a] or visits[a] != wanted:
            continue
        q = returns[a] / visits[a] if visits[a] > 0.0 else mixed
        log_prior = math.log(max(prior[a], 1e-300)) if prior[a] > 0.0 else _NOTHING
        score = max(gumbel[a] + log_prior + weight * ((q - low) / span), _NOTHING)
        if best < 0 or score > best_score:
            best, best_score = a, score
    return best


@_compiled
def _best_by_improved_policy(
    visits, returns, prior, log_prior, total, value, all_ids, constant, scale, smallest, scratch
):
    """The action whose share of visits is furthest below pi' = softmax(log p + sigma(q))."""
    mixed, low, span, most = _completed(visits, returns, prior, total, value, all_ids, smallest)
    weight = (constant + most) * scale
    largest = -np.inf
    for a in range(len(visits)):
        q = returns[a] / visits[a] if visits[a] > 0.0 else mixed
        scratch[a] = log_prior[a] + weight * ((q - low) / span)
        largest = max(largest, scratch[a])

    mass = 0.0
    for a in range(len(visits)):
        scratch[a] = math.exp(scratch[a] - largest)
        mass += scratch[a]

    best, best_score = -1, -np.inf
    for a in range(len(visits)):
        score = scratch[a] / mass - visits[a] / total
        if best < 0 or score > best_score:
            best, best_score = a, score
    return best


@_compiled
def walk(
    child,
    visits,
    returns,
    prior,
    log_prior,
    node_visits,
    node_returns,
    low,
    high,
    valid,
    halving,
    exploration,
    gumbel,
    schedule,
    constants,
    path,
    depth,
):
    """Walk down from every root to an action not yet expanded.

    Args:
        log_prior: `[B, N, K]` of inner nodes, with `halving`; else anything.
        constants: visit_constant, value_scale, smallest_range.
        path: `[B, N, 2]` int64, filled with the nodes and actions of each walk.
        depth: `[B]` int64, filled with the last index of `path` that was filled.
        others: as in `TreeArrays` and `FusedRule`.
    """
    constant, scale, smallest = constants
    everything = np.ones(visits.shape[2], dtype=np.bool_)
    scratch = np.empty(visits.shape[2])
    for b in range(len(child)):
        node, level = 0, 0
        while True:
            v, r, p = visits[b, node], returns[b, node], prior[b, node]
            total = node_visits[b, node]
            value = node_returns[b, node] / total
            allowed = valid[b] if node == 0 else everything

            if not halving:
                factor = exploration[int(total)]
                action = _best_by_puct(v, r, p, value, low[b], high[b], factor, smallest, allowed)
            elif node == 0:
                # A node's own expansion is its first visit.
                wanted = schedule[b, int(total) - 1]
                action = _best_by_halving(
                    v, r, p, total, value, allowed, gumbel[b], wanted, constant, scale, smallest
                )
            else:
                logs = log_prior[b, node]
                action = _best_by_improved_policy(
                    v, r, p, logs, total, value, allowed, constant, scale, smallest, scratch
                )

            path[b, level, 0], path[b, level, 1] = node, action
            if child[b, node, action] == 0:
                break
            node, level = child[b, node, action], level + 1
        depth[b] = level


@_compiled
def grow(
    child,
    visits,
    returns,
    prior,
    log_prior,
    rewards,
    node_visits,
    node_returns,
    low,
    high,
    halving,
    discount,
    path,
    depth,
    new,
    new_rewards,
    new_values,
    new_priors,
):
    """Add node `new` at the end of every walk and back its value up.

    Args:
        new_rewards, new_values: `[B]` float64. new_priors: `[B, K]` probabilities.
        others: as in `walk`.
    """
    for b in range(len(child)):
        level = depth[b]
        child[b, path[b, level, 0], path[b, level, 1]] = new
        rewards[b, new] = new_rewards[b]
        node_visits[b, new], node_returns[b, new] = 1.0, new_values[b]
        for a in range(prior.shape[2]):
            p = np.float64(new_priors[b, a])
            prior[b, new, a] = p
            if halving:
                log_prior[b, new, a] = math.log(max(p, 1e-300)) if p > 0.0 else _NOTHING

        # From the leaf up: the return of a step is its reward and the discounted return below.
        gain, reward = new_values[b], new_rewards[b]
        while level >= 0:
            node, action = path[b, level, 0], path[b, level, 1]
            gain = reward + discount * gain
            visits[b, node, action] += 1.0
            returns[b, node, action] += gain
            node_visits[b, node] += 1.0
            node_returns[b, node] += gain

            q = returns[b, node, action] / visits[b, node, action]
            low[b], high[b] = min(low[b], q), max(high[b], q)
            reward, level = rewards[b, node], level - 1
