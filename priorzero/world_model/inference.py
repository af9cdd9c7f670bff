"""Inference of the world model for tree search: one arena of keys and values per search, no hashes,
no trimming.

Nothing survives a search (what LightZero's caches do instead is told in docs/LIGHTZERO.md):

* the root recomputes the last few real steps of each environment (at most 2C-1 tokens, cheaper than
  any bookkeeping);
* every node of the tree writes the keys and values of its two tokens (action, predicted latent)
  into its own slots of an arena, and carries a mask of the slots on its path. Attention under that
  mask equals a full forward over context + path, which tests/world_model/test_inference.py checks
  against LightZero's own forward.

This is the reference: LightZero's own modules, one after the other. `fused.py` beside it computes
the same with fewer and larger operations; both begin with `read_contexts`.

Letters: `B` roots, `C` context steps, `N` arena slots = (2C-1) + 2 * simulations, `L` layers, `H`
heads, `D` width, `V` actions, `S` support.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priorzero.world_model.model import PriorZeroModel


@dataclass
class RootOutput:
    """What the network says of the roots: policy logits `[B, V]` and value logits `[B, S]`."""

    policy_logits: Tensor
    value_logits: Tensor


@dataclass
class NodeOutput:
    """What the network says of one expansion per root: reward `[B, S]`, value `[B, S]`, policy `[B,
    V]` logits.
    """

    reward_logits: Tensor
    value_logits: Tensor
    policy_logits: Tensor


@dataclass
class ContextMemory:
    """What the network remembers of the contexts, and says of the roots.

    Attributes:
        keys, values: `[L, B, H, 2C-1, D/H]`, of the tokens o_0 a_0 o_1 … in their order.
        visible: `[B, 2C-1]` bool, which of these tokens row b has.
        position: `[B]` int64, of the root's own token.
        root: of the roots.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor
    position: Tensor
    root: RootOutput


@torch.no_grad()
def read_contexts(
    model: PriorZeroModel, observations: Tensor, actions: Tensor, lengths: Tensor
) -> ContextMemory:
    """Encode each environment's context; its newest observation is the root.

    Args:
        observations: `[B, C, E]`, oldest first, row b valid up to `lengths[b]`, the rest ignored.
        actions: `[B, C]` ids, action c followed observation c; from `lengths[b] - 1` on ignored.
        lengths: `[B]`, 1..C.
    """
    wm, (batch, steps) = model.world_model, observations.shape[:2]
    assert actions.shape == (batch, steps) and lengths.shape == (batch,)

    # o_0 a_0 o_1 a_1 … o_c: the last observation is the root.
    count = 2 * steps - 1
    latents = model.encode(observations)
    tokens = torch.empty(batch, count, wm.embed_dim, device=latents.device, dtype=latents.dtype)
    tokens[:, 0::2] = latents
    tokens[:, 1::2] = wm.act_embedding_table(actions[:, :-1])

    # They attend to each other causally, so what follows a row's root does not reach it.
    order = torch.arange(count, device=latents.device)
    x = tokens + wm.pos_emb(order)
    keys, values = [], []
    for block in wm.transformer.blocks:
        q, k, v = _split_heads(block.attn, block.ln1(x))
        keys.append(k)
        values.append(v)
        x = _close_block(block, x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    x = wm.transformer.ln_f(x)

    position = 2 * (lengths - 1)
    last = x[torch.arange(batch, device=x.device), position]
    root = RootOutput(wm.head_policy.head_module(last), wm.head_value.head_module(last))
    visible = order <= position[:, None]
    return ContextMemory(torch.stack(keys), torch.stack(values), visible, position, root)


def _split_heads(attention: nn.Module, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, H, n, D/H]` of normalised tokens `[B, n, D]`."""
    batch, n, _ = h.shape
    parts = (attention.query, attention.key, attention.value)
    return tuple(f(h).view(batch, n, attention.num_heads, -1).transpose(1, 2) for f in parts)


def _close_block(block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A block's tokens `[B, n, D]` from those before it and what they attended to `[B, H, n,
    D/H]`.
    """
    x = x + block.attn.proj(y.transpose(1, 2).reshape(x.shape))
    return x + block.mlp(block.ln2(x))


class SearchMemory:
    """The arena of one search over `B` roots. Create, call `begin` (or `root`) once, then `expand`
    once per simulation.

    Args:
        model: the network; it must not change while this object is in use.
        num_simulations: how often `expand` may be called.
    """

    def __init__(self, model: PriorZeroModel, num_simulations: int) -> None:
        self._wm = model.world_model
        self._model = model
        self._num_simulations = num_simulations
        self._max_tokens = self._wm.config.max_tokens
        self.positions_clamped = 0

    @torch.no_grad()
    def root(self, observations: Tensor, actions: Tensor, lengths: Tensor) -> RootOutput:
        """Encode each environment's context and make its newest observation the root.

        Args:
            observations, actions, lengths: as in `read_contexts`.
        """
        contexts = read_contexts(self._model, observations, actions, lengths)
        self.begin(contexts)
        return contexts.root

    def begin(self, contexts: ContextMemory) -> None:
        """Search from the roots of these contexts."""
        # The arena: the contexts' slots first, then two for each simulation.
        layers, batch, heads, context, width = contexts.keys.shape
        slots, device = context + 2 * self._num_simulations, contexts.keys.device
        self._keys = contexts.keys.new_zeros(layers, batch, heads, slots, width)
        self._values = torch.zeros_like(self._keys)
        self._keys[:, :, :, :context] = contexts.keys
        self._values[:, :, :, :context] = contexts.values
        self._context = context
        self._rows = torch.arange(batch, device=device)

        # mask[b, n, j]: may node n of root b see slot j? Node 0 is the root, node s + 1 comes from
        # simulation s.
        nodes = self._num_simulations + 1
        self._mask = torch.zeros(batch, nodes, slots, dtype=torch.bool, device=device)
        self._mask[:, 0, :context] = contexts.visible
        self._position = torch.zeros(batch, nodes, dtype=torch.long, device=device)
        self._position[:, 0] = contexts.position

    @torch.no_grad()
    def expand(self, simulation: int, parents: Tensor, actions: Tensor) -> NodeOutput:
        """Take `actions[b]` in node `parents[b]` of every root b; the new node gets index
        `simulation + 1`.

        Args:
            simulation: 0, 1, … in the order of the calls.
            parents: `[B]` node indices, 0 = root.
            actions: `[B]` ids.
        """
        assert 0 <= simulation < self._num_simulations
        wm, node = self._wm, simulation + 1
        slot = self._context + 2 * simulation
        mask = self._mask[self._rows, parents]
        position = self._position[self._rows, parents]

        # The action's token: what it earns and where it leads.
        mask[:, slot] = True
        token = wm.act_embedding_table(actions)
        x = self._forward(token, self._clamp(position + 1), slot, mask)
        reward = wm.head_rewards.head_module(x)
        latent = wm.head_observations.head_module(x)

        # The predicted state's token: what it is worth and what to do there.
        mask[:, slot + 1] = True
        x = self._forward(latent, self._clamp(position + 2), slot + 1, mask)
        self._mask[:, node] = mask
        self._position[:, node] = position + 2

        return NodeOutput(reward, wm.head_value.head_module(x), wm.head_policy.head_module(x))

    def _clamp(self, position: Tensor) -> Tensor:
        """Paths deeper than the trained window reuse the positions of its last step, and are
        counted.
        """
        deep = position >= self._max_tokens
        if deep.any():
            self.positions_clamped += int(deep.sum())
            last = self._max_tokens - 2 + position % 2
            return torch.where(deep, last, position)
        return position

    def _forward(self, token: Tensor, position: Tensor, slot: int, mask: Tensor) -> Tensor:
        """Run one token `[B, D]` per root through LightZero's blocks; its keys and values go to
        arena slot `slot`, and it attends to the slots of `mask` `[B, N]`.
        """
        wm, end = self._wm, slot + 1
        x = (token + wm.pos_emb(position))[:, None]

        for layer, block in enumerate(wm.transformer.blocks):
            q, k, v = _split_heads(block.attn, block.ln1(x))
            self._keys[layer, :, :, slot:end] = k
            self._values[layer, :, :, slot:end] = v
            y = F.scaled_dot_product_attention(
                q,
                self._keys[layer, :, :, :end],
                self._values[layer, :, :, :end],
                attn_mask=mask[:, None, None, :end],
            )
            x = _close_block(block, x, y)

        return wm.transformer.ln_f(x)[:, 0]
