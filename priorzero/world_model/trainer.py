"""One update of the world model: targets, loss, optimiser step, target network.

`priorzero_policy.py` owns a `WorldModelTrainer` and calls it from its learn mode.

Letters: `B` rows, `T` unroll steps, `W` steps the network reads, burn-in and unroll; `S` support
size, `V` vocabulary size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priorzero.data.batch import LearnOutput, WorldModelBatch
from priorzero.quiet import quiet_base
from priorzero.settings.policy import PolicySettings
from priorzero.types import PriorZeroError
from priorzero.world_model.loss import WorldModelTargets, world_model_loss
from priorzero.world_model.model import PriorZeroModel, Unrolled

with quiet_base():
    from lzero.policy import DiscreteSupport, phi_transform, scalar_transform
    from lzero.policy.utils import configure_optimizers_nanogpt


class WorldModelTrainer:
    """Trains a network in place.

    Args:
        model: the online network.
        settings: optimiser, loss weights, value bootstrap.
        scalar_of: categorical logits `[n, S]` -> scalars `[n, 1]`.
        device: where the network lives.

    Attributes:
        target: the slowly following copy that value and latent targets come from.
    """

    def __init__(
        self,
        model: PriorZeroModel,
        settings: PolicySettings,
        scalar_of: Callable[[Tensor], Tensor],
        device: str,
    ) -> None:
        self._model, self._settings, self._scalar_of = model, settings, scalar_of
        self._device = device
        self.target = copy.deepcopy(model).requires_grad_(False)
        self._support = DiscreteSupport(-settings.support_scale, settings.support_scale, delta=1)
        with quiet_base():
            self._optimizer = configure_optimizers_nanogpt(
                model=model.world_model,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                device_type=device,
                betas=(0.9, 0.95),
            )
        self._fuse_optimizer()

    def update(self, batch: WorldModelBatch, used_actions: np.ndarray) -> LearnOutput:
        """One step on one batch.

        Args:
            used_actions: `[V]` bool, ids that name an action so far.

        Raises:
            PriorZeroError: the loss is not finite.
        """
        settings = self._settings
        self._model.train()
        self.target.eval()

        # 1. Targets: the target network's latents and values, the batch's rewards and policies.
        observations, actions = self._tensor(batch.observations), self._tensor(batch.actions)
        value = value_targets(batch, self.target, self._scalar_of, settings.value_bootstrap)
        with torch.no_grad():
            next_latents = self.target.encode(in_window(observations[:, 1:], batch))
        targets = WorldModelTargets(
            latent=next_latents,
            reward=self._categorical(self._tensor(batch.rewards)),
            value=self._categorical(value),
            policy=self._tensor(batch.policies),
            mask_latent=self._tensor(batch.mask_step),
            mask_reward=self._tensor(batch.mask_reward),
            mask_value=self._tensor(batch.mask_value),
            mask_policy=self._tensor(batch.mask_step),
            used_actions=self._tensor(used_actions),
        )

        # 2. Predictions along the window, and their loss. What was only read as context has none.
        sequence = self._model.unroll(self._model.encode(observations[:, :-1]), actions)
        outputs = Unrolled(*(in_window(output, batch) for output in sequence))
        total, terms = world_model_loss(
            outputs,
            targets,
            self._tensor(batch.weights),
            settings.group_size,
            settings.loss_weights,
        )
        if not torch.isfinite(total):
            shown = {name: term.item() for name, term in terms.items()}
            raise PriorZeroError(
                f"the world model's loss is {total.item()}; terms: {shown}. Lower learning_rate or "
                "grad_clip_value, or check the game's score range against support_scale"
            )

        # 3. The step, and the target network behind it.
        self._optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.world_model.parameters(), settings.grad_clip_value
        )
        self._optimizer.step()
        self._follow()

        predicted = self._scalar_of(outputs.value.detach()[:, 0])[:, 0]
        priorities = (predicted - value[:, 0]).abs().cpu().numpy()
        metrics = {name: term.item() for name, term in terms.items()} | {
            "wm_loss": total.item(),
            "grad_norm": float(norm),
            "value_error": float(priorities.mean()),
            "target_value": value[targets.mask_value.bool()].mean().item(),
            "target_reward": float(batch.rewards.mean()),
            "target_policy_entropy": _mean_entropy(targets.policy, targets.mask_policy),
            "learning_rate": self._optimizer.param_groups[0]["lr"],
        }
        return LearnOutput(metrics, priorities)

    def state_dict(self) -> dict[str, Any]:
        """Both networks and the optimiser."""
        return {
            "model": self._model.state_dict(),
            "target_model": self.target.state_dict(),
            "optimizer_world_model": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave, at any time of the project; further keys are ignored."""
        self._model.load_state_dict(state["model"])
        self.target.load_state_dict(state["target_model"])
        self._optimizer.load_state_dict(state["optimizer_world_model"])
        self._fuse_optimizer()  # an older checkpoint's groups say otherwise

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _categorical(self, scalars: Tensor) -> Tensor:
        """`[B, T]` scalars -> `[B, T, S]` two-hot distributions over the transformed support
        (MuZero, appendix F).
        """
        return phi_transform(self._support, scalar_transform(scalars))

    @torch.no_grad()
    def _follow(self) -> None:
        """Soft update: target <- (1 - theta) target + theta online."""
        torch._foreach_lerp_(
            list(self.target.parameters()),
            list(self._model.parameters()),
            self._settings.target_update_theta,
        )

    def _fuse_optimizer(self) -> None:
        """LightZero asks for PyTorch's fused step on CUDA only; it is the faster one everywhere."""
        for group in self._optimizer.param_groups:
            group["fused"] = True


def in_window(sequences: Tensor, batch: WorldModelBatch) -> Tensor:
    """`[B, W, ...]` along the batch's own sequences -> `[B, T, ...]` along its windows."""
    if batch.burn_in == 0:
        return sequences
    rows = torch.arange(len(batch), device=sequences.device)[:, None]
    steps = torch.arange(batch.rewards.shape[1], device=sequences.device)
    return sequences[rows, torch.from_numpy(batch.starts).to(sequences.device)[:, None] + steps]


def value_targets(
    batch: WorldModelBatch,
    network: PriorZeroModel,
    scalar_of: Callable[[Tensor], Tensor],
    bootstrap: str,
) -> Tensor:
    """n-step value targets `[B, T]`: returns + discounts * bootstrap value.

    Args:
        network: gives the values of the bootstrap states.
        bootstrap: "target_network": these values; "search": the search's own where they are known.
    """
    device = next(network.parameters()).device
    observations, actions, index, returns, discounts, searched = (
        torch.from_numpy(x).to(device)
        for x in (
            batch.bootstrap_observations,
            batch.bootstrap_actions,
            batch.bootstrap_index,
            batch.returns,
            batch.discounts,
            batch.search_values,
        )
    )
    with torch.no_grad():
        logits = network.unroll(network.encode(observations), actions).value
        if batch.burn_in:
            own = torch.from_numpy(batch.observations).to(device)[:, :-1]
            own_actions = torch.from_numpy(batch.actions).to(device)
            own_logits = network.unroll(network.encode(own), own_actions).value
            logits = torch.cat([logits, own_logits], dim=1)
        values = scalar_of(logits.flatten(0, 1)).view(logits.shape[:2]).gather(1, index)

    if bootstrap == "search":
        values = torch.where(searched.isnan(), values, searched)
    return returns + discounts * values


def _mean_entropy(policy: Tensor, mask: Tensor) -> float:
    entropy = -(policy * torch.log(policy.clamp(min=1e-12))).sum(-1)
    return ((entropy * mask).sum() / mask.sum().clamp(min=1.0)).item()
