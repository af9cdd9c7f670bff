"""Inference of the world model for tree search: one arena of keys and values per search, no hashes,
no trimming.

Nothing survives a search (what LightZero's caches do instead is told in docs/LIGHTZERO.md):

* the root recomputes the last few real steps of each environment (at most 2C-1 tokens, cheaper than
  any bookkeeping);
* every node of the tree writes the keys and values of its two tokens (action, predicted latent)
  into its own slots of an arena, and carries a mask of the slots on its path. Attention under that
  mask equals a full forward over context + path, which tests/world_model/test_inference.py checks
  against LightZero's own forward.

Letters: `B` roots, `C` context steps, `N` arena slots = (2C-1) + 2 * simulations, `H` heads, `V`
actions, `S` support.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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


class SearchMemory:
    """The arena of one search over `B` roots. Create, call `root` once, then `expand` once per
    simulation.

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
            observations: `[B, C, E]`, oldest first, row b valid up to `lengths[b]`, the rest
                ignored.
            actions: `[B, C]` ids, action c followed observation c; from `lengths[b] - 1` on
                ignored.
            lengths: `[B]`, 1..C.
        """
        wm, (batch, steps) = self._wm, observations.shape[:2]
        assert actions.shape == (batch, steps) and lengths.shape == (batch,)

        # o_0 a_0 o_1 a_1 … o_c: the last observation is the root.
        tokens = torch.empty(batch, 2 * steps - 1, wm.embed_dim, device=observations.device)
        tokens[:, 0::2] = self._model.encode(observations)
        tokens[:, 1::2] = wm.act_embedding_table(actions[:, :-1])

        # The arena: the contexts' slots first, then two for each simulation.
        context = 2 * steps - 1
        slots = context + 2 * self._num_simulations
        shape = (
            len(wm.transformer.blocks),
            batch,
            wm.num_heads,
            slots,
            wm.embed_dim // wm.num_heads,
        )
        self._keys = torch.zeros(shape, device=tokens.device)
        self._values = torch.zeros(shape, device=tokens.device)
        self._context = context
        self._rows = torch.arange(batch, device=tokens.device)

        # mask[b, n, j]: may node n of root b see slot j? Node 0 is the root, node s + 1 comes from
        # simulation s.
        self._mask = torch.zeros(
            batch, self._num_simulations + 1, slots, dtype=torch.bool, device=tokens.device
        )
        self._mask[:, 0, :context] = (
            torch.arange(context, device=tokens.device) < (2 * lengths - 1)[:, None]
        )
        self._position = torch.zeros(
            batch, self._num_simulations + 1, dtype=torch.long, device=tokens.device
        )
        self._position[:, 0] = 2 * (lengths - 1)

        x = self._forward(
            tokens, torch.arange(context, device=tokens.device).expand(batch, -1), 0, None
        )
        last = x[self._rows, 2 * (lengths - 1)]
        return RootOutput(wm.head_policy.head_module(last), wm.head_value.head_module(last))

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
        x = self._forward(
            wm.act_embedding_table(actions)[:, None], self._clamp(position + 1)[:, None], slot, mask
        )[:, 0]
        reward = wm.head_rewards.head_module(x)
        latent = wm.head_observations.head_module(x)

        # The predicted state's token: what it is worth and what to do there.
        mask[:, slot + 1] = True
        x = self._forward(latent[:, None], self._clamp(position + 2)[:, None], slot + 1, mask)[:, 0]
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

    def _forward(self, tokens: Tensor, positions: Tensor, slot: int, mask: Tensor | None) -> Tensor:
        """Run `[B, n, D]` tokens through LightZero's blocks; their keys and values go to arena
        slots slot..slot+n-1.

        With `mask` `[B, N]` a single token attends to the arena; without it the tokens attend to
        each other causally.
        """
        wm = self._wm
        batch, n, width = tokens.shape
        x = tokens + wm.pos_emb(positions)

        for layer, block in enumerate(wm.transformer.blocks):
            attn, h = block.attn, block.ln1(x)
            q, k, v = (
                f(h).view(batch, n, wm.num_heads, -1).transpose(1, 2)
                for f in (attn.query, attn.key, attn.value)
            )
            self._keys[layer, :, :, slot : slot + n] = k
            self._values[layer, :, :, slot : slot + n] = v

            if mask is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                end = slot + n
                y = F.scaled_dot_product_attention(
                    q,
                    self._keys[layer, :, :, :end],
                    self._values[layer, :, :, :end],
                    attn_mask=mask[:, None, None, :end],
                )

            x = x + attn.proj(y.transpose(1, 2).reshape(batch, n, width))
            x = x + block.mlp(block.ln2(x))

        return wm.transformer.ln_f(x)
