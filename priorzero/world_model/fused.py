"""The world model's inference in few and large operations: what a fused search calls on a CPU. On a
GPU the same weights go through kernels of its own (`priorzero/search/fused/cuda_network.py`).

The same numbers as `inference.py`, which is the reference, up to rounding
(tests/world_model/test_fused.py). What is different:

* queries, keys and values are one product; so are the first layers of the two heads that read the
  action's token, and of the two that read the latent's;
* of the policy head only the rows of the first K ids are computed;
* tokens of all actions and embeddings of all positions that a path can reach are tables;
* one mask serves all layers of a simulation, and nothing asks the device a question: positions
  beyond the trained window are counted once, at the end.

Letters: `B` roots, `C` context steps, `N` arena slots, `L` layers, `H` heads, `D` width, `S`
support, `K` action ids nodes branch over, `n` simulations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priorzero.world_model.inference import ContextMemory
from priorzero.world_model.model import PriorZeroModel, TextActionEmbedding

# Epsilon of the transform of values and rewards (arXiv:1805.11593, proposition A.2).
_EPSILON = 0.001


class Affine(NamedTuple):
    """weight `[in, out]`, a transposed view as everywhere in torch, and bias `[out]`."""

    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """weight and bias `[D]` of a LayerNorm."""

    weight: Tensor
    bias: Tensor


class LayerWeights(NamedTuple):
    """One block of the transformer: qkv `D -> 3D`, proj `D -> D`, up `D -> 4D`, down `4D -> D`."""

    norm1: Norm
    qkv: Affine
    proj: Affine
    norm2: Norm
    up: Affine
    down: Affine


class FusedWeights(NamedTuple):
    """A network's weights as the products of a simulation want them.

    Attributes:
        actions: `[V, D]` tokens of all ids.
        positions: `[P, D]`; those beyond the trained window repeat the last step's two.
        layers: the blocks. norm: after the last one.
        after_action: `D -> 2D`, first layers of reward | latent.
        after_latent: `D -> 2D`, first layers of value | policy.
        reward, value: `D -> S`. latent: `D -> D`. policy: `D -> K`.
    """

    actions: Tensor
    positions: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Norm
    after_action: Affine
    after_latent: Affine
    reward: Affine
    value: Affine
    latent: Affine
    policy: Affine


@torch.no_grad()
def fuse(model: PriorZeroModel, inner_actions: int, last_position: int) -> FusedWeights:
    """The weights as they are now; copies, which later updates of the network leave alone.

    Args:
        inner_actions: `K`, rows of the policy head that are kept.
        last_position: `P` - 1, the largest position a path can reach.
    """
    wm, config = model.world_model, model.world_model.config
    assert not config.gru_gating and not config.rotary_emb, "neither is part of this network"
    positions = _trained(last_position, config.max_tokens, wm.pos_emb.weight.device)

    pieces = [_piece(layers) for layers in _sources(wm)]
    blocks, (norm, *heads, policy) = pieces[:-7], pieces[-7:]
    each = len(LayerWeights._fields)
    return FusedWeights(
        _action_tokens(wm.act_embedding_table),
        wm.pos_emb(positions),
        tuple(LayerWeights(*blocks[i : i + each]) for i in range(0, len(blocks), each)),
        norm,
        *heads,
        Affine(*(x[..., :inner_actions] for x in policy)),
    )


def _sources(wm: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """The layers behind each piece of `FusedWeights` from its blocks on, in its order. Several read
    the same input, and are one product.
    """
    for block in wm.transformer.blocks:
        attention, mlp = block.attn, block.mlp
        yield (block.ln1,)
        yield attention.query, attention.key, attention.value
        yield (attention.proj,)
        yield (block.ln2,)
        yield (mlp[0],)
        yield (mlp[2],)
    yield (wm.transformer.ln_f,)

    heads = wm.head_rewards, wm.head_observations, wm.head_value, wm.head_policy
    reward, latent, value, policy = (head.head_module for head in heads)
    yield reward[0], latent[0]
    yield value[0], policy[0]
    for head in (reward, value, latent, policy):
        yield (head[2],)


def _piece(layers: tuple[nn.Module, ...]) -> Affine | Norm:
    """Copies of these layers' weights, one below the other."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return Norm(weight, bias) if isinstance(layers[0], nn.LayerNorm) else Affine(weight.t(), bias)


def _pieces(weights: FusedWeights) -> Iterator[Affine | Norm]:
    """In the order of `_sources`."""
    for layer in weights.layers:
        yield from layer
    yield from weights[weights._fields.index("norm") :]


class WeightCopies:
    """Keeps fused weights those of a network, where they are in memory.

    Args:
        weights: of this network, from `fuse`; its tensors, or views of other memory in their place.
        model: the network.
    """

    def __init__(self, weights: FusedWeights, model: PriorZeroModel) -> None:
        self._weights, self._wm = weights, model.world_model
        last, window = len(weights.positions) - 1, self._wm.config.max_tokens
        self._positions = _trained(last, window, weights.positions.device)

        # A layer's rows lie in the weights one below the other's.
        self._places: list[Tensor] = []
        self._sources: list[Tensor] = []
        for piece, layers in zip(_pieces(weights), _sources(self._wm), strict=True):
            matrix = piece.weight.t() if isinstance(piece, Affine) else piece.weight
            for place, name in ((matrix, "weight"), (piece.bias, "bias")):
                own = [getattr(layer, name).detach()[: len(place)] for layer in layers]
                self._places += place.split([len(x) for x in own])
                self._sources += own

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the numbers as they are now."""
        torch._foreach_copy_(self._places, self._sources)
        self._weights.actions.copy_(_action_tokens(self._wm.act_embedding_table))
        self._weights.positions.copy_(self._wm.pos_emb.weight[self._positions])


def _action_tokens(table: nn.Module) -> Tensor:
    """`[V, D]` tokens of every id."""
    if isinstance(table, TextActionEmbedding):
        return table.projection(table.text) + table.residual.weight
    return table.weight.detach().clone()


def _trained(last: int, max_tokens: int, device: torch.device) -> Tensor:
    """The trained positions `[last + 1]` that the positions 0, 1, …, `last` use."""
    position = torch.arange(last + 1, device=device)
    return torch.where(position < max_tokens, position, max_tokens - 2 + position % 2)


class NetworkShape(NamedTuple):
    """Of a network what its weights do not tell: heads, size of SimNorm's groups, tokens of the
    trained window.
    """

    heads: int
    group: int
    max_tokens: int


def shape_of(model: PriorZeroModel) -> NetworkShape:
    """The same for this network."""
    wm = model.world_model
    return NetworkShape(wm.num_heads, wm.group_size, wm.config.max_tokens)


@dataclass(frozen=True, eq=False)
class Expansion:
    """What the network says of one expansion per root.

    rewards, values: `[B]` float64. logits: `[B, K]` of the policy.
    """

    rewards: Tensor
    values: Tensor
    logits: Tensor


class FusedMemory:
    """The arena of one search over `B` roots. What `CudaNetwork` computes is tested against it.

    `begin` for new roots, then `expand` once per simulation, in order.

    Args:
        weights, shape: of the network. Weights may change between one search and the next.
        batch, context, simulations: `B`, the most tokens of a context (2C - 1), `n`.
    """

    def __init__(
        self,
        weights: FusedWeights,
        shape: NetworkShape,
        batch: int,
        context: int,
        simulations: int,
    ) -> None:
        self._weights, self._context, self._simulations = weights, context, simulations
        self._heads, self._group, self._max_tokens = shape
        layers, width, heads = len(weights.layers), len(weights.norm.weight), shape.heads
        assert width % heads == 0 and len(weights.positions) >= context + 2 * simulations

        slots, nodes = context + 2 * simulations, simulations + 1
        new, device = weights.positions.new_zeros, weights.positions.device
        self._arena = new(layers, 2, batch, heads, slots, width // heads)
        # What node n of root b sees of slot j, as a summand of attention scores: 0 or -inf.
        self._seen = new(batch * nodes, slots)
        self._position = torch.zeros(batch * nodes, dtype=torch.long, device=device)
        self._first = torch.arange(batch, device=device) * nodes  # each root's own node
        self._scores = new(batch, heads, slots)

        half = len(weights.reward.bias) // 2
        self._support = torch.arange(-half, half + 1, device=device).to(weights.positions.dtype)
        self._scalars = new(2, batch, len(self._support))

    def begin(self, contexts: ContextMemory) -> None:
        """Start from these roots; rows of `B` beyond theirs are padding."""
        batch, count = contexts.visible.shape
        assert count <= self._context and batch <= len(self._first)
        self._arena.zero_()
        self._arena[:, 0, :batch, :, :count] = contexts.keys
        self._arena[:, 1, :batch, :, :count] = contexts.values

        self._seen.fill_(-torch.inf)
        seen = torch.zeros_like(contexts.visible, dtype=self._seen.dtype)
        seen.masked_fill_(~contexts.visible, -torch.inf)
        self._seen[self._first[:batch], :count] = seen
        self._position.zero_()
        self._position[self._first[:batch]] = contexts.position

    def expand(self, simulation: int, parents: Tensor, actions: Tensor) -> Expansion:
        """Take `actions[b]` in node `parents[b]` of every root b; the new node gets the index
        `simulation + 1`.

        Args:
            simulation: 0, 1, …, in the order of the calls.
            parents, actions: `[B]` int64.
        """
        assert 0 <= simulation < self._simulations
        w, width = self._weights, len(self._weights.norm.weight)
        slot, parent = self._context + 2 * simulation, self._first + parents
        position = self._position[parent]

        # The new node sees what its parent sees, and its own two tokens.
        seen = self._seen[parent]
        seen[:, slot : slot + 2] = 0.0
        self._seen.index_copy_(0, self._first + (simulation + 1), seen)
        self._position.index_copy_(0, self._first + (simulation + 1), position + 2)
        self._scores.copy_(seen[:, None])

        # The action's token: what it earns and where it leads.
        x = self._forward(w.actions[actions] + w.positions[position + 1], slot)
        x = F.gelu(_product(x, w.after_action), approximate="tanh")
        _product(x[:, :width], w.reward, out=self._scalars[0])
        latent = _product(x[:, width:], w.latent).view(len(x), -1, self._group)
        latent = latent.softmax(-1).view(len(x), width)

        # The predicted state's token: what it is worth and what to do there.
        x = self._forward(latent + w.positions[position + 2], slot + 1)
        x = F.gelu(_product(x, w.after_latent), approximate="tanh")
        _product(x[:, :width], w.value, out=self._scalars[1])
        logits = _product(x[:, width:], w.policy)

        rewards, values = inverse_transform(self._scalars.softmax(-1) @ self._support)
        return Expansion(rewards, values, logits)

    def clamped(self, rows: int) -> Tensor:
        """How many tokens of the first `rows` roots lay beyond the trained window: a number on the
        device.
        """
        latent = self._position.view(len(self._first), -1)[:rows, 1:]
        return (latent >= self._max_tokens).sum() + (latent > self._max_tokens).sum()

    def _forward(self, x: Tensor, slot: int) -> Tensor:
        """Run one token `[B, D]` per root through the blocks; its keys and values go to arena slot
        `slot`, and it attends to the slots up to it as `_scores` allows.
        """
        end, (batch, width) = slot + 1, x.shape
        pairs, each = batch * self._heads, width // self._heads
        scores = self._scores[:, :, :end].reshape(pairs, 1, end)

        for weights, cells in zip(self._weights.layers, self._arena.unbind(), strict=True):
            h = F.layer_norm(x, (width,), *weights.norm1)
            qkv = _product(h, weights.qkv).view(batch, 3, self._heads, each)
            query, own = qkv[:, 0], qkv[:, 1:].transpose(0, 1)
            cells[:, :, :, slot] = own
            keys, values = cells.view(2, pairs, -1, each)[:, :, :end].unbind()
            query, scale = query.reshape(pairs, 1, each), each**-0.5
            attention = torch.baddbmm(scores, query, keys.transpose(1, 2), alpha=scale).softmax(-1)
            y = torch.bmm(attention, values).view(batch, width)

            x = _product(y, weights.proj).add_(x)
            h = F.layer_norm(x, (width,), *weights.norm2)
            h = F.gelu(_product(h, weights.up), approximate="tanh")
            x = _product(h, weights.down).add_(x)

        return F.layer_norm(x, (width,), *self._weights.norm)


def _product(x: Tensor, affine: Affine, out: Tensor | None = None) -> Tensor:
    return torch.addmm(affine.bias, x, affine.weight, out=out)


def inverse_transform(x: Tensor) -> Tensor:
    """Scaled values -> values, float64 (MuZero, arXiv:1911.08265, appendix F; arXiv:1805.11593,
    proposition A.2, epsilon 0.001):

        h^-1(x) = sign(x) (((sqrt(1 + 4 eps (|x| + 1 + eps)) - 1) / (2 eps))^2 - 1)

    In float64, because single precision keeps but four digits of the difference under the square.
    """
    x = x.double()
    root = torch.sqrt(1.0 + 4.0 * _EPSILON * (x.abs() + 1.0 + _EPSILON))
    return torch.sign(x) * (((root - 1.0) / (2.0 * _EPSILON)) ** 2 - 1.0)
