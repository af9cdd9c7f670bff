"""ORZ's policy worker, with what our trainer asks of it besides. Imports ORZ.

It lives in a process of Ray's. Every worker keeps a part of the optimiser, so that what is gathered
from them, or given to them, all of them are asked for at once.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from priorzero.llm.update.orz.contract import MOMENTS
from priorzero.llm.update.orz.mends import (
    accumulate,
    float32_logits,
    link_moments,
    no_cuda_for_good,
    orz_imported,
    separate_samples,
    torch_adam,
)

with orz_imported() as MENDS:
    from orz.ppo.actors import PolicyRayActorBase


class PolicyActor(PolicyRayActorBase):
    """Computes log-probabilities of packs and trains on them."""

    def __init__(self, *args) -> None:
        no_cuda_for_good()
        super().__init__(*args)
        self._norms: list[float] = []

    @property
    def _engine(self):
        """DeepSpeed's, around the Hugging Face model."""
        return self.model.model

    def init_model_from_pretrained(self, strategy, pretrain: str) -> None:
        """Load the model, and mend what is wrong in it."""
        torch_adam()
        super().init_model_from_pretrained(strategy, pretrain)
        separate_samples(self._engine.module, self.args.flash_attn)
        float32_logits(self._engine.module)

    def begin(self, steps: int) -> None:
        """Before a phase of so many optimiser steps; ORZ knows one number for all phases."""
        self.args.policy_update_steps = steps
        self._norms = []

    def training_step(self, experience, global_steps, local_step, accumulation_steps):
        """One pack, and the optimiser's step behind the last one of each."""
        last = (local_step + 1) % accumulation_steps == 0
        accumulate(self._engine, last)
        status = super().training_step(experience, global_steps, local_step, accumulation_steps)
        if last:
            self._norms.append(float(self._engine.get_global_grad_norm()))
        return status

    def norms(self) -> list[float]:
        """Of the phase's gradients, before clipping; a number per optimiser step."""
        return self._norms

    def gpu_gb(self) -> float:
        """GiB of its GPU that torch has held at the most; 0 on a CPU."""
        return torch.cuda.max_memory_reserved() / 2**30

    def gather(self, moments: bool) -> dict[str, Any] | None:
        """The weights in float32 under their Hugging Face names, on the CPU.

        Args:
            moments: Adam's moments too, which there are once a step was taken.

        Returns:
            model, steps, and the moments; None but for the first worker.
        """
        found: dict[str, Any] = {"model": {}, "steps": self.scheduler.last_epoch}
        keys = MOMENTS if moments and found["steps"] else ()
        found |= {key: {} for key in keys}
        if keys:
            link_moments(self._engine.optimizer)
        first = torch.distributed.get_rank() == 0
        for name, parameter in self._engine.module.named_parameters():
            parts = {"model": safe_get_full_fp32_param(parameter)}
            parts |= {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            for key, value in parts.items():
                if first:
                    found[key][name] = value.detach().float().cpu()
        return found if first else None

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `gather`. Without moments they begin at 0."""
        named = dict(self._engine.module.named_parameters())
        for name, value in state["model"].items():
            safe_set_full_fp32_param(named[name], value.to(named[name].device))
        self._stand_still()

        for key in MOMENTS:
            for name, parameter in named.items():
                value = (
                    state[key][name] if key in state else torch.zeros(state["model"][name].shape)
                )
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        for kept in self._engine.optimizer.optimizer.state.values():
            counted = kept["step"]  # torch's optimiser counts in a tensor, DeepSpeed's in a number
            steps = torch.as_tensor(state["steps"], dtype=torch.float32)
            kept["step"] = steps.to(counted) if torch.is_tensor(counted) else state["steps"]
        self.scheduler.last_epoch = state["steps"] - 1
        self.scheduler.step()

    def _stand_still(self) -> None:
        """A step with a gradient of 0 at a rate of 0: DeepSpeed makes place for the moments, and
        rounds the weights it computes with from those in float32, in a step only.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        ids = torch.zeros((1, 2), dtype=torch.long, device=torch.cuda.current_device())
        self._engine.train()
        accumulate(self._engine, True)
        self._engine.backward(self._engine(ids).logits.sum() * 0.0)
        self._engine.step()
        link_moments(self._engine.optimizer)
