"""How good a prior over the valid commands of a state is: pure functions.

A decision has `A` valid commands with scores (log-probabilities up to a constant), of which some
are right: those that lead to the same state as the walkthrough's.

    rank         1 + wrong commands that score above the best right one + half of those that tie
    top-k        share of decisions with rank <= k
    MRR          mean of 1 / rank; its error is the standard error of that mean
    probability  p(right) = sum over the right commands of softmax(scores / temperature)
    log loss     mean of -log p(right), in nats
    ECE          sum over bins of n_b / N * |share right in b - mean confidence in b|
                 (Naeini et al., AAAI 2015; arXiv:1706.04599), where the confidence is the
                 probability of the favourite command and of those that mean the same

Reductions of a command's token log-probabilities l_1 .. l_n (the terminator included) to a score:

    sum   l_1 + ... + l_n                     log p(command | state)
    mean  (l_1 + ... + l_n) / n
    pmi   sum - log p(command | no state)     pointwise mutual information (arXiv:2104.08315)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

REDUCTIONS = ("sum", "mean", "pmi")
BINS = 10
"""Of the reliability curve, of equal width."""


def reduce(tokens: Sequence[Sequence[float]], unconditional: np.ndarray, how: str) -> np.ndarray:
    """Scores `[A]` of commands.

    Args:
        tokens: per command the log-probabilities of its tokens.
        unconditional: `[A]` log-probability of each whole command where no state is shown.
        how: one of `REDUCTIONS`.
    """
    assert how in REDUCTIONS and len(tokens) == len(unconditional), (how, len(tokens))
    sums = np.asarray([sum(own) for own in tokens], dtype=np.float64)
    if how == "sum":
        return sums
    if how == "mean":
        return sums / np.asarray([len(own) for own in tokens])
    return sums - unconditional


@dataclass(frozen=True)
class Judged:
    """One decision under one prior.

    Attributes:
        rank: of the best right command; ties count half a place.
        log_right: log p(right).
        confidence: probability of the favourite and its equals.
        hit: whether the favourite is right.
    """

    rank: float
    log_right: float
    confidence: float
    hit: bool


def judge(scores: np.ndarray, outcomes: Sequence[int], temperature: float) -> Judged:
    """Judge the scores `[A]` of a decision; outcome 0 is right, equal outcomes are equal commands.

    Of commands that score alike the first is the favourite, as it is in play.
    """
    outcome = np.asarray(outcomes)
    right = outcome == 0
    assert scores.shape == outcome.shape and right.any(), (scores.shape, outcomes)

    best, wrong = scores[right].max(), scores[~right]
    rank = 1.0 + (wrong > best).sum() + (wrong == best).sum() / 2

    logits = scores / temperature
    log_all = _log_sum_exp(logits)
    favourite = outcome[int(np.argmax(scores))]
    return Judged(
        rank=float(rank),
        log_right=float(_log_sum_exp(logits[right]) - log_all),
        confidence=float(np.exp(_log_sum_exp(logits[outcome == favourite]) - log_all)),
        hit=bool(favourite == 0),
    )


def figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Means over decisions; each name is explained in docs/METRICS.md."""
    ranks = np.asarray([j.rank for j in judged])
    log_right = np.asarray([j.log_right for j in judged])
    return {
        "decisions": len(judged),
        "rank": float(ranks.mean()),
        "top1": float((ranks <= 1).mean()),
        "top3": float((ranks <= 3).mean()),
        "top5": float((ranks <= 5).mean()),
        "mrr": float((1 / ranks).mean()),
        "mrr_error": float((1 / ranks).std() / len(ranks) ** 0.5),
        "probability": float(np.exp(log_right).mean()),
        "log_loss": float(-log_right.mean()),
        "ece": expected_calibration_error(judged),
    }


def uniform_figures(outcomes: Sequence[Sequence[int]]) -> dict[str, float]:
    """`figures` of a player who draws uniformly, or orders the commands at random: expectations.

    With k right ones among n commands the first right one stands at place j + 1 with probability
    C(n - 1 - j, k - 1) / C(n, k): the j before it are wrong, the other k - 1 right ones behind it.
    A favourite is not told, so there is no calibration error.
    """
    sums = dict.fromkeys(("rank", "top1", "top3", "top5", "mrr", "probability", "log_loss"), 0.0)
    for own in outcomes:
        n, k = len(own), sum(one == 0 for one in own)
        assert k, "a decision without a right command is not judged"
        for j in range(n - k + 1):
            chance = comb(n - 1 - j, k - 1) / comb(n, k)
            sums["rank"] += chance * (j + 1)
            sums["mrr"] += chance / (j + 1)
            for top in (1, 3, 5):
                sums[f"top{top}"] += chance * (j < top)
        sums["probability"] += k / n
        sums["log_loss"] -= np.log(k / n)
    return {"decisions": len(outcomes)} | {
        name: float(total / len(outcomes)) for name, total in sums.items()
    }


def reliability(judged: Sequence[Judged]) -> list[dict[str, float]]:
    """The reliability curve: per bin that is not empty the decisions, their mean confidence, and
    the share whose favourite was right.
    """
    bins: list[list[Judged]] = [[] for _ in range(BINS)]
    for one in judged:
        bins[min(int(one.confidence * BINS), BINS - 1)].append(one)
    return [
        {
            "decisions": len(own),
            "confidence": float(np.mean([j.confidence for j in own])),
            "right": float(np.mean([j.hit for j in own])),
        }
        for own in bins
        if own
    ]


def expected_calibration_error(judged: Sequence[Judged]) -> float:
    """See the module."""
    return float(
        sum(b["decisions"] * abs(b["right"] - b["confidence"]) for b in reliability(judged))
        / len(judged)
    )


def _log_sum_exp(x: np.ndarray) -> float:
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum()))
