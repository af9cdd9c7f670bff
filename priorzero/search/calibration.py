"""The LLM's temperature at the root, fitted to what the search made of its answers while a run goes
on: temperature scaling (Guo et al. 2017, "On calibration of modern neural networks",
arXiv:1706.04599), with the search's policy in place of labels.

    T = argmin mean_i H(pi_i, softmax(l_i / T)),    H(pi, p) = -sum_a pi(a) log p(a)

over the newest decisions i: l_i what the LLM said, pi_i what was learnt from the search. In
beta = 1 / T the mean is convex: with p = softmax(beta l)

    d/d beta    = mean_i (E_p[l_i] - E_pi[l_i])
    d2/d beta2  = mean_i Var_p(l_i) >= 0

so that its derivative rises, and bisection finds where it is 0, or the bound it lies beyond.
docs/ALGORITHM.md tells which targets these are, and what happens where the search found nothing.

Letters: `N` decisions, `A` the most valid actions of any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.data.segment import StepRecord
from priorzero.settings.policy import CalibrationSettings

# Halvings of the range of log T: what is left of any range is below a float's rounding.
_HALVINGS = 60

# Nats below the likeliest action, for one that an engine calls impossible: -inf has no derivative.
_FLOOR = -1000.0


@dataclass(frozen=True)
class Calibration:
    """What the newest decisions say of the temperature.

    Attributes:
        temperature: the new one, on the way to the best one.
        best: the one with the lowest loss, within the bounds.
        loss_before: mean cross-entropy in nats at the temperature until now.
        loss_after: at the new one.
        loss_uniform: at an infinite one, where the LLM has no opinion.
        decisions: how many were used.
    """

    temperature: float
    best: float
    loss_before: float
    loss_after: float
    loss_uniform: float
    decisions: int


@dataclass(frozen=True, eq=False)
class Answers:
    """What the LLM said of `N` decisions, and what it should have said.

    Attributes:
        logprobs: `[N, A]` less each row's largest; 0 beyond a row's own actions.
        targets: `[N, A]` probabilities; 0 beyond a row's own.
        valid: `[N, A]` bool, which actions are its own.
    """

    logprobs: np.ndarray
    targets: np.ndarray
    valid: np.ndarray

    @classmethod
    def of(cls, logprobs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Answers:
        """Of `N` >= 1 decisions: per decision `[A]` log-probabilities, and `[A]` probabilities."""
        sizes = np.array([len(row) for row in logprobs])
        valid = np.arange(sizes.max()) < sizes[:, None]
        wide = np.zeros((2, *valid.shape))
        for at, (said, target) in enumerate(zip(logprobs, targets, strict=True)):
            wide[0, at, : len(said)] = np.maximum(said - np.max(said), _FLOOR)
            wide[1, at, : len(said)] = target
        assert not np.isnan(wide).any() and np.abs(wide[1].sum(axis=1) - 1).max() < 1e-3
        return cls(wide[0], wide[1], valid)

    def loss(self, beta: float) -> float:
        """Mean cross-entropy in nats at temperature 1 / beta."""
        norm = np.log(np.sum(np.exp(beta * self.logprobs), axis=1, where=self.valid))
        return float(np.mean(norm - beta * np.sum(self.targets * self.logprobs, axis=1)))

    def slope(self, beta: float) -> float:
        """Its derivative by beta, which rises with beta."""
        shares = np.exp(beta * self.logprobs) * self.valid
        expected = np.sum(shares * self.logprobs, axis=1) / np.sum(shares, axis=1)
        return float(np.mean(expected - np.sum(self.targets * self.logprobs, axis=1)))


def best_temperature(answers: Answers, lowest: float, highest: float) -> float:
    """The temperature in lowest..highest with the least loss: a bound, where the least lies beyond
    it. Targets that speak against the LLM make it `highest`.
    """
    if answers.slope(1.0 / highest) >= 0.0:
        return highest
    if answers.slope(1.0 / lowest) <= 0.0:
        return lowest

    cold, hot = math.log(lowest), math.log(highest)
    for _ in range(_HALVINGS):
        middle = 0.5 * (cold + hot)
        if answers.slope(math.exp(-middle)) > 0.0:
            cold = middle
        else:
            hot = middle
    return math.exp(0.5 * (cold + hot))


def calibrate(
    steps: Sequence[StepRecord],
    reduction: str,
    settings: CalibrationSettings,
    temperature: float,
) -> Calibration | None:
    """Move the temperature towards the one that fits these decisions.

    Args:
        steps: decisions with the LLM's scores, newest first; see `comparable` for those it takes.
        reduction: how the LLM's token log-probabilities become one number per action.
        settings: bounds, how many decisions it takes, how far it goes.
        temperature: until now.

    Returns:
        None where fewer than `least` decisions tell anything.
    """
    rows = []
    for step in comparable(steps, settings.least):
        said = np.asarray(step.scores.totals(reduction), dtype=np.float64)
        if np.ptp(said) > 0.0:  # else it is the same at every temperature
            rows.append((said, step.target_policy))
    if len(rows) < settings.least:
        return None

    answers = Answers.of(*zip(*rows, strict=True))
    best = best_temperature(answers, settings.lowest, settings.highest)
    # The temperature enters the very targets it is fitted to: what a few decisions say is not
    # followed at once.
    new = temperature * (best / temperature) ** settings.rate
    return Calibration(
        temperature=new,
        best=best,
        loss_before=answers.loss(1.0 / temperature),
        loss_after=answers.loss(1.0 / new),
        loss_uniform=answers.loss(0.0),
        decisions=len(rows),
    )


def comparable(steps: Sequence[StepRecord], least: int) -> list[StepRecord]:
    """Of decisions, newest first: those that the newest of the LLM's weights answered, and where
    these are fewer than `least`, so many of the newest, whatever weights answered. The temperature
    of older weights is not theirs, but nearer to it than none.
    """
    newest = max((step.scores.weights_version for step in steps), default=0)
    return [
        step
        for number, step in enumerate(steps)
        if number < least or step.scores.weights_version == newest
    ]
