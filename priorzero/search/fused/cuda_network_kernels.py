"""The network's part of a simulation on a GPU, in Triton: few kernels, and each reads what it needs
once.

A product of 64 rows is over in microseconds, and what stands around it in single operations of
torch (copies, sums, norms, a softmax over a dozen slots) took longer than the products. So each
kernel here does all that lies between two products. A product may be split along what it sums over,
to occupy the whole device: it leaves `P` parts, and the next kernel adds them up in their order.
Nothing is added up by atomics, so the same search gives the same bits.

Letters: `B` roots, `D` width, `H` heads, `E` = D / H, `S` arena slots, `N` nodes, `P` parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Epsilons of LayerNorm, and of the transform of values and rewards (arXiv:1805.11593).
_NORM_EPSILON, _EPSILON = tl.constexpr(1e-5), tl.constexpr(0.001)


@triton.jit
def product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    STRIDE: tl.constexpr,
    CUT: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows x `[rows, IN]`, `STRIDE` numbers apart, times weight `[OUT, IN]`: out `[PARTS, rows,
    OUT]` without bias, or, with `GELU` and one part, gelu(x w + bias).

    Columns from `CUT` on, which is a multiple of `BLOCK_OUT`, read the `IN` numbers that follow in
    their row: two layers of one input each, as one product.
    """
    column = tl.program_id(0) * BLOCK_OUT
    n = column + tl.arange(0, BLOCK_OUT)
    part = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    share: tl.constexpr = (IN + PARTS * BLOCK_IN - 1) // (PARTS * BLOCK_IN) * BLOCK_IN
    offsets = part * share + tl.arange(0, BLOCK_IN)
    skip = tl.where(column >= CUT, IN, 0)

    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for step in tl.range(0, share // BLOCK_IN, num_stages=STAGES):
        k = offsets + step * BLOCK_IN
        x_mask = (m < rows)[:, None] & (k < IN)[None, :]
        x = tl.load(x_ptr + m[:, None] * STRIDE + skip + k[None, :], mask=x_mask, other=0.0)
        w_mask = (n < OUT)[None, :] & (k < IN)[:, None]
        w = tl.load(weight_ptr + n[None, :] * IN + k[:, None], mask=w_mask, other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)

    if GELU:
        total += tl.load(bias_ptr + n, mask=n < OUT, other=0.0)[None, :]
        total = _gelu(total)
    at = (part * rows + m[:, None]) * OUT + n[None, :]
    tl.store(out_ptr + at, total, mask=(m < rows)[:, None] & (n < OUT)[None, :])


@triton.jit
def _gelu(x):
    """By its approximation with tanh, 2 sigmoid(2 y) - 1 = tanh(y)."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def _sum_of_parts(parts_ptr, bias_ptr, b, rows, at, inside, OUT: tl.constexpr, PARTS: tl.constexpr):
    """Columns `at` of row `b` of a product's parts, and the bias."""
    total = tl.load(bias_ptr + at, mask=inside, other=0.0)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + (part * rows + b) * OUT + at, mask=inside, other=0.0)
    return total


@triton.jit
def _norm(x, inside, at, weight_ptr, bias_ptr, D: tl.constexpr):
    """LayerNorm of the numbers `inside` of x, a row of any shape."""
    mean = tl.sum(tl.where(inside, x, 0.0)) / D
    centred = tl.where(inside, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / D + _NORM_EPSILON)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    return centred * scale * weight + tl.load(bias_ptr + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["new", "slot", "N", "S"])
def enter(
    parents_ptr,
    actions_ptr,
    seen_ptr,
    position_ptr,
    tokens_ptr,
    positions_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    x_ptr,
    h_ptr,
    new,
    slot,
    N,
    S,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Node `new` of root `program_id(0)` begins with its action's token: x, and its norm h, `[B,
    D]`.

    It sees what its parent sees, and its own slots `slot` and `slot + 1`: `seen` `[B, N, S]` int8;
    `position` `[B, N]` int32 is that of its second token.
    """
    b = tl.program_id(0)
    parent = b * N + tl.load(parents_ptr + b)
    node = b * N + new
    position = tl.load(position_ptr + parent)
    tl.store(position_ptr + node, position + 2)

    j = tl.arange(0, BLOCK_S)
    seen = tl.load(seen_ptr + parent * S + j, mask=j < S, other=0)
    seen = tl.where((j == slot) | (j == slot + 1), 1, seen).to(tl.int8)
    tl.store(seen_ptr + node * S + j, seen, mask=j < S)

    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(tokens_ptr + tl.load(actions_ptr + b) * D + d, mask=inside, other=0.0)
    x += tl.load(positions_ptr + (position + 1) * D + d, mask=inside, other=0.0)
    tl.store(x_ptr + b * D + d, x, mask=inside)
    h = _norm(x, inside, d, norm_weight_ptr, norm_bias_ptr, D)
    tl.store(h_ptr + b * D + d, h, mask=inside)


@triton.jit(do_not_specialize=["new", "slot", "N", "S"])
def attend(
    qkv_ptr,
    bias_ptr,
    keys_ptr,
    values_ptr,
    seen_ptr,
    out_ptr,
    rows,
    new,
    slot,
    scale,
    N,
    S,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One query of root `program_id(0)` in head `program_id(1)`: out `[B, D]` from the parts `[P,
    B, 3 D]` of queries, keys and values.

    Key and value go to slot `slot` of the layer's arena, `keys` and `values` `[B, H, S, E]`. The
    query attends to them, and to those of the earlier slots that node `new` sees. The softmax runs
    along: the sums so far are scaled down where a larger score comes up.
    """
    b, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    at = head * E + e
    query = _sum_of_parts(qkv_ptr, bias_ptr, b, rows, at, inside, 3 * D, PARTS) * scale
    key = _sum_of_parts(qkv_ptr, bias_ptr, b, rows, at + D, inside, 3 * D, PARTS)
    value = _sum_of_parts(qkv_ptr, bias_ptr, b, rows, at + 2 * D, inside, 3 * D, PARTS)
    cells = (b * (D // E) + head) * S * E
    tl.store(keys_ptr + cells + slot * E + e, key, mask=inside)
    tl.store(values_ptr + cells + slot * E + e, value, mask=inside)

    largest = tl.sum(query * key, 0)
    mass = largest * 0.0 + 1.0
    out = value
    for start in range(0, slot, CHUNK):
        j = start + tl.arange(0, CHUNK)
        seen = tl.load(seen_ptr + (b * N + new) * S + j, mask=j < slot, other=0) != 0
        cell = cells + j[:, None] * E + e[None, :]
        wanted = seen[:, None] & inside[None, :]
        scores = tl.sum(tl.load(keys_ptr + cell, mask=wanted, other=0.0) * query[None, :], 1)
        scores = tl.where(seen, scores, float("-inf"))

        higher = tl.maximum(largest, tl.max(scores, 0))
        keep, share = tl.exp(largest - higher), tl.exp(scores - higher)
        mass = mass * keep + tl.sum(share, 0)
        old = tl.load(values_ptr + cell, mask=wanted, other=0.0)
        out = out * keep + tl.sum(share[:, None] * old, 0)
        largest = higher
    tl.store(out_ptr + b * D + at, out / mass, mask=inside)


@triton.jit
def close(
    parts_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    x_ptr,
    h_ptr,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add a product's parts `[P, B, D]` and its bias to x `[B, D]`, in place; h is x's norm."""
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + b * D + d, mask=inside, other=0.0)
    x += _sum_of_parts(parts_ptr, bias_ptr, b, rows, d, inside, D, PARTS)
    tl.store(x_ptr + b * D + d, x, mask=inside)
    h = _norm(x, inside, d, norm_weight_ptr, norm_bias_ptr, D)
    tl.store(h_ptr + b * D + d, h, mask=inside)


@triton.jit
def _scalar(parts_ptr, bias_ptr, b, rows, SUPPORT, OUT: tl.constexpr, BLOCK, PARTS: tl.constexpr):
    """What the first `SUPPORT` columns say as logits of a scaled scalar: float64, as
    `inverse_transform` (priorzero/world_model/fused.py).
    """
    i = tl.arange(0, BLOCK)
    logits = _sum_of_parts(parts_ptr, bias_ptr, b, rows, i, i < SUPPORT, OUT, PARTS)
    logits = tl.where(i < SUPPORT, logits, float("-inf"))
    share = tl.exp(logits - tl.max(logits, 0))
    mean = tl.sum(share / tl.sum(share, 0) * (i - SUPPORT // 2), 0).to(tl.float64)

    size = tl.abs(mean)
    root = tl.sqrt(1.0 + 4.0 * _EPSILON * (size + 1.0 + _EPSILON))
    root = (root - 1.0) / (2.0 * _EPSILON)
    return tl.where(mean < 0.0, 1.0 - root * root, root * root - 1.0)


@triton.jit(do_not_specialize=["new", "N"])
def follow(
    parts_ptr,
    bias_ptr,
    position_ptr,
    positions_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    rewards_ptr,
    x_ptr,
    h_ptr,
    rows,
    new,
    N,
    SUPPORT: tl.constexpr,
    CUT: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SUPPORT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """From the heads at the action's token, parts `[P, B, CUT + D]`: rewards `[B]` float64, and the
    predicted state's token x with its norm h, `[B, D]`.
    """
    b = tl.program_id(0)
    out: tl.constexpr = CUT + D
    reward = _scalar(parts_ptr, bias_ptr, b, rows, SUPPORT, out, BLOCK_SUPPORT, PARTS)
    tl.store(rewards_ptr + b, reward)

    # SimNorm: a softmax in each group.
    groups, members = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_GROUP)
    d = groups[:, None] * GROUP + members[None, :]
    inside = (groups < D // GROUP)[:, None] & (members < GROUP)[None, :]
    logits = _sum_of_parts(parts_ptr, bias_ptr, b, rows, CUT + d, inside, out, PARTS)
    logits = tl.where((members < GROUP)[None, :], logits, float("-inf"))
    share = tl.exp(logits - tl.max(logits, 1)[:, None])
    x = share / tl.sum(share, 1)[:, None]

    position = tl.load(position_ptr + b * N + new)
    x += tl.load(positions_ptr + position * D + d, mask=inside, other=0.0)
    tl.store(x_ptr + b * D + d, x, mask=inside)
    h = _norm(x, inside, d, norm_weight_ptr, norm_bias_ptr, D)
    tl.store(h_ptr + b * D + d, h, mask=inside)


@triton.jit
def judge(
    parts_ptr,
    bias_ptr,
    values_ptr,
    logits_ptr,
    rows,
    SUPPORT: tl.constexpr,
    CUT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_SUPPORT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """From the heads at the state's token, parts `[P, B, CUT + K]`: values `[B]` float64, and the
    policy's logits `[B, K]`.
    """
    b = tl.program_id(0)
    out: tl.constexpr = CUT + K
    value = _scalar(parts_ptr, bias_ptr, b, rows, SUPPORT, out, BLOCK_SUPPORT, PARTS)
    tl.store(values_ptr + b, value)

    k = tl.arange(0, BLOCK_K)
    logits = _sum_of_parts(parts_ptr, bias_ptr, b, rows, CUT + k, k < K, out, PARTS)
    tl.store(logits_ptr + b * K + k, logits, mask=k < K)
