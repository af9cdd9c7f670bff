"""The network's part of a search on a GPU: `FusedMemory` of `priorzero/world_model/fused.py`, with
the kernels of `cuda_network_kernels.py` in place of torch's operations.

Letters: `B` roots, `C` context steps, `S` arena slots, `N` nodes, `L` layers, `H` heads, `D` width,
`K` action ids nodes branch over, `n` simulations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from priorzero.search.fused import cuda_network_kernels as kernels
from priorzero.world_model.fused import Affine, Expansion, FusedWeights, NetworkShape, Norm
from priorzero.world_model.inference import ContextMemory

_CHUNK = 32  # slots that a query attends to at a time
_ALIGNED = 64  # where the second of two heads may begin: blocks of a product lie in one of them
_MOST_BLOCKS = 192  # of a product that is cut into parts; an H100 has 132 multiprocessors
_STAGES = 4  # blocks of a product that are loaded ahead


class CudaWeights(NamedTuple):
    """A network's weights, of which reward and latent, and value and policy, stand side by side.

    Attributes:
        fused: all of them; these four are views into the next two.
        after_action: last layers of reward | latent, `D -> cut + D`.
        after_latent: last layers of value | policy, `D -> cut + K`.
        cut: where the second of each begins.
    """

    fused: FusedWeights
    after_action: Affine
    after_latent: Affine
    cut: int

    def first_actions(self, count: int) -> CudaWeights:
        """The same memory, with the policy of the ids below `count` alone."""
        both = Affine(*(x[..., : self.cut + count] for x in self.after_latent))
        return self._replace(after_latent=both)


def side_by_side(fused: FusedWeights) -> CudaWeights:
    """Put these weights' heads beside each other."""
    cut = triton.cdiv(len(fused.reward.bias), _ALIGNED) * _ALIGNED
    reward, latent, after_action = beside(fused.reward, fused.latent, cut)
    value, policy, after_latent = beside(fused.value, fused.policy, cut)
    fused = fused._replace(reward=reward, latent=latent, value=value, policy=policy)
    return CudaWeights(fused, after_action, after_latent, cut)


def beside(first: Affine, second: Affine, cut: int) -> tuple[Affine, Affine, Affine]:
    """Both as views of one piece of memory, and that; zeros fill the gap."""
    weight = first.weight.new_zeros(cut + len(second.bias), len(first.weight))
    bias = first.bias.new_zeros(len(weight))
    ends = slice(0, len(first.bias)), slice(cut, None)
    views = [Affine(weight[rows].t(), bias[rows]) for rows in ends]
    for view, old in zip(views, (first, second), strict=True):
        view.weight.copy_(old.weight)
        view.bias.copy_(old.bias)
    return *views, Affine(weight.t(), bias)


class Tiling(NamedTuple):
    """How a product `[rows, in] -> [rows, out]` is cut into blocks, and its sum into parts."""

    rows: int
    out: int
    inner: int
    parts: int

    @classmethod
    def of(cls, rows: int, inner: int, out: int, most_parts: int = 8) -> Tiling:
        """For these sizes: as many parts as occupy the device, of two blocks of a sum at least."""
        sizes = (rows, 64), (out, 32), (inner, 64)
        blocks = [min(most, max(16, triton.next_power_of_2(size))) for size, most in sizes]
        grid = triton.cdiv(rows, blocks[0]) * triton.cdiv(out, blocks[1])
        parts = 1
        while (
            2 * parts <= most_parts
            and 2 * parts * grid <= _MOST_BLOCKS
            and 4 * parts * blocks[2] <= inner
        ):
            parts *= 2
        return cls(*blocks, parts)


def product(x: Tensor, affine: Affine, precision: str, cut: int | None = None) -> Tensor:
    """Parts `[P, B, out]` of a product without its bias.

    Args:
        x: `[B, in]`, or with a `cut` `[B, 2 in]`.
        precision: as Triton calls it.
        cut: columns from here on read x's second half.
    """
    inner, out = affine.weight.shape
    tiling = Tiling.of(len(x), inner, out)
    parts = x.new_empty(tiling.parts, len(x), out)
    _multiply(tiling, x, affine, parts, precision, out if cut is None else cut, gelu=False)
    return parts


def gelu_product(x: Tensor, affine: Affine, precision: str) -> Tensor:
    """gelu(x w + bias) `[B, out]`, of x `[B, in]`."""
    inner, out = affine.weight.shape
    found = x.new_empty(len(x), out)
    tiling = Tiling.of(len(x), inner, out, most_parts=1)
    _multiply(tiling, x, affine, found, precision, out, gelu=True)
    return found


def _multiply(
    tiling: Tiling, x: Tensor, affine: Affine, found: Tensor, precision: str, cut: int, gelu: bool
) -> None:
    weight, (inner, out) = affine.weight.t(), affine.weight.shape
    assert x.is_contiguous() and weight.is_contiguous()
    if cut == out:
        assert x.shape[1] == inner
    else:
        assert x.shape[1] == 2 * inner and cut % tiling.out == 0
    grid = triton.cdiv(out, tiling.out), tiling.parts, triton.cdiv(len(x), tiling.rows)
    kernels.product[grid](
        x,
        weight,
        affine.bias,
        found,
        len(x),
        OUT=out,
        IN=inner,
        STRIDE=x.shape[1],
        CUT=cut,
        GELU=gelu,
        PRECISION=precision,
        BLOCK_ROWS=tiling.rows,
        BLOCK_OUT=tiling.out,
        BLOCK_IN=tiling.inner,
        PARTS=tiling.parts,
        STAGES=_STAGES,
    )


class CudaNetwork:
    """The arena of one search over `B` roots, in memory that does not move; `begin` for new roots,
    then `expand` once per simulation, in order.

    Args:
        weights, shape: of the network. Weights may change between one search and the next.
        batch, context, simulations: `B`, the most tokens of a context (2C - 1), `n`.
        precision: of products, as Triton calls it.
    """

    def __init__(
        self,
        weights: CudaWeights,
        shape: NetworkShape,
        batch: int,
        context: int,
        simulations: int,
        precision: str,
    ) -> None:
        self._weights, self._shape, self._precision = weights, shape, precision
        self._context, self._simulations = context, simulations
        fused = weights.fused
        self._width, self._batch = len(fused.norm.weight), batch
        self._support = len(fused.reward.bias)
        self._actions = len(weights.after_latent.bias) - weights.cut
        assert self._width % shape.heads == 0 and fused.actions.dtype == torch.float32
        self._slots, self._nodes = context + 2 * simulations, simulations + 1
        assert len(fused.positions) >= self._slots

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=fused.norm.weight.device)

        cells = batch, shape.heads, self._slots, self._width // shape.heads
        self._arena = zeros(len(fused.layers), 2, *cells)
        self._seen = zeros(batch, self._nodes, self._slots, dtype=torch.int8)
        self._position = zeros(batch, self._nodes, dtype=torch.int32)

        # A token, its norm, what it attends to; and what the network says of it.
        self._x, self._h, self._y = (zeros(batch, self._width) for _ in range(3))
        self._rewards, self._values = (zeros(batch, dtype=torch.float64) for _ in range(2))
        self._logits = zeros(batch, self._actions)

    def begin(self, contexts: ContextMemory) -> None:
        """Start from these roots; rows of `B` beyond theirs are padding, which sees nothing."""
        rows, count = contexts.visible.shape
        assert count <= self._context and rows <= self._batch
        self._arena[:, 0, :rows, :, :count] = contexts.keys
        self._arena[:, 1, :rows, :, :count] = contexts.values
        self._seen[:, 0] = 0
        self._seen[:rows, 0, :count] = contexts.visible
        self._position[:, 0] = 0
        self._position[:rows, 0] = contexts.position

    def expand(self, simulation: int, parents: Tensor, actions: Tensor) -> Expansion:
        """Take `actions[b]` in node `parents[b]` of every root b; the new node gets the index
        `simulation + 1`.

        Args:
            simulation: 0, 1, …, in the order of the calls.
            parents, actions: `[B]` int64.
        """
        assert 0 <= simulation < self._simulations
        w, new, slot = self._weights.fused, simulation + 1, self._context + 2 * simulation
        sizes = dict(N=self._nodes, S=self._slots, D=self._width)

        # The action's token: what it earns and where it leads.
        kernels.enter[(self._batch,)](
            parents,
            actions,
            self._seen,
            self._position,
            w.actions,
            w.positions,
            *w.layers[0].norm1,
            self._x,
            self._h,
            new,
            slot,
            **sizes,
            BLOCK_S=triton.next_power_of_2(self._slots),
            BLOCK_D=triton.next_power_of_2(self._width),
        )
        self._blocks(new, slot)
        self._follow(new)

        # The predicted state's token: what it is worth and what to do there.
        self._blocks(new, slot + 1)
        self._judge()
        return Expansion(self._rewards, self._values, self._logits)

    def clamped(self, rows: int) -> Tensor:
        """How many tokens of the first `rows` roots lay beyond the trained window: a number on the
        device.
        """
        latent, limit = self._position[:rows, 1:], self._shape.max_tokens
        return (latent >= limit).sum() + (latent > limit).sum()

    def _blocks(self, new: int, slot: int) -> None:
        """Run the token x with norm h through the blocks, for node `new`; its keys and values go to
        arena slot `slot`. Its norm after the last one is in h.
        """
        layers = self._weights.fused.layers
        norms = [layer.norm1 for layer in layers[1:]] + [self._weights.fused.norm]
        for layer, following, cells in zip(layers, norms, self._arena.unbind(), strict=True):
            qkv = product(self._h, layer.qkv, self._precision)
            self._attend(qkv, layer.qkv.bias, cells, new, slot)
            out = product(self._y, layer.proj, self._precision)
            self._close(out, layer.proj.bias, layer.norm2)
            up = gelu_product(self._h, layer.up, self._precision)
            down = product(up, layer.down, self._precision)
            self._close(down, layer.down.bias, following)

    def _attend(self, qkv: Tensor, bias: Tensor, cells: Tensor, new: int, slot: int) -> None:
        each = self._width // self._shape.heads
        kernels.attend[(self._batch, self._shape.heads)](
            qkv,
            bias,
            *cells,
            self._seen,
            self._y,
            self._batch,
            new,
            slot,
            each**-0.5,
            N=self._nodes,
            S=self._slots,
            D=self._width,
            E=each,
            BLOCK_E=triton.next_power_of_2(each),
            CHUNK=_CHUNK,
            PARTS=len(qkv),
        )

    def _close(self, parts: Tensor, bias: Tensor, norm: Norm) -> None:
        kernels.close[(self._batch,)](
            parts,
            bias,
            *norm,
            self._x,
            self._h,
            self._batch,
            D=self._width,
            BLOCK_D=triton.next_power_of_2(self._width),
            PARTS=len(parts),
        )

    def _follow(self, new: int) -> None:
        w, group = self._weights, self._shape.group
        both = gelu_product(self._h, w.fused.after_action, self._precision)
        parts = product(both, w.after_action, self._precision, w.cut)
        kernels.follow[(self._batch,)](
            parts,
            w.after_action.bias,
            self._position,
            w.fused.positions,
            *w.fused.layers[0].norm1,
            self._rewards,
            self._x,
            self._h,
            self._batch,
            new,
            SUPPORT=self._support,
            CUT=w.cut,
            GROUP=group,
            N=self._nodes,
            D=self._width,
            BLOCK_SUPPORT=triton.next_power_of_2(self._support),
            BLOCK_GROUPS=triton.next_power_of_2(self._width // group),
            BLOCK_GROUP=triton.next_power_of_2(group),
            PARTS=len(parts),
        )

    def _judge(self) -> None:
        w = self._weights
        both = gelu_product(self._h, w.fused.after_latent, self._precision)
        parts = product(both, w.after_latent, self._precision, w.cut)
        kernels.judge[(self._batch,)](
            parts,
            w.after_latent.bias,
            self._values,
            self._logits,
            self._batch,
            SUPPORT=self._support,
            CUT=w.cut,
            K=self._actions,
            BLOCK_SUPPORT=triton.next_power_of_2(self._support),
            BLOCK_K=triton.next_power_of_2(self._actions),
            PARTS=len(parts),
        )
