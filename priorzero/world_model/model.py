"""UniZero's network (arXiv:2406.10667) on text: observation vectors in, action tokens made from the
action's text.

`PriorZeroModel` is LightZero's `UniZeroModel` with three parts exchanged:

* the observation encoder normalises with LayerNorm instead of BatchNorm, so that one state encodes
  to the same latent in training, in search and in any batch;
* the action table is `TextActionEmbedding` (with a text vocabulary), so that a command seen for the
  first time enters the model as its meaning and not as noise;
* the decoder LightZero builds for its own memory task is dropped.

Used by `priorzero_policy.py`; `inference.py` and `loss.py` beside this file take an instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from easydict import EasyDict
from torch import Tensor, nn

from priorzero.quiet import quiet_base

with quiet_base():
    from ding.utils import MODEL_REGISTRY
    from lzero.model.common import RepresentationNetworkMLP
    from lzero.model.unizero_model import UniZeroModel


class Unrolled(NamedTuple):
    """What the network says along a window of `T` steps; `S` is the size of the support.

    latent `[B, T, D]`: the next state's predicted latent, SimNorm-ed. reward `[B, T, S]`, policy
    `[B, T, V]`, value `[B, T, S]`: logits.
    """

    latent: Tensor
    reward: Tensor
    policy: Tensor
    value: Tensor


class TextActionEmbedding(nn.Module):
    """Action token = projection of the action text's frozen embedding + a learned residual of its
    id.

    The residual starts at zero, so a new action begins as its text says and can then drift to what
    it does in the game. Ids without a text (the vocabulary's overflow ids) have a zero text vector
    and live from the residual alone.

    Shapes: ids `[...]` int64 -> tokens `[..., D]`. The buffer `text` is `[V, E]`, filled by
    `set_text`.
    """

    def __init__(self, vocabulary_size: int, text_dim: int, width: int) -> None:
        super().__init__()
        self.register_buffer("text", torch.zeros(vocabulary_size, text_dim))
        self.projection = nn.Linear(text_dim, width, bias=False)
        self.residual = nn.Embedding(vocabulary_size, width)
        nn.init.zeros_(self.residual.weight)
        # Sentence embeddings have unit length; this gives tokens the scale of an nn.Embedding drawn
        # from N(0, 0.02).
        nn.init.normal_(self.projection.weight, std=0.02)

    @torch.no_grad()
    def set_text(self, ids: list[int], embeddings: Tensor) -> None:
        """Store the frozen embeddings `[len(ids), E]` of the texts of these ids."""
        self.text[torch.as_tensor(ids, device=self.text.device)] = embeddings.to(self.text)

    def forward(self, ids: Tensor) -> Tensor:
        return self.projection(self.text[ids]) + self.residual(ids)


@MODEL_REGISTRY.register("PriorZeroModel")
class PriorZeroModel(UniZeroModel):
    """See the module's docstring.

    Args:
        observation_shape: dimension of an observation vector.
        action_space_size: `V`, size of the action vocabulary.
        action_text_dim: `E`, dimension of an action text's embedding; 0 keeps LightZero's plain
            table (positional ids).
        world_model_cfg: LightZero's world-model settings.
    """

    def __init__(
        self,
        observation_shape: int,
        action_space_size: int,
        world_model_cfg: EasyDict,
        action_text_dim: int = 0,
        **kwargs,
    ) -> None:
        with quiet_base():
            super().__init__(
                observation_shape=observation_shape,
                action_space_size=action_space_size,
                world_model_cfg=world_model_cfg,
                norm_type="LN",
            )
            encoder = RepresentationNetworkMLP(
                observation_shape,
                hidden_channels=world_model_cfg.embed_dim,
                layer_num=2,
                activation=self.activation,
                norm_type="LN",
                group_size=world_model_cfg.group_size,
            )

        self.representation_network = encoder
        self.tokenizer.encoder = encoder
        self.tokenizer.decoder_network = None
        self.decoder_network = None

        if action_text_dim:
            self.world_model.act_embedding_table = TextActionEmbedding(
                action_space_size, action_text_dim, world_model_cfg.embed_dim
            )
        self.to(self.world_model.device)

    def set_action_text(self, ids: list[int], embeddings: Tensor) -> None:
        """Give the texts of newly named actions to the action table; a plain table has none and
        ignores it.
        """
        table = self.world_model.act_embedding_table
        if isinstance(table, TextActionEmbedding):
            table.set_text(ids, embeddings)

    @contextmanager
    def borrowed_action_text(self) -> Iterator[None]:
        """Inside, `set_action_text` writes into a copy of the action texts that is gone
        afterwards.
        """
        table = self.world_model.act_embedding_table
        if not isinstance(table, TextActionEmbedding):
            yield
            return
        own = table.text
        table.text = own.clone()
        try:
            yield
        finally:
            table.text = own

    def encode(self, observations: Tensor) -> Tensor:
        """Observation vectors `[..., E]` -> latent states `[..., D]` (SimNorm groups sum to 1)."""
        return self.tokenizer.encoder(observations.flatten(0, -2)).view(
            *observations.shape[:-1], -1
        )

    def unroll(self, latents: Tensor, actions: Tensor) -> Unrolled:
        """What the network says along o_0 a_0 o_1 a_1 …, under causal attention, without a cache.

        It is LightZero's forward to the last bit (tests/world_model/test_model.py), which joins the
        tokens step by step and picks them with indices of the CPU: a copy of all gradients for each
        step, and a wait for the GPU at each head.

        Args:
            latents: `[B, T, D]`.
            actions: `[B, T]` ids.
        """
        states, taken = self._hidden(latents, actions)
        heads = self.world_model
        return Unrolled(
            latent=heads.head_observations.head_module(taken),
            reward=heads.head_rewards.head_module(taken),
            policy=heads.head_policy.head_module(states),
            value=heads.head_value.head_module(states),
        )

    def predict(self, observations: Tensor, actions: Tensor) -> Unrolled:
        """`unroll` from observation vectors `[B, T, E]` on."""
        return self.unroll(self.encode(observations), actions)

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`predict`'s value logits `[B, T, S]` alone."""
        states, _ = self._hidden(self.encode(observations), actions)
        return self.world_model.head_value.head_module(states)

    def _hidden(self, latents: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The transformer's outputs `[B, T, D]` at the states' tokens and at the actions'."""
        assert latents.shape[:2] == actions.shape
        wm, (rows, steps, width) = self.world_model, latents.shape
        embedded = wm.act_embedding_table(actions)
        # Under autocast both are of its type, and positions and residual stream are not.
        tokens = torch.stack([latents.float(), embedded.float()], dim=2)
        positions = torch.arange(2 * steps, device=latents.device)
        hidden = wm.transformer(tokens.view(rows, 2 * steps, width) + wm.pos_emb(positions))
        return hidden[:, 0::2].contiguous(), hidden[:, 1::2].contiguous()
