"""From hidden states to log-probabilities of the asked tokens, through the model's own head code.

What a model does behind its decoder is its own affair: Granite divides its logits, Cohere
multiplies them, Gemma caps them. So the model's own forward runs, with a decoder that hands over
the hidden states it is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from priorzero.llm.scoring.items import TreeItem
from priorzero.llm.scoring.layers import run_checkpointed
from priorzero.types import TokenisedRequest

# Rows of logits whose normaliser is computed together: on a CPU as many as its cache holds, on a
# GPU all.
_TOGETHER = {"cpu": 8}


def logits_of(causal_lm: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[R, N]` of hidden states `[R, D]` as they come out of the decoder.

    Gradients flow. Not safe from two threads at once on one model: hold its lock.
    """
    with _decoder_gives(causal_lm.get_decoder(), hidden[None]):
        return causal_lm(inputs_embeds=hidden[None], use_cache=False).logits[0]


@contextlib.contextmanager
def _decoder_gives(decoder: torch.nn.Module, hidden: torch.Tensor):
    """Let the decoder answer with `hidden` [1, R, D] for a while, whatever it is asked."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    own = decoder.__dict__.get("forward")  # usually the class's, so nothing
    decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own


def token_logprobs(
    causal_lm: torch.nn.Module,
    hidden: torch.Tensor,
    items: Sequence[TreeItem],
    logit_rows: int,
    checkpointing: bool = False,
) -> list[torch.Tensor]:
    """Read the asked tokens' log-probabilities off the rows' hidden states `[R, D]`.

    Args:
        logit_rows: rows of logits `[R, N]` held at a time (autograd keeps them all).
        checkpointing: the backward computes them again.

    Returns:
        per item one flat tensor: the tokens of its actions one after another, then the thought's.
    """
    lookups: list[tuple[int, int]] = []  # (row of `hidden`, token)
    counts: list[int] = []
    first = 0
    for item in items:
        wanted = [(first + row, token) for row, token in item.lookups()]
        first += item.trie.num_rows + len(item.written)
        lookups.extend(wanted)
        counts.append(len(wanted))
    assert first == len(hidden), f"{len(hidden)} hidden states for {first} rows"

    row, token = torch.tensor(lookups, dtype=torch.long, device=hidden.device).reshape(-1, 2).T
    flat = torch.empty(len(lookups), dtype=torch.float32, device=hidden.device)
    step = max(1, logit_rows)
    for start in range(0, len(hidden), step):
        inside = ((row >= start) & (row < start + step)).nonzero()[:, 0]
        asked = (causal_lm, hidden[start : start + step], row[inside] - start, token[inside])
        if checkpointing:
            picked = run_checkpointed(_picked, causal_lm.get_decoder().config, *asked)
        else:
            picked = _picked(*asked)
        flat = flat.index_copy(0, inside, picked)
    return list(flat.split(counts))


def _picked(
    causal_lm: torch.nn.Module, hidden: torch.Tensor, row: torch.Tensor, token: torch.Tensor
) -> torch.Tensor:
    """Log-probability of each `token` behind its `row` of `hidden` [R, D]."""
    return _LogProbabilities.apply(logits_of(causal_lm, hidden), row, token)


class _LogProbabilities(torch.autograd.Function):
    """`logits[row, token] - logsumexp(logits[row])` in float32.

    What autograd would do takes a pass over `[R, N]` float32 numbers for each operation, which on a
    CPU costs as much as the product that made the logits. Here a few rows at a time go through all
    of it, forward and backward, and nothing of that size is kept but the logits as they are.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        """`[K]` of logits `[R, N]`, rows `[K]` and tokens `[K]`."""
        parts = logits.split(_TOGETHER.get(logits.device.type, max(1, len(logits))))
        normaliser = torch.cat([part.float().logsumexp(-1) for part in parts])
        ctx.save_for_backward(logits, normaliser, row, token)
        return logits[row, token].float() - normaliser[row]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """d/d logits[r] = (those of r's tokens, each at its token) - (their sum) softmax."""
        logits, normaliser, row, token = ctx.saved_tensors
        sums = torch.zeros_like(normaliser).index_add_(0, row, gradient)
        result = torch.empty_like(logits)

        step = _TOGETHER.get(logits.device.type, max(1, len(logits)))
        for start in range(0, len(logits), step):
            some = slice(start, start + step)
            part = (logits[some].float() - normaliser[some, None]).exp_().mul_(-sums[some, None])
            inside = ((row >= start) & (row < start + step)).nonzero()[:, 0]
            part.index_put_((row[inside] - start, token[inside]), gradient[inside], accumulate=True)
            result[some] = part
        return result, None, None


def split_actions(flat: torch.Tensor, request: TokenisedRequest) -> list[torch.Tensor]:
    """The flat token log-probabilities of one state, cut into one tensor per action."""
    return list(flat.split([len(a) for a in request.action_ids]))


def action_totals(
    flat: torch.Tensor, request: TokenisedRequest, reduction: str = "sum"
) -> torch.Tensor:
    """One number per action `[A]`: sum (or mean) over its tokens; as `ActionScores.totals`."""
    assert reduction in ("sum", "mean"), reduction

    lengths = torch.tensor([len(a) for a in request.action_ids], device=flat.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=flat.device), lengths)
    totals = torch.zeros(len(lengths), dtype=flat.dtype, device=flat.device)
    totals = totals.index_add(0, owner, flat)
    return totals if reduction == "sum" else totals / lengths
