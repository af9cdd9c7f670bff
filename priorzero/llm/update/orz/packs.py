"""Decisions as ORZ reads them: token ids in packs, an advantage on every token that is rated.

ORZ's loss of a pack is the mean over its rated tokens of PPO's clipped surrogate, and a step's loss
the mean over its packs. The built-in trainer's is a sum over tokens, each with its share and its
weight, and the mean over the step's decisions. The surrogate is linear in a positive factor of the
advantage, so that a factor on every token's makes the one the other:

    advantage ORZ gets = share weight A  *  N P / S

N: rated tokens of the pack, P: packs of the step, S: its decisions.

Letters: `R` rated tokens of a decision, `S` ids of a pack, `N` rated tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from priorzero.llm.update.objective import Answer
from priorzero.llm.update.rft import Rating, RFTTarget
from priorzero.llm.update.samples import LLMSample


@dataclass(frozen=True)
class RatedDecision:
    """One decision: prompt and executed action, and what its last `R` tokens are rated with.

    Attributes:
        ids: prompt, chain of thought and action, as they were scored in play.
        advantages: `[R]` share times weight times advantage; 0 on an action marker that the LLM did
            not write.
        reference: `[R]` log-probabilities the KL pulls to; NaN where they are unknown.
    """

    ids: tuple[int, ...]
    advantages: torch.Tensor
    reference: torch.Tensor

    def __post_init__(self) -> None:
        assert self.advantages.shape == self.reference.shape
        assert 0 < len(self.advantages) < len(self.ids)
        assert self.advantages.isfinite().all()


def rate(sample: LLMSample, target: RFTTarget, rating: Rating) -> RatedDecision:
    """A decision with what reinforcement wants of it.

    Args:
        sample: the decision.
        target: of the objective `token` (`RFT.prepare`): its units are the action's tokens, then
            those of the thought, where thoughts are trained.
        rating: the objective's own part, which knows every unit's share.
    """
    action = sample.request.action_ids[sample.action_index]
    written = len(target.old) - len(action)
    assert written in (0, len(sample.written)), "units are tokens"

    # The shares depend on the number of tokens alone.
    nothing = torch.zeros(sum(map(len, sample.request.action_ids)), dtype=torch.float64)
    answer = Answer(sample.request, nothing, nothing.new_zeros(written))
    share = rating.units(answer, sample.action_index).share
    advantages = share * target.weight * target.advantage
    known = target.reference
    reference = torch.full_like(advantages, torch.nan) if known is None else known.double()

    def in_order(units: torch.Tensor, marker: float) -> torch.Tensor:
        """Thought, the marker behind it, action."""
        behind = units.new_full((sample.thought_tokens - written,), marker)
        parts = [units[len(action) :], behind] if written else []
        return torch.cat([*parts, units[: len(action)]])

    return RatedDecision(
        ids=sample.request.prompt_ids + action,
        advantages=in_order(advantages, 0.0),
        reference=in_order(reference, torch.nan),
    )


class PackTensors(NamedTuple):
    """A pack in ORZ's form.

    Attributes:
        sequences: `[1, S]` ids of the decisions, one after another.
        attention_mask: `[1, S]` which decision each id belongs to, from 1.
        num_actions: rated tokens at each decision's end.
        packed_seq_lens: ids of each decision.
        advantages: `[1, N]`, see the module.
        reference: `[1, N]`.
    """

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    num_actions: list[int]
    packed_seq_lens: list[int]
    advantages: torch.Tensor
    reference: torch.Tensor


@dataclass(frozen=True)
class Pack:
    """Decisions that are computed in one row.

    Attributes:
        factor: P / S of its step; 0 for one that only fills a worker's place.
    """

    decisions: tuple[RatedDecision, ...]
    factor: float

    def tensors(self) -> PackTensors:
        """In ORZ's form, in float32."""
        lengths = [len(d.ids) for d in self.decisions]
        rated = [len(d.advantages) for d in self.decisions]
        numbers = [torch.full((n,), i, dtype=torch.int) for i, n in enumerate(lengths, 1)]
        advantages = torch.cat([d.advantages for d in self.decisions])
        return PackTensors(
            sequences=torch.tensor([[i for d in self.decisions for i in d.ids]]),
            attention_mask=torch.cat(numbers)[None],
            num_actions=rated,
            packed_seq_lens=lengths,
            advantages=(advantages * self.factor * sum(rated)).float()[None],
            reference=torch.cat([d.reference for d in self.decisions]).float()[None],
        )


@dataclass(frozen=True)
class Plan:
    """Packs of a phase.

    Attributes:
        packs: of each worker, in the order in which it computes them; each has as many.
        steps: optimiser steps, which share a worker's packs evenly.
    """

    packs: tuple[tuple[Pack, ...], ...]
    steps: int


def plan_packs(
    decisions: Sequence[RatedDecision], *, step_size: int, workers: int, max_tokens: int
) -> Plan:
    """Share the decisions of a phase out.

    ORZ's workers take as many packs for every step. A step that has fewer decisions than that gets
    packs whose advantages are 0.

    Args:
        decisions: at least one, in the order in which they are trained.
        step_size: decisions of an optimiser step; 0: all.
        workers: that train in parallel, on packs of their own.
        max_tokens: ids of a pack; a decision that is longer is a pack by itself. 0: each is.
    """
    size = step_size or len(decisions)
    chunks = [decisions[start : start + size] for start in range(0, len(decisions), size)]
    rows = [_bins(chunk, max_tokens) for chunk in chunks]
    per_worker = max(-(-len(bins) // workers) for bins in rows)
    wanted = per_worker * workers

    packs: list[list[Pack]] = [[] for _ in range(workers)]
    for chunk, bins in zip(chunks, rows, strict=True):
        factor = wanted / len(chunk)
        ready = [Pack(tuple(found), factor) for found in _split(bins, wanted)]
        shortest = min(chunk, key=lambda decision: len(decision.ids))
        ready += [Pack((shortest,), 0.0)] * (wanted - len(ready))

        # The longest first, in turn, so that no worker waits long for another.
        ready.sort(key=lambda pack: -sum(len(d.ids) for d in pack.decisions))
        for worker in range(workers):
            packs[worker] += ready[worker::workers]
    return Plan(tuple(map(tuple, packs)), len(chunks))


def _bins(decisions: Sequence[RatedDecision], max_tokens: int) -> list[list[RatedDecision]]:
    """Neighbours together, up to `max_tokens` ids."""
    bins: list[list[RatedDecision]] = []
    room = 0
    for decision in decisions:
        if not bins or len(decision.ids) > room:
            bins.append([])
            room = max_tokens
        bins[-1].append(decision)
        room -= len(decision.ids)
    return bins


def _split(bins: list[list[RatedDecision]], wanted: int) -> list[list[RatedDecision]]:
    """At most `wanted` bins, by halving those with the most decisions."""
    bins = list(bins)
    while len(bins) < wanted and max(map(len, bins)) > 1:
        largest = bins.pop(max(range(len(bins)), key=lambda i: len(bins[i])))
        half = len(largest) // 2
        bins += [largest[:half], largest[half:]]
    return bins
