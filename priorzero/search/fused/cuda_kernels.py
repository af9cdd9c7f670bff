"""Walking and backup on a GPU: one Triton program per root, the ids of a node side by side.

The choices of `cpu_kernels.py`, in float64 and without fused multiply-adds as there; only sums over
a node's ids are added up in another order. What differs from one search to the next is read from
memory and never a launch argument, because a captured graph keeps its arguments.

Letters: `B` roots, `N` nodes, `K` ids there is room for, of which the first `limit` are used.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As in root_policies/gumbel.py: log-probability of what the prior leaves no room for, and the
# smallest probability that weighs a tried action.
NOTHING = -1e9
_NOTHING, _TINY = tl.constexpr(NOTHING), tl.constexpr(2.0**-126)


@triton.jit
def _completed(visits, returns, prior, total, value, allowed, smallest):
    """Completed Q scaled to 0..1 over `allowed`, and the largest visit count."""
    tried = visits > 0.0
    q = returns / tl.where(tried, visits, 1.0)
    count = tl.sum(visits, 0)
    # The node's value holds the network's own and every return below it.
    own = value * total - tl.sum(tl.where(tried, visits * q, 0.0), 0)

    weight = tl.where(tried, tl.maximum(prior, _TINY), 0.0)
    mass = tl.sum(weight, 0)
    weighted = tl.sum(weight * q, 0) / tl.where(mass > 0.0, mass, 1.0)
    mixed = (own + count * weighted) / (count + 1.0)

    q = tl.where(tried, q, mixed)
    low = tl.min(tl.where(allowed, q, float("inf")), 0)
    high = tl.max(tl.where(allowed, q, float("-inf")), 0)
    return (q - low) / tl.maximum(high - low, smallest), tl.max(visits, 0)


@triton.jit
def _choose(
    b,
    node,
    ids,
    inside,
    allowed,
    limit,
    visits_ptr,
    returns_ptr,
    prior_ptr,
    log_prior_ptr,
    node_visits_ptr,
    node_returns_ptr,
    low,
    high,
    exploration_ptr,
    gumbel_ptr,
    schedule_ptr,
    constants_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROOT: tl.constexpr,
    HALVING: tl.constexpr,
):
    """The action of the largest score in `node`; ties go to the lower id."""
    row = (b * N + node) * K + ids
    visits = tl.load(visits_ptr + row, mask=inside, other=0.0)
    returns = tl.load(returns_ptr + row, mask=inside, other=0.0)
    prior = tl.load(prior_ptr + row, mask=inside, other=0.0)
    total = tl.load(node_visits_ptr + b * N + node)
    value = tl.load(node_returns_ptr + b * N + node) / total
    smallest = tl.load(constants_ptr + 3)

    if HALVING:
        q, most = _completed(visits, returns, prior, total, value, allowed, smallest)
        weight = (tl.load(constants_ptr + 1) + most) * tl.load(constants_ptr + 2)
        logits = tl.load(log_prior_ptr + row, mask=inside, other=_NOTHING) + weight * q
        if ROOT:
            # A node's own expansion is its first visit.
            wanted = tl.load(schedule_ptr + b * (N - 1) + total.to(tl.int32) - 1)
            gumbel = tl.load(gumbel_ptr + b * K + ids, mask=inside, other=0.0)
            score = tl.maximum(gumbel + logits, _NOTHING)
            score = tl.where(allowed & (visits == wanted), score, float("-inf"))
        else:
            logits = tl.where(allowed, logits, float("-inf"))
            share = tl.exp(logits - tl.max(logits, 0))
            score = share / tl.sum(share, 0) - visits / total
            score = tl.where(allowed, score, float("-inf"))
    else:
        known = high >= low
        span = tl.maximum(high - low, smallest)
        tried = visits > 0.0
        q = tl.where(tried, returns / tl.where(tried, visits, 1.0), value)
        scaled = tl.where(known, (q - low) / span, 0.0)
        exploration = tl.load(exploration_ptr + total.to(tl.int32))
        score = scaled + exploration * prior / (1.0 + visits)
        score = tl.where(allowed, score, float("-inf"))

    # Scores that are no numbers must not lead out of the arrays.
    return tl.minimum(tl.argmax(score, 0), limit - 1)


@triton.jit
def plant(
    child_ptr,
    visits_ptr,
    returns_ptr,
    prior_ptr,
    log_prior_ptr,
    node_visits_ptr,
    node_returns_ptr,
    low_ptr,
    high_ptr,
    root_priors_ptr,
    root_values_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HALVING: tl.constexpr,
):
    """Begin the tree of root `program_id(0)`: of probabilities `[B, K]`, and a value `[B]`."""
    b = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    inside = ids < K
    row = b * N * K + ids
    prior = tl.load(root_priors_ptr + b * K + ids, mask=inside, other=0.0)
    tl.store(prior_ptr + row, prior, mask=inside)
    if HALVING:
        log_prior = tl.where(prior > 0.0, tl.log(tl.maximum(prior, 1e-300)), _NOTHING)
        tl.store(log_prior_ptr + row, log_prior, mask=inside)

    # What the last search left there.
    tl.store(child_ptr + row, tl.zeros([BLOCK], tl.int32), mask=inside)
    tl.store(visits_ptr + row, tl.zeros([BLOCK], tl.float64), mask=inside)
    tl.store(returns_ptr + row, tl.zeros([BLOCK], tl.float64), mask=inside)

    tl.store(node_visits_ptr + b * N, 1.0)
    tl.store(node_returns_ptr + b * N, tl.load(root_values_ptr + b))
    tl.store(low_ptr + b, float("inf"))
    tl.store(high_ptr + b, float("-inf"))


@triton.jit
def walk(
    child_ptr,
    visits_ptr,
    returns_ptr,
    prior_ptr,
    log_prior_ptr,
    node_visits_ptr,
    node_returns_ptr,
    low_ptr,
    high_ptr,
    valid_ptr,
    exploration_ptr,
    gumbel_ptr,
    schedule_ptr,
    constants_ptr,
    limit_ptr,
    path_ptr,
    depth_ptr,
    parents_ptr,
    actions_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HALVING: tl.constexpr,
):
    """Walk down from root `program_id(0)` to an action not yet expanded.

    Reads the arrays of `CudaTree`; writes `path` `[B, N, 2]`, `depth` `[B]`, the last index of it
    that was filled, and its last node and action to `parents` and `actions` `[B]`.
    """
    b = tl.program_id(0)
    limit = tl.load(limit_ptr)
    ids = tl.arange(0, BLOCK)
    inside = ids < limit
    valid = inside & (tl.load(valid_ptr + b * K + ids, mask=inside, other=0) != 0)
    low, high = tl.load(low_ptr + b), tl.load(high_ptr + b)

    node = limit * 0
    level = limit * 0
    action = _choose(
        b,
        node,
        ids,
        inside,
        valid,
        limit,
        visits_ptr,
        returns_ptr,
        prior_ptr,
        log_prior_ptr,
        node_visits_ptr,
        node_returns_ptr,
        low,
        high,
        exploration_ptr,
        gumbel_ptr,
        schedule_ptr,
        constants_ptr,
        N,
        K,
        True,
        HALVING,
    )
    tl.store(path_ptr + b * N * 2, node)
    tl.store(path_ptr + b * N * 2 + 1, action)
    following = tl.load(child_ptr + b * N * K + action)

    while following > 0:
        node = following
        level += 1
        action = _choose(
            b,
            node,
            ids,
            inside,
            inside,
            limit,
            visits_ptr,
            returns_ptr,
            prior_ptr,
            log_prior_ptr,
            node_visits_ptr,
            node_returns_ptr,
            low,
            high,
            exploration_ptr,
            gumbel_ptr,
            schedule_ptr,
            constants_ptr,
            N,
            K,
            False,
            HALVING,
        )
        tl.store(path_ptr + (b * N + level) * 2, node)
        tl.store(path_ptr + (b * N + level) * 2 + 1, action)
        following = tl.load(child_ptr + (b * N + node) * K + action)

    tl.store(depth_ptr + b, level)
    tl.store(parents_ptr + b, node)
    tl.store(actions_ptr + b, action)


@triton.jit(do_not_specialize=["new"])
def grow(
    child_ptr,
    visits_ptr,
    returns_ptr,
    prior_ptr,
    log_prior_ptr,
    rewards_ptr,
    node_visits_ptr,
    node_returns_ptr,
    low_ptr,
    high_ptr,
    constants_ptr,
    limit_ptr,
    path_ptr,
    depth_ptr,
    new_rewards_ptr,
    new_values_ptr,
    logits_ptr,
    new,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HALVING: tl.constexpr,
):
    """Add node `new` at the end of root `program_id(0)`'s walk and back its value up.

    `new_rewards`, `new_values`: `[B]` float64. `logits`: `[B, K]` of the network's policy there.
    """
    b = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    inside = ids < tl.load(limit_ptr)

    # Its policy, in the logits' own precision as everywhere.
    logits = tl.load(logits_ptr + b * K + ids, mask=inside, other=float("-inf"))
    share = tl.exp(logits - tl.max(logits, 0))
    prior = (share / tl.sum(share, 0)).to(tl.float64)
    row = (b * N + new) * K + ids
    tl.store(prior_ptr + row, prior, mask=inside)
    if HALVING:
        log_prior = tl.where(prior > 0.0, tl.log(tl.maximum(prior, 1e-300)), _NOTHING)
        tl.store(log_prior_ptr + row, log_prior, mask=inside)

    # What the last search left there.
    tl.store(child_ptr + row, tl.zeros([BLOCK], tl.int32), mask=inside)
    tl.store(visits_ptr + row, tl.zeros([BLOCK], tl.float64), mask=inside)
    tl.store(returns_ptr + row, tl.zeros([BLOCK], tl.float64), mask=inside)

    gain = tl.load(new_values_ptr + b)
    reward = tl.load(new_rewards_ptr + b)
    tl.store(rewards_ptr + b * N + new, reward)
    tl.store(node_visits_ptr + b * N + new, 1.0)
    tl.store(node_returns_ptr + b * N + new, gain)
    level = tl.load(depth_ptr + b)
    leaf = (b * N + level) * 2
    edge = (b * N + tl.load(path_ptr + leaf)) * K + tl.load(path_ptr + leaf + 1)
    tl.store(child_ptr + edge, new)

    # From the leaf up: the return of a step is its reward and the discounted return below.
    discount = tl.load(constants_ptr)
    low, high = tl.load(low_ptr + b), tl.load(high_ptr + b)
    while level >= 0:
        at = (b * N + level) * 2
        node = b * N + tl.load(path_ptr + at)
        edge = node * K + tl.load(path_ptr + at + 1)
        gain = reward + discount * gain

        visits = tl.load(visits_ptr + edge) + 1.0
        returns = tl.load(returns_ptr + edge) + gain
        tl.store(visits_ptr + edge, visits)
        tl.store(returns_ptr + edge, returns)
        tl.store(node_visits_ptr + node, tl.load(node_visits_ptr + node) + 1.0)
        tl.store(node_returns_ptr + node, tl.load(node_returns_ptr + node) + gain)

        q = returns / visits
        low, high = tl.minimum(low, q), tl.maximum(high, q)
        reward = tl.load(rewards_ptr + node)
        level -= 1

    tl.store(low_ptr + b, low)
    tl.store(high_ptr + b, high)
