"""Trains the LLM: SFT towards the search's visit counts, RFT by policy gradient. Called by the
training loop only.

Numbers: weights and optimiser are float32 and the forward runs under bfloat16 autocast where the
hardware is fast at it. A bfloat16 weight of size 0.1 moves in steps of 0.0005, so AdamW steps of
1e-5 would round to nothing; and an engine on the same object under the same autocast needs no
second copy (measured on 2 cores: 6.0 states/s, against 6.7 on a bfloat16 copy and 2.8 in float32).

Methods are synchronous and heavy: call them with ``asyncio.to_thread``. They hold ``lock`` while
weights move; give the same lock to a `TransformersEngine` that shares the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from priorzero.llm.model import base_model, pick_dtype, store_layers_in
from priorzero.llm.scoring.forward import (
    TreeItem,
    action_totals,
    computing,
    head_key_values,
    plan_batches,
    prepare,
    split_actions,
    tree_logprobs,
)
from priorzero.llm.scoring.requests import ScoreRequest, TextTokeniser, model_max_tokens
from priorzero.llm.scoring.trunk import TrunkCache, frozen_layers
from priorzero.llm.update.losses import entropy_of, rft_loss, sft_action_loss, sft_token_loss
from priorzero.types import ActionScores, PriorZeroError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv:2106.09685) instead of full weights."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    last_layers: int = (
        0  # only the last so many layers get adapters, and gradients go no deeper; 0: all
    )


@dataclass(frozen=True)
class LLMTrainerSettings:
    """Settings of the LLM's training; wrong ones are refused on construction."""

    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # optimiser steps of linear warm-up
    max_grad_norm: float = 1.0
    batch_size: int = 0  # samples per optimiser step; 0: all samples of a call in one step
    max_batch_tokens: int = (
        1024  # padded tokens of one micro-batch; gradients of micro-batches accumulate
    )
    objective: str = (
        "actions"  # SFT: "actions" (distribution over the valid actions) or "tokens" (likelihood)
    )
    reduction: str = (
        "sum"  # token log-probabilities of an action: "sum" or "mean"; keep it equal to the prior's
    )
    compute_dtype: str = "auto"  # "auto", "bfloat16" or "float32"
    clip_epsilon: float = 0.2  # RFT
    kl_coef: float = 0.0  # RFT, KL(policy || reference) where a sample carries a reference
    entropy_coef: float = 0.0  # RFT
    max_prompt_tokens: int | None = None  # lowers the model's own limit
    lora: LoraSettings | None = None
    trunk_cache_mib: int = (
        1024  # memory for outputs of layers below the adapters (`trunk.py`), on a CPU; 0: none
    )

    def __post_init__(self) -> None:
        rules = {
            "learning_rate must be positive": self.learning_rate > 0,
            "max_grad_norm must be positive": self.max_grad_norm > 0,
            "max_batch_tokens must be at least 1": self.max_batch_tokens >= 1,
            "batch_size, warmup_steps and trunk_cache_mib must not be negative": min(
                self.batch_size, self.warmup_steps, self.trunk_cache_mib
            )
            >= 0,
            "objective must be 'actions' or 'tokens'": self.objective in ("actions", "tokens"),
            "reduction must be 'sum' or 'mean'": self.reduction in ("sum", "mean"),
            "compute_dtype must be 'auto', 'bfloat16' or 'float32'": self.compute_dtype
            in ("auto", "bfloat16", "float32"),
            "clip_epsilon must lie between 0 and 1": 0 < self.clip_epsilon < 1,
        }
        broken = [rule for rule, kept in rules.items() if not kept]
        if broken:
            raise PriorZeroError(f"LLM trainer settings: {'; '.join(broken)}. Got {self}")


@dataclass(frozen=True)
class SFTSample:
    """A state and the search's visit distribution over its actions (non-negative, sums to 1)."""

    request: ScoreRequest
    target: tuple[float, ...]


@dataclass(frozen=True)
class RFTSample:
    """A state, what was done, and how good it was.

    ``old_logprob`` is the log-probability of ``action`` under the policy over the valid actions at
    collection time, from `LLMTrainer.score` (engines in bfloat16 are too noisy for ratios).
    ``reference`` holds log-probabilities of a reference policy over the same actions, or is empty.
    """

    request: ScoreRequest
    action: int
    advantage: float
    old_logprob: float
    weight: float = 1.0
    reference: tuple[float, ...] = ()


@dataclass
class _Tally:
    """Sums of per-sample metrics during one update."""

    sums: dict[str, float] = field(default_factory=dict)
    samples: int = 0

    def add(self, **values: float) -> None:
        self.samples += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)

    def means(self) -> dict[str, float]:
        return {key: value / max(1, self.samples) for key, value in self.sums.items()}


class LLMTrainer:
    """Owns the trainable LLM and its optimiser.

    :param model: Hugging Face causal LM; its weights are turned into float32 in place. With LoRA
        settings it gets adapters and only they train; frozen layers are then kept in the dtype they
        are multiplied in.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer, settings: LLMTrainerSettings | None = None
    ) -> None:
        self.settings = settings or LLMTrainerSettings()
        self.lock = threading.RLock()
        self.device = next(model.parameters()).device
        wanted = pick_dtype(self.settings.compute_dtype, self.device)
        self.compute_dtype = None if wanted == torch.float32 else wanted
        self.model = _with_lora(model.float(), self.settings.lora, self.compute_dtype).eval()
        limit = model_max_tokens(base_model(model).config, self.settings.max_prompt_tokens)
        self.text = TextTokeniser(tokenizer, limit)
        # On CUDA states are not packed (tree_forward.py), so nothing would be read from it.
        depth = (
            frozen_layers(self.model)
            if self.settings.trunk_cache_mib and self.device.type == "cpu"
            else 0
        )
        self.trunk = (
            TrunkCache(depth, self.settings.trunk_cache_mib << 20, self.compute_dtype)
            if depth
            else None
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
        )
        self.version = 0
        self.steps = 0

    def sft_update(self, samples: Sequence[SFTSample]) -> dict[str, float]:
        """One pass over ``samples``. States without an action teach nothing and are counted as
        ``skipped``.

        Metrics (means over the samples): cross_entropy (what is minimised), target_entropy (its
        floor: how undecided the search is, which no training of the LLM changes), loss
        (cross_entropy - target_entropy, 0 where the LLM has become the search), kl (KL(target ||
        policy), equal to loss unless the objective is "tokens"), accuracy (argmax of the policy is
        an argmax of the target), grad_norm (mean before clipping), tokens, seconds, samples,
        skipped.
        """
        for s in samples:
            if len(s.target) != len(s.request.actions):
                raise PriorZeroError(
                    f"an SFT target has {len(s.target)} entries for {len(s.request.actions)} actions"
                )
            if s.target and (min(s.target) < 0 or abs(sum(s.target) - 1) > 1e-3):
                raise PriorZeroError(f"an SFT target must be a distribution; got {s.target}")
        return self._update(samples, self._sft_term)

    def rft_update(self, samples: Sequence[RFTSample]) -> dict[str, float]:
        """One pass of policy gradient over ``samples``.

        Metrics: loss, policy_loss, ratio, clip_fraction, approx_kl (old || new, arXiv:1707.06347's
        estimator k3), kl_reference, entropy, grad_norm, tokens, seconds, samples, skipped.
        """
        for s in samples:
            actions = len(s.request.actions)
            if actions and not 0 <= s.action < actions:
                raise PriorZeroError(f"an RFT sample names action {s.action} of {actions}")
            if s.reference and len(s.reference) != actions:
                raise PriorZeroError(
                    f"an RFT reference has {len(s.reference)} entries for {actions} actions"
                )
            if not (
                math.isfinite(s.advantage)
                and math.isfinite(s.old_logprob)
                and math.isfinite(s.weight)
            ):
                raise PriorZeroError(f"an RFT sample holds a number that is not finite: {s}")
        return self._update(samples, self._rft_term)

    def _sft_term(
        self, flat: torch.Tensor, item: TreeItem, sample: SFTSample, tally: _Tally
    ) -> torch.Tensor:
        target = torch.tensor(sample.target, dtype=torch.float32, device=flat.device)
        totals = action_totals(flat, item.request, self.settings.reduction)
        action_loss = sft_action_loss(totals, target)
        loss = action_loss
        if self.settings.objective == "tokens":
            loss = sft_token_loss(action_totals(flat, item.request, "sum"), target)
        floor = entropy_of(target)
        hit = target[totals.argmax()] >= target.max() - 1e-9
        tally.add(
            loss=loss.detach() - floor,
            cross_entropy=loss.detach(),
            kl=action_loss.detach() - floor,
            target_entropy=floor,
            accuracy=hit,
        )
        return loss

    def _rft_term(
        self, flat: torch.Tensor, item: TreeItem, sample: RFTSample, tally: _Tally
    ) -> torch.Tensor:
        s = self.settings
        totals = action_totals(flat, item.request, s.reduction)
        reference = torch.tensor(sample.reference, device=flat.device) if sample.reference else None
        terms = rft_loss(
            totals,
            sample.action,
            sample.advantage,
            sample.old_logprob,
            weight=sample.weight,
            clip_epsilon=s.clip_epsilon,
            reference=reference,
            kl_coef=s.kl_coef,
            entropy_coef=s.entropy_coef,
        )
        ratio = terms.ratio.detach()
        tally.add(
            loss=terms.loss.detach(),
            policy_loss=terms.policy_loss.detach(),
            ratio=ratio,
            clip_fraction=terms.clipped,
            approx_kl=ratio - 1 - ratio.log(),
            kl_reference=terms.kl_reference.detach(),
            entropy=terms.entropy.detach(),
        )
        return terms.loss

    def _update(self, samples: Sequence, term: Callable) -> dict[str, float]:
        """Cut into optimiser steps, each into micro-batches; the loss of a step is the mean over
        its samples.
        """
        started = time.perf_counter()
        useful = [s for s in samples if s.request.actions]
        tally, norms, tokens = _Tally(), [], 0
        with self.lock:
            items = prepare(self.text.tokenise_all([s.request for s in useful]))
            size = self.settings.batch_size or max(1, len(useful))
            for start in range(0, len(useful), size):
                chunk = range(start, min(start + size, len(useful)))
                self.optimizer.zero_grad(set_to_none=True)
                for batch in plan_batches(
                    [items[i] for i in chunk], self.settings.max_batch_tokens
                ):
                    rows = [start + j for j in batch]
                    self._backward(
                        [items[i] for i in rows], [useful[i] for i in rows], term, tally, len(chunk)
                    )
                    tokens += sum(items[i].num_tokens for i in rows) + len(
                        items[rows[0]].request.head_ids
                    )
                norms.append(self._step())
            self.optimizer.zero_grad(set_to_none=True)
            self.version += bool(useful)
        _return_freed_memory()
        metrics = tally.means() | {
            "grad_norm": sum(norms) / max(1, len(norms)),
            "tokens": float(tokens),
            "samples": float(len(useful)),
            "skipped": float(len(samples) - len(useful)),
            "seconds": time.perf_counter() - started,
        }
        logger.debug("LLM update %d: %s", self.version, metrics)
        return metrics

    def _backward(
        self, items: list[TreeItem], samples: list, term: Callable, tally: _Tally, share: int
    ) -> None:
        with computing(self.device, self.compute_dtype):
            flats = tree_logprobs(self.model, items, trunk=self.trunk)
        loss = (
            torch.stack(
                [term(f, i, s, tally) for f, i, s in zip(flats, items, samples, strict=True)]
            ).sum()
            / share
        )
        if not torch.isfinite(loss):
            raise PriorZeroError(
                f"the LLM's loss became {loss.item()}; lower the learning rate and resume from a checkpoint"
            )
        loss.backward()

    def _step(self) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        if not math.isfinite(norm):
            raise PriorZeroError(
                f"the LLM's gradient norm became {norm}; lower the learning rate and resume from a checkpoint"
            )
        self.steps += 1
        warm = (
            min(1.0, self.steps / self.settings.warmup_steps) if self.settings.warmup_steps else 1.0
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warm
        self.optimizer.step()
        return norm

    def score(
        self,
        requests: Sequence[ScoreRequest],
        dtype: torch.dtype | None = None,
        *,
        all_layers: bool = False,
    ) -> list[ActionScores]:
        """Token log-probabilities under the trainer's own weights: behaviour policies of RFT,
        canary of engines.

        ``dtype`` computes in another dtype than training does; ``all_layers`` takes nothing from
        the trunk cache. Requests with ``reasoning`` are scored as they stand, without a thought.
        """
        compute = self.compute_dtype if dtype is None else None if dtype == torch.float32 else dtype
        trunk = self.trunk if compute == self.compute_dtype and not all_layers else None
        items = prepare(self.text.tokenise_all(requests))
        answers: list[ActionScores] = [ActionScores((), self.version)] * len(items)
        filled = [i for i, item in enumerate(items) if item.request.action_ids]
        with (
            self.lock,
            torch.no_grad(),
            _float32_layers(self.model, compute is None),
            computing(self.device, compute),
        ):
            for batch in plan_batches([items[i] for i in filled], self.settings.max_batch_tokens):
                rows = [filled[j] for j in batch]
                head = items[rows[0]].request.head_ids
                kv = head_key_values(self.model, head, trunk) if head else None
                flats = tree_logprobs(self.model, [items[i] for i in rows], head_kv=kv, trunk=trunk)
                for i, flat in zip(rows, flats, strict=True):
                    parts = split_actions(flat.cpu(), items[i].request)
                    answers[i] = ActionScores(tuple(tuple(p.tolist()) for p in parts), self.version)
        return answers

    def state_dict(self) -> dict:
        """Everything needed to go on: trained weights (adapters only with LoRA), optimiser,
        counters.

        The tensors are the live ones, as torch's own state_dict gives them: write them out before
        the next update.
        """
        with self.lock:
            names = {n for n, p in self.model.named_parameters() if p.requires_grad}
            weights = {n: t.detach() for n, t in self.model.state_dict().items() if n in names}
            return {
                "model": weights,
                "optimizer": self.optimizer.state_dict(),
                "version": self.version,
                "steps": self.steps,
            }

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`; the weights are copied in place, so engines on this model see them."""
        with self.lock:
            own = dict(self.model.named_parameters())
            names = {n for n, p in own.items() if p.requires_grad}
            if names != set(state["model"]):
                odd = sorted(names ^ set(state["model"]))[:3]
                raise PriorZeroError(
                    f"the checkpoint's LLM has other weights than this run's (for example {odd}); "
                    "start with the same --llm and LoRA settings, or without --resume"
                )
            with torch.no_grad():
                for name, value in state["model"].items():
                    own[name].copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            self.version, self.steps = state["version"], state["steps"]


def _return_freed_memory() -> None:
    """Give activations and gradients back to the system: glibc keeps freed blocks for itself, over
    1 GB of them here.
    """
    if sys.platform == "linux":
        trim = getattr(
            ctypes.CDLL(None), "malloc_trim", None
        )  # other C libraries have none, and need none
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def _float32_layers(model: torch.nn.Module, wanted: bool):
    """Frozen layers kept in bfloat16 as float32 for a while, where float32 is asked for; there and
    back nothing is lost.
    """
    kept = (
        [
            m
            for m in model.modules()
            if isinstance(m, torch.nn.Linear) and m.weight.dtype != torch.float32
        ]
        if wanted
        else []
    )
    dtypes = [m.weight.dtype for m in kept]
    try:
        for module in kept:
            module.float()
        yield
    finally:
        for module, dtype in zip(kept, dtypes, strict=True):
            module.to(dtype)


def _with_lora(
    model: torch.nn.Module, lora: LoraSettings | None, frozen_dtype: torch.dtype | None
) -> torch.nn.Module:
    if lora is None:
        return model
    if frozen_dtype is not None:
        store_layers_in(model, frozen_dtype)
    from peft import LoraConfig, get_peft_model

    targets = (
        lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    )
    layers = None
    if lora.last_layers:
        total = model.config.num_hidden_layers
        layers = list(range(max(0, total - lora.last_layers), total))
        if targets == "all-linear":  # peft takes layers only together with names
            inside = model.get_decoder().layers.named_modules()
            targets = sorted(
                {name.rpartition(".")[2] for name, m in inside if isinstance(m, torch.nn.Linear)}
            )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        layers_to_transform=layers,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise PriorZeroError(
            f"LoRA with target_modules {lora.target_modules!r} cannot be put on this LLM: {error}"
        ) from error
