"""The built-in trainer: AdamW on the Hugging Face model in this process, all weights or adapters.

Weights and optimiser are float32 and the forward runs under bfloat16 autocast where the hardware is
fast at it. A bfloat16 weight of size 0.1 moves in steps of 0.0005, so AdamW steps of 1e-5 would
round to nothing; and an engine on the same object under the same autocast needs no second copy.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from priorzero.llm.module import base_model, pick_dtype
from priorzero.llm.scoring.forward import computing, tree_logprobs
from priorzero.llm.scoring.head_cache import HeadCache
from priorzero.llm.scoring.items import TreeItem, plan_batches, prepare
from priorzero.llm.scoring.layers import checkpointable_layers
from priorzero.llm.scoring.logits import split_actions
from priorzero.llm.scoring.trunk import TrunkCache, frozen_layers
from priorzero.llm.update.bad_steps import BadSteps, NotFinite
from priorzero.llm.update.build import make_objectives
from priorzero.llm.update.learning_rate import learning_rate
from priorzero.llm.update.objective import Answer, Objective
from priorzero.llm.update.samples import LLMSample
from priorzero.llm.weights.adapters import with_adapters
from priorzero.llm.weights.export import Weights
from priorzero.llm.weights.identity import ModelIdentity
from priorzero.llm.weights.trained import base_of, lay_over
from priorzero.types import ActionScores, PriorZeroError, TokenisedRequest

if TYPE_CHECKING:
    from priorzero.settings.llm import LLMSettings

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.95)  # AdamW's, as usual for language models


class _Ready(NamedTuple):
    """A decision of a phase: as it was drawn, ready for the forward, and with its targets."""

    sample: LLMSample
    item: TreeItem
    prepared: Any


def make(
    model: torch.nn.Module,
    tokenizer,
    settings: LLMSettings,
    reduction: str,
    folder: Path | None = None,
) -> BuiltinTrainer:
    """Plug-in contract of `trainers/`; see `BuiltinTrainer`.

    Args:
        tokenizer: not needed here; samples are token ids.
    """
    return BuiltinTrainer(model, settings, make_objectives(settings, reduction), folder)


class BuiltinTrainer:
    """Owns the trainable LLM and its optimiser; an `LLMTrainer`.

    Args:
        model: Hugging Face causal LM. Its weights are turned into float32 in place; with
            `settings.lora` it gets adapters and only they train, and the frozen layers are kept in
            the dtype they are multiplied in.
        settings: the `llm` group.
        objectives: by name, see `make_objectives`. Where one asks for the LLM before any training,
            it is this model with its adapters switched off, or a copy of all weights.
        folder: of the run; `bad_steps/` in there keeps steps that were skipped. None: none is kept.

    Raises:
        PriorZeroError: the adapters' target modules do not exist in this model, or gradient
            checkpointing is asked for and its layers are not found.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: LLMSettings,
        objectives: Mapping[str, Objective],
        folder: Path | None = None,
    ) -> None:
        self._settings = settings.train
        self._objectives = dict(objectives)
        self.version = 0
        self._steps = 0
        self._bad_steps = BadSteps(
            None if folder is None else folder / "bad_steps", settings.train.max_bad_steps
        )
        self.lock = threading.RLock()

        self.device = next(model.parameters()).device
        wanted = pick_dtype(settings.dtype, self.device)
        self._compute_dtype = None if wanted == torch.float32 else wanted
        self._base = ModelIdentity.of(model)
        model = model.float()
        self._initial: torch.nn.Module | None = None
        if not settings.lora.enable and any(o.initial for o in objectives.values()):
            self._initial = copy.deepcopy(model).requires_grad_(False).eval()
        if settings.lora.enable:
            model = with_adapters(model, settings.lora, self._compute_dtype)
        self._model = model.eval()
        self.trunk = self._make_trunk(settings.trunk_cache_mib)
        if settings.train.gradient_checkpointing and not checkpointable_layers(self._model):
            raise PriorZeroError(
                f"the layers of this LLM ({type(base_model(self._model)).__name__}) cannot be told "
                "apart, so that none can be computed apart; set llm.train.gradient_checkpointing "
                "to false"
            )

        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=self._settings.learning_rate,
            betas=_BETAS,
            weight_decay=self._settings.weight_decay,
        )

    def _make_trunk(self, mebibytes: int) -> TrunkCache | None:
        # On CUDA states are not packed, so nothing would be read from it.
        if not mebibytes or self.device.type != "cpu":
            return None
        depth = frozen_layers(self._model)
        return TrunkCache(depth, mebibytes << 20, self._compute_dtype) if depth else None

    # ---- training --------------------------------------------------------------------------------

    def update(self, samples: Mapping[str, Sequence[LLMSample]]) -> dict[str, float]:
        """See `LLMTrainer.update`.

        Metrics of every objective besides its own: grad_norm (mean over the steps taken, before
        clipping), learning_rate (of the last one), epochs (passes over the samples, fewer where the
        objective stopped or a step was skipped), skipped_steps (a number in them was not finite),
        tokens, samples, seconds. Without a step taken there is nothing of the objective's own.
        """
        metrics: dict[str, float] = {}
        with self.lock:
            for name, drawn in samples.items():
                if drawn:
                    values = self._train(name, drawn)
                    metrics |= {f"{name}_{key}": value for key, value in values.items()}
            self.version += bool(metrics)
            self._optimizer.zero_grad(set_to_none=True)

        return_freed_memory()
        logger.debug("LLM weights %d: %s", self.version, metrics)
        return metrics

    def _train(self, name: str, samples: Sequence[LLMSample]) -> dict[str, float]:
        """Cut into optimiser steps, each into micro-batches; the loss of a step is the mean over
        its samples. A step with a number that is not finite is skipped.
        """
        started = time.perf_counter()
        objective = self._objectives[name]
        done = {"samples": float(len(samples)), "skipped_steps": 0.0}
        try:
            prepared, metrics = objective.prepare(samples, self._answers)
        except NotFinite as fault:
            self._skip(fault, name, samples, ())
            return done | {"skipped_steps": 1.0, "seconds": time.perf_counter() - started}

        items = _items(samples, objective.thoughts)
        ready = [_Ready(*row) for row in zip(samples, items, prepared, strict=True)]
        size = self._settings.batch_size or len(samples)
        steps = [ready[start : start + size] for start in range(0, len(ready), size)]

        rows: list[dict[str, float]] = []
        norms, tokens = [], 0
        for step in steps * objective.passes:
            self._optimizer.zero_grad(set_to_none=True)
            try:
                own, computed = self._gradients(objective, step)
                tokens += computed
                stops = objective.stops(_means(own))
                norm = None if stops else self._step()
            except NotFinite as fault:
                self._skip(fault, name, [r.sample for r in step], [r.prepared for r in step])
                done["skipped_steps"] += 1
                continue
            rows += own
            if norm is None:
                break
            norms.append(norm)
            self._bad_steps.passed()

        if rows:
            objective.finish(_means(rows))
        return (
            _means(rows)
            | metrics
            | done
            | {
                "grad_norm": sum(norms) / max(1, len(norms)),
                "learning_rate": learning_rate(self._settings, max(1, self._steps)),
                "epochs": len(norms) / len(steps),
                "tokens": float(tokens),
                "seconds": time.perf_counter() - started,
            }
        )

    def _skip(
        self,
        fault: NotFinite,
        name: str,
        samples: Sequence[LLMSample],
        targets: Sequence[Any],
    ) -> None:
        """Leave everything as it was before the step; see `BadSteps.skipped`."""
        self._optimizer.zero_grad(set_to_none=True)
        self._bad_steps.skipped(
            fault, samples, targets, objective=name, version=self.version, step=self._steps
        )

    def _gradients(
        self, objective: Objective, step: Sequence[_Ready]
    ) -> tuple[list[dict[str, float]], int]:
        """Gradients of one optimiser step.

        Returns:
            each decision's metrics, and how many tokens were computed.

        Raises:
            NotFinite: a loss is not.
        """
        rows: list[dict[str, float]] = []
        tokens = 0
        items = [one.item for one in step]
        for batch in plan_batches(items, self._settings.max_batch_tokens):
            rows += self._backward(objective, step, batch)
            tokens += sum(items[i].num_tokens for i in batch)
            tokens += len(items[batch[0]].request.head_ids)
        return rows, tokens

    def _backward(
        self, objective: Objective, step: Sequence[_Ready], batch: Sequence[int]
    ) -> list[dict[str, float]]:
        """Add the gradients of one micro-batch, the places `batch` of a step; returns metrics."""
        with computing(self.device, self._compute_dtype):
            flats = tree_logprobs(
                self._model,
                [step[i].item for i in batch],
                trunk=self.trunk,
                checkpointing=self._settings.gradient_checkpointing,
            )

        losses, rows = [], []
        for flat, i in zip(flats, batch, strict=True):
            loss, metrics = objective.loss(_answer(step[i].item, flat), step[i].prepared)
            losses.append(loss)
            rows.append({key: float(value) for key, value in metrics.items()})

        total = torch.stack(losses).sum() / len(step)
        if not torch.isfinite(total):
            culprits = [
                i for i, loss in zip(batch, losses, strict=True) if not torch.isfinite(loss)
            ]
            raise NotFinite("loss", total.item(), culprits)
        total.backward()
        return rows

    def _step(self) -> float:
        """One optimiser step.

        Returns:
            the gradient's norm before clipping.

        Raises:
            NotFinite: it is not; nothing was changed.
        """
        limit = self._settings.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))
        if not math.isfinite(norm):
            raise NotFinite("gradient norm", norm)

        self._steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, self._steps)
        self._optimizer.step()
        return norm

    # ---- scoring ---------------------------------------------------------------------------------

    def score(
        self,
        requests: Sequence[TokenisedRequest],
        dtype: torch.dtype | None = None,
        *,
        all_layers: bool = False,
    ) -> list[ActionScores]:
        """See `LLMTrainer.score`."""
        compute = (
            self._compute_dtype if dtype is None else None if dtype == torch.float32 else dtype
        )
        trunk = self.trunk if compute == self._compute_dtype and not all_layers else None
        items = prepare(requests)
        answers: list[ActionScores] = [ActionScores((), self.version)] * len(items)
        filled = [i for i, item in enumerate(items) if item.request.action_ids]

        with self.lock, _float32_layers(self._model, compute is None):
            flats = self._forward(self._model, [items[i] for i in filled], compute, trunk)
        for i, flat in zip(filled, flats, strict=True):
            parts = split_actions(flat, items[i].request)
            answers[i] = ActionScores(tuple(tuple(p.tolist()) for p in parts), self.version)
        return answers

    def _answers(
        self, samples: Sequence[LLMSample], *, thoughts: bool = False, initial: bool = False
    ) -> list[Answer]:
        """See `Score`.

        Raises:
            NotFinite: a log-probability is not.
        """
        items = _items(samples, thoughts)
        with self.lock, contextlib.ExitStack() as stack:
            model, trunk = self._model, self.trunk
            if initial and self._initial is not None:
                model, trunk = self._initial, None
            elif initial:
                stack.enter_context(model.disable_adapter())
            flats = self._forward(model, items, self._compute_dtype, trunk)

        odd = [i for i, flat in enumerate(flats) if not flat.isfinite().all()]
        if odd:
            raise NotFinite("log-probabilities", float(flats[odd[0]].sum()), odd)
        return [_answer(item, flat.double()) for item, flat in zip(items, flats, strict=True)]

    def _forward(
        self,
        model: torch.nn.Module,
        items: Sequence[TreeItem],
        dtype: torch.dtype | None,
        trunk: TrunkCache | None,
    ) -> list[torch.Tensor]:
        """Flat log-probabilities per item on the CPU, without gradients."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(items)
        heads = HeadCache()
        with torch.no_grad(), computing(self.device, dtype):
            for batch in plan_batches(items, self._settings.max_batch_tokens):
                flats = tree_logprobs(model, [items[i] for i in batch], heads=heads, trunk=trunk)
                for i, flat in zip(batch, flats, strict=True):
                    found[i] = flat.cpu()
        return found

    # ---- weights and state -----------------------------------------------------------------------

    def weights(self) -> Weights:
        """See `LLMTrainer.weights`; a view of the live weights."""
        return Weights(self._model)

    def state_dict(self) -> dict:
        """Trained weights (adapters only with LoRA), optimiser, its steps and those skipped in a
        row, what the objectives remember, identity of the base. Their version is the loop's to save
        (`Progress`).

        The tensors are the live ones, as torch's own state_dict gives them: write them out before
        the next update.
        """
        with self.lock:
            names = {n for n, p in self._model.named_parameters() if p.requires_grad}
            weights = {n: t.detach() for n, t in self._model.state_dict().items() if n in names}
            return {
                "base": self._base.as_dict(),
                "model": weights,
                "optimizer": self._optimizer.state_dict(),
                "steps": self._steps,
                "bad_steps": self._bad_steps.in_a_row,
                "objectives": {name: o.state_dict() for name, o in self._objectives.items()},
            }

    def load_state_dict(self, state: dict) -> None:
        """See `LLMTrainer.load_state_dict`. Copied in place, so engines on this model see them."""
        with self.lock:
            base, adapters = base_of(state), Weights(self._model).has_adapter
            if base is not None and not base.fits(self._base, adapters=adapters):
                raise PriorZeroError(
                    f"the checkpoint's LLM was trained from {base}, this run's is {self._base}; "
                    "start with the same llm.model, or without --resume"
                )
            odd = lay_over(self._model, state["model"])
            if odd:
                raise PriorZeroError(
                    "the checkpoint's LLM trains other weights than this run's (for example "
                    f"{odd[:3]}); start with the same llm.lora settings, or without --resume"
                )
            # The moments only: rate, betas and weight decay are the settings' of this run.
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
            self._steps = state["steps"]
            # Earlier checkpoints have neither; an objective may have been switched on or off since.
            self._bad_steps.in_a_row = state.get("bad_steps", 0)
            for name, kept in state.get("objectives", {}).items():
                if name in self._objectives:
                    self._objectives[name].load_state_dict(kept)

    def stats(self) -> dict[str, float]:
        """See `LLMTrainer.stats`: of the trunk."""
        return self.trunk.stats() if self.trunk is not None else {}

    def close(self) -> None:
        """See `LLMTrainer.close`; nothing outlives this object."""


def _items(samples: Sequence[LLMSample], thoughts: bool) -> list[TreeItem]:
    """The samples ready for a forward, with or without the tokens of their thoughts."""
    written = [s.written if thoughts else range(0) for s in samples]
    return prepare([s.request for s in samples], written)


def _answer(item: TreeItem, flat: torch.Tensor) -> Answer:
    """What a forward gave to one item."""
    actions = len(flat) - len(item.written)
    return Answer(item.request, flat[:actions], flat[actions:])


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of per-sample metrics; empty without samples."""
    sums: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            sums[key] = sums.get(key, 0.0) + value
    return {key: value / len(rows) for key, value in sums.items()}


def return_freed_memory() -> None:
    """Give activations and gradients back to the system: glibc would keep the freed blocks."""
    if sys.platform == "linux":
        # Other C libraries have none, and need none.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def _float32_layers(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Frozen layers kept in bfloat16 as float32 for a while, where float32 is asked for; there and
    back nothing is lost.
    """
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)] if wanted else []
    kept = [(m, m.weight.dtype) for m in linear if m.weight.dtype != torch.float32]
    try:
        for module, _ in kept:
            module.float()
        yield
    finally:
        for module, dtype in kept:
            module.to(dtype)
