"""A small stand-in for ORZ's workers, where its source is not at hand: the same loss in one
process, written down from ORZ's paper (arXiv:2503.24290) and code. It is never called ORZ.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from priorzero.llm.update.orz.contract import MOMENTS, Learnt, OrzFailure
from priorzero.llm.update.orz.packs import Pack, Plan


class StandIn:
    """A `Session`.

    Args:
        base: folder of the model. settings: the `llm` group.

    Attributes:
        fails: the next call raises this. closed: whether it was.
        spoils: the weights handed over are NaN.
    """

    def __init__(self, base: Path, settings) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(base).float().eval()
        self._train, self._passes = settings.train, settings.rft.epochs
        self._named = dict(self._model.named_parameters())
        self._optimizer = torch.optim.AdamW(
            self._named.values(), lr=settings.train.learning_rate, betas=(0.9, 0.95), weight_decay=0
        )
        self._steps = 0
        self.fails: OrzFailure | None = None
        self.closed = self.spoils = False

    def learn(self, plan: Plan, moments: bool) -> Learnt:
        if self.fails is not None:
            raise self.fails
        with torch.no_grad():
            olds = [[self._logprobs(pack) for pack in own] for own in plan.packs]
        per_step = len(plan.packs[0]) // plan.steps
        losses, norms = [], []
        for step in [*range(plan.steps)] * self._passes:
            self._optimizer.zero_grad()
            places = range(step * per_step, (step + 1) * per_step)
            pairs = [
                (own[i], old[i]) for own, old in zip(plan.packs, olds, strict=True) for i in places
            ]
            loss = torch.stack([self._loss(*pair) for pair in pairs]).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self._named.values(), self._train.max_grad_norm)
            self._optimizer.step()
            self._steps += 1
            losses.append(loss.item())
            norms.append(float(norm))
        status = dict(
            policy_loss=sum(losses) / len(losses),
            clip_ratio=0.0,
            entropy=1.0,
            actor_lr=self._train.learning_rate,
        )
        state = self._state(moments)
        if self.spoils:
            next(iter(state["model"].values())).fill_(torch.nan)
        return Learnt(state, status, norms, 0.0, 0.0)

    def _loss(self, pack: Pack, old: torch.Tensor) -> torch.Tensor:
        ratio, advantages = (self._logprobs(pack) - old).exp(), pack.tensors().advantages[0]
        epsilon = self._train.clip_epsilon
        bounded = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
        return -torch.minimum(ratio * advantages, bounded).mean()

    def _logprobs(self, pack: Pack) -> torch.Tensor:
        found = []
        for one in pack.decisions:
            row, rated = torch.tensor([one.ids]), len(one.advantages)
            logits = self._model(row).logits[0].log_softmax(-1)
            found.append(logits[-rated - 1 : -1].gather(1, row[0, -rated:, None])[:, 0])
        return torch.cat(found)

    def _state(self, moments: bool) -> dict:
        state = {
            "model": {n: p.detach().clone() for n, p in self._named.items()},
            "steps": self._steps,
        }
        if moments and self._steps:
            for key in MOMENTS:
                kept = self._optimizer.state
                state[key] = {n: kept[p][key].clone() for n, p in self._named.items()}
        return state

    def gather(self) -> dict:
        if self.fails is not None:
            raise self.fails
        return self._state(True)

    def restore(self, state: dict) -> None:
        self._steps = state["steps"]
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(state["model"][name])
                if MOMENTS[0] in state:
                    step = torch.tensor(float(self._steps))
                    kept = {key: state[key][name].clone() for key in MOMENTS}
                    self._optimizer.state[parameter] = {"step": step} | kept

    def close(self) -> None:
        self.closed = True
