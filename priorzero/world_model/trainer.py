"""One update of the world model: targets, loss, optimiser step, target network.

`priorzero_policy.py` owns a `WorldModelTrainer` and calls it from its learn mode.

Letters: `B` rows, `T` unroll steps, `W` steps the network reads, burn-in and unroll; `S` support
size, `V` vocabulary size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priorzero.data.batch import LearnOutput, WorldModelBatch
from priorzero.quiet import quiet_base
from priorzero.settings.policy import PolicySettings
from priorzero.types import PriorZeroError
from priorzero.world_model.categorical import Support
from priorzero.world_model.loss import WorldModelTargets, world_model_loss
from priorzero.world_model.model import PriorZeroModel, Unrolled

with quiet_base():
    from lzero.policy.utils import configure_optimizers_nanogpt


class PendingOutput:
    """A `LearnOutput` that a GPU may still be computing. Reading any of it waits and fetches all of
    it, in one transfer.

    So a caller that reads after several updates lets the GPU work while it builds the next batches.

    Args:
        numbers: scalars on the device, by name: `total`, `grad_norm` and the metrics.
        priorities: `[B]` on the device.
        known: metrics that need no device.
    """

    def __init__(
        self, numbers: dict[str, Tensor], priorities: Tensor, known: dict[str, float]
    ) -> None:
        self._names, self._known = list(numbers), known
        self._line = torch.cat([torch.stack(list(numbers.values())), priorities])

    @property
    def metrics(self) -> dict[str, float]:
        """Scalars to log.

        Raises:
            PriorZeroError: loss or gradient were not finite; the update was not made.
        """
        return self._fetched.metrics

    @property
    def priorities(self) -> np.ndarray:
        """`[B]` |value error| of each row's first step, for prioritised replay.

        Raises:
            PriorZeroError: as `metrics`.
        """
        return self._fetched.priorities

    @cached_property
    def _fetched(self) -> LearnOutput:
        line, count = self._line.cpu(), len(self._names)
        numbers = dict(zip(self._names, line[:count].tolist(), strict=True))
        priorities = line[count:].numpy()
        if not np.isfinite([numbers["wm_loss"], numbers["grad_norm"]]).all():
            raise PriorZeroError(
                f"the world model's loss is {numbers['wm_loss']}, its gradient's norm "
                f"{numbers['grad_norm']}; all numbers: {numbers}. That update was not made. Lower "
                "learning_rate or grad_clip_value, or check the game's score range against "
                "support_scale"
            )
        value_error = {"value_error": float(priorities.mean())}
        return LearnOutput(numbers | self._known | value_error, priorities)


class WorldModelTrainer:
    """Trains a network in place.

    Args:
        model: the online network.
        settings: optimiser, loss weights, value bootstrap, number format.
        device: where the network lives.

    Attributes:
        target: the slowly following copy that value and latent targets come from.
    """

    def __init__(self, model: PriorZeroModel, settings: PolicySettings, device: str) -> None:
        self._model, self._settings, self._device = model, settings, device
        self._support = Support(settings.support_scale, device)
        self._average: Callable[[Tensor], Tensor] | None = None
        self._bfloat16 = trains_in_bfloat16(settings.train_dtype, device)
        self.target = copy.deepcopy(model).requires_grad_(False).eval()

        self._predict, self._target_values = model.predict, self.target.values
        if settings.compile_update != "off":
            # Batches are of one size: shapes taken as they are give the fastest code.
            options = dict(mode=settings.compile_update, dynamic=False)
            self._predict = torch.compile(self._predict, **options)
            self._target_values = torch.compile(self._target_values, **options)

        with quiet_base():
            self._optimizer = configure_optimizers_nanogpt(
                model=model.world_model,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                device_type=device,
                betas=(0.9, 0.95),
            )
        self._fuse_optimizer()

    def update(self, batch: WorldModelBatch, used_actions: np.ndarray) -> PendingOutput:
        """One step on one batch. On a GPU nothing here waits for it.

        Args:
            used_actions: `[V]` bool, ids that name an action so far.

        Raises:
            PriorZeroError: loss or gradient are not finite. On a GPU that shows when the output is
                read; in any case such an update changes nothing.
        """
        self._model.train()
        self._optimizer.zero_grad()

        # 1. Targets: the target network's latents and values, the batch's rewards and policies.
        observations, actions = self._tensor(batch.observations), self._tensor(batch.actions)
        at = window_index(batch, self._device)
        with self._autocast(), torch.no_grad():
            next_latents = self.target.encode(in_window(observations[:, 1:], at)).float()
            value = value_targets(
                batch,
                self._target_values,
                self._support.scalars,
                self._settings.value_bootstrap,
                self._device,
            )
        targets = WorldModelTargets(
            latent=next_latents,
            reward=self._support.two_hot(self._tensor(batch.rewards)),
            value=self._support.two_hot(value),
            policy=self._tensor(batch.policies),
            mask_latent=self._tensor(batch.mask_step),
            mask_reward=self._tensor(batch.mask_reward),
            mask_value=self._tensor(batch.mask_value),
            mask_policy=self._tensor(batch.mask_step),
            used_actions=self._tensor(used_actions),
        )

        # 2. Predictions along the window, and their loss. What was only read as context has none.
        with self._autocast():
            sequence = self._predict(observations[:, :-1], actions)
        outputs = Unrolled(*(in_window(output, at).float() for output in sequence))
        total, terms = world_model_loss(
            outputs,
            targets,
            self._tensor(batch.weights),
            self._settings.group_size,
            self._settings.loss_weights,
            self._average,
        )

        # 3. The step, and the target network behind it.
        total.backward()
        total = self._common(total.detach())
        norm = self._step(total)
        self._follow()

        predicted = self._support.scalars(outputs.value.detach()[:, 0])[:, 0]
        output = PendingOutput(
            terms
            | {
                "wm_loss": total,
                "grad_norm": norm,
                "target_value": _masked_mean(value, targets.mask_value),
                "target_policy_entropy": _mean_entropy(targets.policy, targets.mask_policy),
            },
            (predicted - value[:, 0]).abs(),
            {
                "target_reward": float(batch.rewards.mean()),
                "learning_rate": self._optimizer.param_groups[0]["lr"],
            },
        )
        if self._device == "cpu":
            output.metrics  # noqa: B018  there is nothing to wait for, so what is wrong shows here
        return output

    def _step(self, total: Tensor) -> Tensor:
        """Change the weights, unless the loss or its gradient is not finite; returns the gradient's
        norm before clipping.

        Args:
            total: the loss whose gradient is there.
        """
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.world_model.parameters(), self._settings.grad_clip_value
        )
        # The fused step looks at this flag on the device, as it does for a gradient scaler: an
        # update that would do damage is left out before anybody has read the numbers.
        self._optimizer.found_inf = (~(total.isfinite() & norm.isfinite())).float().detach()
        self._optimizer.step()
        return norm

    def train_with_others(self, average: Callable[[Tensor], Tensor]) -> None:
        """From here on every update is made with the mean gradient of several processes, each of
        which calls `update` as often, with as many rows, and begins with the same weights.

        Args:
            average: elementwise mean over the processes; the same bits in each of them.
        """
        self._average = average

    def _common(self, total: Tensor) -> Tensor:
        """The mean over the processes of loss and gradient, in one exchange. Where the loss of one
        of them is not finite, it is so for all, and none makes the update.

        Returns:
            the loss.
        """
        if self._average is None:
            return total
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        line = self._average(torch.cat([total.view(1), *(g.flatten() for g in gradients)]))
        parts = line[1:].split([g.numel() for g in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))
        return line[0]

    def _autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 where that was chosen; weights, sums and losses stay
        float32.
        """
        device = torch.device(self._device).type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self._bfloat16)

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
        # The moments only: the rate and the like are the settings' of this run.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict(state["optimizer_world_model"] | {"param_groups": groups})

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self._device)

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


def trains_in_bfloat16(setting: str, device: str) -> bool:
    """Whether `policy.train_dtype` means bfloat16 on this device."""
    return setting == "bfloat16" or (setting == "auto" and torch.device(device).type == "cuda")


def to_device(array: np.ndarray, device: str) -> Tensor:
    """The array as a tensor there. To a GPU it goes through pinned memory, so that nobody waits."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def window_index(batch: WorldModelBatch, device: str) -> tuple[Tensor, Tensor] | None:
    """Where the windows `[B, T]` stand in the batch's own sequences; None: at their beginnings."""
    if batch.burn_in == 0:
        return None
    rows = np.arange(len(batch))[:, None]
    steps = batch.starts[:, None] + np.arange(batch.rewards.shape[1])
    return to_device(rows, device), to_device(steps, device)


def in_window(sequences: Tensor, at: tuple[Tensor, Tensor] | None) -> Tensor:
    """`[B, W, ...]` along the batch's own sequences -> `[B, T, ...]` along its windows.

    Args:
        at: of `window_index`.
    """
    return sequences if at is None else sequences[at]


@torch.no_grad()
def value_targets(
    batch: WorldModelBatch,
    values_of: Callable[[Tensor, Tensor], Tensor],
    scalars_of: Callable[[Tensor], Tensor],
    bootstrap: str,
    device: str = "cpu",
) -> Tensor:
    """n-step value targets `[B, T]`: returns + discounts * bootstrap value.

    Args:
        values_of: observations `[n, W, E]` and actions `[n, W]` -> value logits `[n, W, S]`.
        scalars_of: logits `[n, S]` -> scalars `[n, 1]`.
        bootstrap: "target_network": these values; "search": the search's own where they are known.
        device: where `values_of` computes.
    """

    def tensor(array: np.ndarray) -> Tensor:
        return to_device(array, device)

    observations, actions = batch.bootstrap_observations, batch.bootstrap_actions
    logits = values_of(tensor(observations), tensor(actions)).float()
    if batch.burn_in:
        own = tensor(batch.observations)[:, :-1]
        own_logits = values_of(own, tensor(batch.actions)).float()
        logits = torch.cat([logits, own_logits], dim=1)
    values = scalars_of(logits.flatten(0, 1)).view(logits.shape[:2])
    values = values.gather(1, tensor(batch.bootstrap_index))

    if bootstrap == "search":
        searched = tensor(batch.search_values)
        values = torch.where(searched.isnan(), values, searched)
    return tensor(batch.returns) + tensor(batch.discounts) * values


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def _mean_entropy(policy: Tensor, mask: Tensor) -> Tensor:
    return _masked_mean(-(policy * torch.log(policy.clamp(min=1e-12))).sum(-1), mask)
